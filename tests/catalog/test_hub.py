"""Weights from a model hub, served on the loopback interface, and folders as hubs have them."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import arcore
from arcore.catalog import Published, hub
from arcore.cli import main
from arcore.models import from_pretrained, save_pretrained

pytest.importorskip("safetensors")
huggingface_hub = pytest.importorskip("huggingface_hub")


def small(**overrides):
    return arcore.create_model("var_tiny", depth=1, embed_dim=16, num_heads=1, **overrides)


def same(one, other) -> bool:
    return all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())


class Hub(BaseHTTPRequestHandler):
    """The two requests that a download makes: what a file is, and the file."""

    folder: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self.answer(with_content=False)

    def do_GET(self) -> None:
        self.answer(with_content=True)

    def answer(self, *, with_content: bool) -> None:
        self.asked.append(f"{self.command} {self.path}")
        owner, name, _, _, file = self.path.lstrip("/").split("?")[0].split("/", 4)
        path = self.folder / owner / name / file
        if not path.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = path.read_bytes()
        self.send_response(200)
        self.send_header("X-Repo-Commit", "1" * 40)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if with_content:
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose repositories `owner/name` are a hub, with an empty cache."""
    (tmp_path / "hub").mkdir()
    handler = type("Handler", (Hub,), {"folder": tmp_path / "hub", "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hub, "_cache", lambda: tmp_path / "cache")
    yield tmp_path / "hub"
    server.shutdown()
    thread.join()
    server.server_close()


def test_presets_know_where_their_weights_are():
    assert hub.published("var_d16") == Published("FoundationVision/var", "var_d16.pth")
    assert hub.published("mamba_130m").beside == ("config.json",)
    assert hub.published("mamba_130m").tokenizer == "EleutherAI/gpt-neox-20b"
    with pytest.raises(ValueError, match="var_tiny names no place on the hub"):
        hub.published("var_tiny")
    with pytest.raises(
        ValueError, match="belong to a preset, not to the system 'var': choose one of var_d16"
    ):
        hub.published("var")


def test_create_model_fetches_what_the_preset_names(served: Path, monkeypatch: pytest.MonkeyPatch):
    model = small()
    folder = served / "someone/var"
    folder.mkdir(parents=True)
    torch.save(model.state_dict(), folder / "weights.pth")
    monkeypatch.setattr(hub, "published", lambda name: Published("someone/var", "weights.pth"))
    fetched = arcore.create_model("var_tiny", weights="hub", depth=1, embed_dim=16, num_heads=1)
    assert same(model, fetched)


def test_the_command_line_draws_with_weights_and_tokenizer_of_the_hub(
    served: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The tokenizer is in a repository of its own, as that of state-spaces' models is."""
    tokenizers = pytest.importorskip("tokenizers")
    model = arcore.create_model("mamba_tiny")
    save_pretrained(model, served / "someone/tiny")
    words = {word: number for number, word in enumerate(["the", "sea", "is", "wide"])}
    words |= {f"w{number}": number for number in range(4, model.vocab_size)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="the"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    (served / "someone/words").mkdir(parents=True)
    made.save(str(served / "someone/words/tokenizer.json"))
    place = Published("someone/tiny", "model.safetensors", ("config.json",), tokenizer="someone/words")
    monkeypatch.setattr(hub, "published", lambda name: place)
    command = ["sample", "mamba_tiny", "--weights", "hub", "--prompt", "the sea is", "--max-new-tokens", "3"]
    assert main([*command, "--seed", "1"]) == 0
    assert capsys.readouterr().out.startswith("the sea is")
    # A picture, of a model whose decoder of latents is not needed.
    dit = arcore.create_model("dit_tiny")
    save_pretrained(dit, served / "someone/dit")
    place = Published("someone/dit", "model.safetensors", ("config.json",))
    out = served / "digits.png"
    assert (
        main(
            [
                "sample",
                "dit_tiny",
                "--weights",
                "hub",
                "--class",
                "3",
                "-n",
                "1",
                "--steps",
                "2",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    assert out.stat().st_size > 50


def test_what_the_hub_does_not_have_is_one_sentence(served: Path):
    with pytest.raises(
        OSError, match=r"cannot fetch var_d16\.pth of FoundationVision/var for var_d16: "
    ) as error:
        arcore.create_model("var_d16", weights="hub")
    assert "\n" not in str(error.value)
    assert "get var_d16.pth by other means into one folder" in str(error.value)


def test_offline_names_all_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(hub, "_cache", lambda: tmp_path)
    # What HF_HUB_OFFLINE=1 sets when the library is imported.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"get pytorch_model\.bin, config\.json by other means"):
        arcore.create_model("mamba_130m", weights="hub")


def test_a_hub_that_cannot_be_reached_is_told_within_seconds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(hub, "_cache", lambda: tmp_path)
    monkeypatch.setattr(hub, "PATIENCE", 0.5)
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as silent:  # accepts connections and never answers
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        for listening in (False, True):
            if listening:
                silent.listen()
            monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
            start = time.monotonic()
            with pytest.raises(
                OSError, match=r"cannot fetch var_d16\.pth of FoundationVision/var for var_d16: "
            ):
                arcore.create_model("var_d16", weights="hub")
            assert time.monotonic() - start < 5


def test_what_was_fetched_before_needs_no_hub(served: Path, monkeypatch: pytest.MonkeyPatch):
    save_pretrained(small(), served / "someone/mine")
    from_pretrained("someone/mine")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        assert from_pretrained("someone/mine").config == small().config


def test_without_the_library_the_package_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"huggingface-hub.*\[hub\]"):
        arcore.create_model("var_d16", weights="hub")


def test_a_module_as_a_hub_folder(served: Path, tmp_path: Path):
    model = small()
    save_pretrained(model, tmp_path / "mine")
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["config.json", "model.safetensors"]
    content = json.loads((tmp_path / "mine/config.json").read_text())
    assert content["modules"]["model"]["system"] == "var"
    assert same(model, from_pretrained(tmp_path / "mine"))
    save_pretrained(model, served / "someone/mine")
    again = from_pretrained("someone/mine")
    assert same(model, again)
    assert again.config == model.config


def test_bad_sources(served: Path, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="nowhere is no checkpoint"):
        from_pretrained(tmp_path / "nowhere")
    with pytest.raises(OSError, match=r"cannot fetch model\.safetensors of someone/gone for someone/gone"):
        from_pretrained("someone/gone")
    arcore.models.save_checkpoint(tmp_path / "two", {"model": small(), "other": small()})
    with pytest.raises(ValueError, match=r"expected one module, 'model', in .*two but it has model, other"):
        from_pretrained(tmp_path / "two")
    with pytest.raises(TypeError, match="zoo but got Linear"):
        save_pretrained(torch.nn.Linear(1, 1), tmp_path / "linear")
