// Browsers start no workers for pages read from file://, and the search runs in one. There, run its script in a hidden
// frame instead, which offers what the search uses of a worker: messages both ways, and importScripts.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const home = new URL(url, document.baseURI)
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      const inside = frame.contentWindow
      inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }))
      inside.importScripts = (...urls) => Promise.all(urls.map((each) => load(each)))
      const load = (address) =>
        new Promise((resolve, reject) => {
          const script = inside.document.createElement("script")
          script.src = new URL(address, home).href
          script.onload = resolve
          script.onerror = reject
          inside.document.body.append(script)
        })
      this.ready = load(home)
      this.inside = inside
    }

    postMessage(data) {
      this.ready.then(() => this.inside.dispatchEvent(new MessageEvent("message", { data })))
    }

    terminate() {
      this.inside.frameElement.remove()
    }
  }
  // By this name the search's script recognises that it runs in a frame.
  window.IFrameWorker = window.Worker
}
