"""Writes docs/speed.md: VAR-d16, HMAR-d16 and CoDe at 256 pixels, and a training step, on one thread of a CPU.

    python bench/models/next_scale_table.py                    all parts
    python bench/models/next_scale_table.py picture training   some; the others keep their numbers

Weights are random at the published sizes. The peer is VAR's forward pass written out plainly (PyTorch's linear layers,
`scaled_dot_product_attention` under a dense mask, a cache that grows by concatenation) with the same weights, in the
same run, in turns. All times are process CPU time.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import arcore
from arcore import masks
from arcore.catalog.claims import shaken
from arcore.decoding import generate_next_scale
from arcore.env import cpu_model
from arcore.matmul import resolve
from arcore.nn.adaln import modulated_norm
from arcore.zoo.next_scale.code import decode_together
from arcore.zoo.next_scale.hmar.refine import generate_refined
from arcore.zoo.next_scale.hmar.schedule import published_schedule
from arcore.zoo.next_scale.var import VAR, VARConfig

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench/results/next_scale.json"
PAGE = ROOT / "docs/speed.md"
SIDES = {680: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 2240: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)}
LABELS = torch.tensor([207])


class Plain:
    """VAR's forward pass, written out; weights are those of ours.

    Args:
        model: ours.
    """

    def __init__(self, model: VAR) -> None:
        self.model = model
        self.cache: list[tuple[Tensor, Tensor] | None] = [None] * len(model.blocks)

    def attention(self, x: Tensor, layer: int, bias: Tensor | None, keep: bool) -> Tensor:
        part: Any = self.model.blocks[layer]
        attn = part.attn
        batch, length, dim = x.shape
        heads = attn.num_heads
        joined = torch.cat((attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias))
        qkv = F.linear(x, attn.qkv.weight, joined).view(batch, length, 3, heads, dim // heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        scale = attn.log_scale.clamp_max(math.log(100)).exp()
        q, k = F.normalize(q, dim=-1).mul(scale), F.normalize(k, dim=-1)
        if keep:
            before = self.cache[layer]
            if before is not None:
                k, v = torch.cat((before[0], k), 2), torch.cat((before[1], v), 2)
            self.cache[layer] = (k, v)
        out = F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), attn_mask=bias, scale=1.0)
        return attn.proj(out.transpose(1, 2).reshape(batch, length, dim))  # type: ignore[no-any-return]

    def hidden(self, x: Tensor, cond: Tensor, bias: Tensor | None = None, keep: bool = False) -> Tensor:
        for layer, part in enumerate(self.model.blocks):
            block: Any = part
            gate1, gate2, scale1, scale2, shift1, shift2 = block.modulation(cond)
            x = x + gate1 * self.attention(modulated_norm(x, scale1, shift1), layer, bias, keep)
            x = x + gate2 * block.ffn(modulated_norm(x, scale2, shift2))
        return x

    @torch.no_grad()
    def draw(self, tokenizer: Any, seed: int) -> Tensor:
        """One picture with guidance, codes by `multinomial`."""
        model = self.model
        self.cache = [None] * len(model.blocks)
        generator = torch.Generator().manual_seed(seed)
        cond = model.class_embed(torch.tensor([207, model.null_class]))
        latent = tokenizer.empty_latent(1)
        last = len(model.patch_nums) - 1
        for k, side in enumerate(model.patch_nums):
            start, stop = model.scale_starts[k : k + 2]
            if k == 0:
                x = cond.unsqueeze(1) + model.pos_start
            else:
                x = model.word_embed(tokenizer.next_input(k - 1, latent)).repeat(2, 1, 1)
            x = x + model.level_embed.weight[k] + model.pos_embed[:, start:stop]
            logits = model.head(self.hidden(x, cond, keep=True), cond)
            t = 1.5 * k / last
            mixed = (1 + t) * logits[:1] - t * logits[1:]
            codes = torch.multinomial(mixed[0].softmax(-1), 1, generator=generator).view(1, side * side)
            latent = tokenizer.add_scale(k, codes, latent)
        # Pixels as the authors' code makes them, in the usual memory format.
        images: Tensor = tokenizer.decoder(tokenizer.post_quant_conv(latent)).clamp(-1, 1)
        return images


def once(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    out = run()
    return time.process_time() - start, out


def peak_mb(run: Callable[[], Any]) -> tuple[float, float, Any]:
    """`once`, with how far the process's memory rose meanwhile, in MB (Linux)."""

    def status(name: str) -> int:
        [line] = [
            line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)
        ]
        return int(line.split()[1])

    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = status("VmRSS")
    spent, out = once(run)
    return spent, max(0, status("VmHWM") - before) / 1000, out


@contextlib.contextmanager
def stages(tokenizer: Any, model: Any) -> Iterator[dict[str, float]]:
    """Process time in the attention op, in the blocks' linear layers, and in the decoder."""
    found = {"attention": 0.0, "linear layers": 0.0, "decoder": 0.0}
    handles = []

    def watch(module: nn.Module, name: str) -> None:
        begun: list[float] = []
        handles.append(module.register_forward_pre_hook(lambda *_: begun.append(time.process_time())))

        def ended(*_: Any) -> None:
            found[name] += time.process_time() - begun.pop()

        handles.append(module.register_forward_hook(ended))

    watch(tokenizer.decoder, "decoder")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "blocks" in name:
            watch(module, "linear layers")
    import arcore.nn.attention as attention

    op = attention.block_sparse_attention

    def timed(*args: Any, **kwargs: Any) -> Tensor:
        start = time.process_time()
        out = op(*args, **kwargs)
        found["attention"] += time.process_time() - start
        return out

    attention.block_sparse_attention = timed  # type: ignore[assignment]
    try:
        yield found
    finally:
        attention.block_sparse_attention = op
        for handle in handles:
            handle.remove()


def psnr(one: Tensor, two: Tensor) -> float:
    """In dB, for values in [-1, 1]."""
    return float(10 * torch.log10(4 / (one.float() - two.float()).square().mean().clamp(min=1e-12)))


def networks(preset: str, depth: int | None) -> tuple[Any, Any]:
    torch.manual_seed(0)
    changes = {} if depth is None else {"depth": depth}
    if depth is not None and preset.startswith("hmar"):
        changes["tail"] = max(1, depth // 2)
    # Initial gates are almost zero: shaken, the blocks matter, and so does the precision of their weights.
    model = shaken(arcore.create_model(preset, **changes), scale=0.02)
    return model.eval(), arcore.create_model("msvq_ch160").eval()


def quantised(model: VAR) -> VAR:
    """The blocks' linear layers as products of 8-bit weights and 8-bit activations (torchao), in place."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    # The modulation is made once for an image, of one or two rows: too few to gain.
    many = lambda part, name: isinstance(part, nn.Linear) and "modulation" not in name  # noqa: E731
    quantize_(model.blocks, Int8DynamicActivationInt8WeightConfig(), many)
    return model


def by_onednn(run: Callable[[], Any]) -> Callable[[], Any]:
    def inner() -> Any:
        with arcore.float32_matmul("onednn"):
            return run()

    return inner


def auto(run: Callable[[], Any]) -> Callable[[], Any]:
    return by_onednn(run) if resolve("auto") == "onednn" else run


def in_bfloat16(run: Callable[[], Any]) -> Callable[[], Any]:
    def inner() -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return run()

    return inner


def picture(rounds: int, depth: int | None, lower: bool) -> dict[str, Any]:
    """One picture at 256 pixels with guidance."""
    model, tokenizer = networks("var_d16", depth)
    plain = Plain(model)
    seconds: dict[str, list[float]] = {}
    drawn: dict[str, Any] = {}

    def ours() -> Any:
        return generate_next_scale(model, tokenizer, LABELS, cfg_scale=1.5, seed=1)

    @torch.no_grad()
    def theirs() -> Any:
        return plain.draw(tokenizer, 1)

    runs: dict[str, Callable[[], Any]] = {"plain, float32": theirs, "VAR, float32": ours}
    if resolve("auto") == "onednn":
        runs |= {f"{name} by oneDNN": by_onednn(run) for name, run in list(runs.items())}
    if lower:
        runs |= {"plain, bf16 autocast": in_bfloat16(theirs), "VAR, bf16 autocast": in_bfloat16(ours)}
    memory: dict[str, float] = {}
    for _ in range(rounds):
        for name, run in runs.items():
            spent, memory[name], drawn[name] = peak_mb(run)
            seconds.setdefault(name, []).append(spent)
            print(f"{name}: {spent:.2f} s", file=sys.stderr, flush=True)
    parts = {}
    for name, run in runs.items():
        if name.startswith("VAR"):
            with stages(tokenizer, model) as found:
                run()
            parts[f"stages of {name}"] = {part: round(value, 3) for part, value in found.items()}
    reference = drawn["VAR, float32"]
    quantised(model)
    eight, name = (in_bfloat16(ours), "VAR, int8, decoder bf16") if lower else (ours, "VAR, int8")
    eight()  # torchao prepares its kernels at the first call.
    for _ in range(rounds):
        spent, memory[name], drawn[name] = peak_mb(eight)
        seconds.setdefault(name, []).append(spent)
        print(f"{name}: {spent:.2f} s", file=sys.stderr, flush=True)
    with stages(tokenizer, model) as found:
        eight()
    parts[f"stages of {name}"] = {part: round(value, 3) for part, value in found.items()}
    quality = {}
    for name in drawn:
        if not name.startswith("VAR") or drawn[name] is reference:
            continue
        other = drawn[name]
        same = torch.cat([(a == b).flatten() for a, b in zip(reference.indices, other.indices, strict=True)])
        quality[name] = {
            "equal codes": round(float(same.float().mean()), 4),
            "PSNR": round(psnr(reference.images, other.images), 2),
        }
    return {
        "seconds": {name: round(statistics.median(times), 3) for name, times in seconds.items()},
        **parts,
        "quality": quality,
        "rise of memory, MB": {name: round(value, 1) for name, value in memory.items()},
        "depth": len(model.blocks),
    }


def others(rounds: int, depth: int | None) -> dict[str, Any]:
    """HMAR and CoDe beside VAR, the same picture."""
    model, tokenizer = networks("var_d16", depth)
    plain = Plain(model)
    hmar, _ = networks("hmar_d16", depth)
    small = VAR(VARConfig(depth=max(1, len(model.blocks) // 2), embed_dim=512, num_heads=8)).eval()
    pair: Any = lambda: decode_together(model, small, tokenizer, LABELS, draft_scales=8, seed=1)  # noqa: E731
    runs: dict[str, Callable[[], Any]] = {
        "plain": torch.no_grad()(lambda: plain.draw(tokenizer, 1)),
        "VAR": lambda: generate_next_scale(model, tokenizer, LABELS, cfg_scale=1.5, seed=1),
        "HMAR, one pass a scale": lambda: generate_next_scale(hmar, tokenizer, LABELS, cfg_scale=1.5, seed=1),
        "HMAR, redrawn": lambda: generate_refined(
            hmar, tokenizer, LABELS, cfg_scale=1.5, seed=1, schedule=published_schedule(hmar.patch_nums)
        ),
        "CoDe, a half as refiner": pair,
    }
    seconds: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, run in runs.items():
            spent, _ = once(run if name == "plain" else auto(run))
            seconds.setdefault(name, []).append(spent)
            print(f"{name}: {spent:.2f} s", file=sys.stderr, flush=True)
    return {
        "seconds": {name: round(statistics.median(times), 3) for name, times in seconds.items()},
        "cache, MB": {
            "VAR": model.make_cache(2).nbytes / 1e6,
            "CoDe": pair().peak_cache_bytes / 1e6,
            "HMAR": 0.0,
        },
        "depth": len(model.blocks),
    }


def training(rounds: int, lengths: list[int], lower: bool) -> dict[str, Any]:
    """Two blocks of d16's shape, forward and backward, batch 1."""
    found: dict[str, Any] = {}
    for length in lengths:
        sides = SIDES[length]
        torch.manual_seed(0)
        model = VAR(VARConfig(depth=2, embed_dim=1024, num_heads=16, patch_nums=sides)).train()
        plain = Plain(model)
        levels = torch.tensor([k for k, side in enumerate(sides) for _ in range(side * side)])
        bias = torch.where(levels[:, None] >= levels[None], 0.0, -math.inf)[None, None]
        mask = masks.next_scale(sides)
        markov = masks.next_scale_markov(sides)
        cond = torch.randn(1, 1024)
        x = torch.randn(1, length, 1024, requires_grad=True)
        weights = [p for p in model.blocks.parameters() if p.requires_grad]

        def step(forward: Callable[[], Tensor], weights: Any = weights, x: Tensor = x) -> None:
            torch.autograd.grad(forward().float().square().mean(), [x, *weights])

        forms: dict[str, Callable[[], None]] = {
            "plain": lambda p=plain, b=bias, c=cond, x=x, s=step: s(lambda: p.hidden(x, c, b)),  # type: ignore[misc]
            "VAR": lambda m=model, k=mask, c=cond, x=x, s=step: s(lambda: m._hidden(x, c, k, None)),  # type: ignore[misc]
            "HMAR": lambda m=model, k=markov, c=cond, x=x, s=step: s(lambda: m._hidden(x, c, k, None)),  # type: ignore[misc]
        }
        runs = {f"{name}, float32": run for name, run in forms.items()}
        if resolve("auto") == "onednn":
            runs |= {f"{name}, float32 by oneDNN": by_onednn(run) for name, run in forms.items()}
        if lower:
            runs |= {f"{name}, bf16 autocast": in_bfloat16(run) for name, run in forms.items()}
        seconds: dict[str, list[float]] = {}
        for turn in range(rounds + 1):
            for name, run in runs.items():
                spent, _ = once(run)
                if turn:
                    seconds.setdefault(name, []).append(spent)
        found[str(length)] = {name: round(statistics.median(times), 4) for name, times in seconds.items()}
        print(length, found[str(length)], file=sys.stderr, flush=True)
    return {"seconds": found}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", default=["picture", "others", "training"])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--depth", type=int, help="blocks, in place of 16, for a quicker look")
    parser.add_argument(
        "--shared", action="store_true", help="note that the machine ran other work meanwhile"
    )
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[680, 2240], help="tokens of a training step"
    )
    parser.add_argument(
        "--float32", action="store_true", help="leave bfloat16 out, which is slow where it is emulated"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    machine = {"cpu": cpu_model(), "torch": torch.__version__, "bf16 units": str(torch.ops.arcore.cpu_bf16())}
    for part in options.parts:
        lower = not options.float32
        if part == "training":
            result = training(options.rounds, options.lengths, lower)
            before = record.get(part, {}).get("seconds", {})
            result["seconds"] = {**before, **result["seconds"]}
        elif part == "picture":
            result = picture(options.rounds, options.depth, lower)
        else:
            result = others(options.rounds, options.depth)
        record[part] = {**machine, "shared machine": options.shared, "rounds": options.rounds, **result}
        RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    write(record)
    return 0


def write(record: dict[str, Any]) -> None:
    """The page."""
    lines = [INTRO]
    for part, title in TITLES.items():
        if part not in record:
            continue
        found = record[part]
        lines += [f"## {title}", "", _machine(found), ""]
        if found.get("depth", 16) != 16:
            lines += [f"With {found['depth']} blocks in place of 16.", ""]
        if part == "training":
            lines += ["| tokens | pass | seconds | plain over it, same precision |", "|---|---|---|---|"]
            for length, times in found["seconds"].items():
                for name, value in times.items():
                    precision = name.split(", ")[1].removesuffix(" by oneDNN")
                    base = times[f"plain, {precision}"]
                    lines.append(f"| {length} | {name} | {value:.3f} | {base / value:.2f} |")
        else:
            first = next(iter(found["seconds"].values()))
            lines += [f"| way | seconds | {next(iter(found['seconds']))} over it |", "|---|---|---|"]
            lines += [
                f"| {name} | {value:.2f} | {first / value:.2f} |" for name, value in found["seconds"].items()
            ]
        for name, table in found.items():
            if name.startswith("stages"):
                lines += ["", f"{name}: " + ", ".join(f"{k} {v:.2f} s" for k, v in table.items()) + "."]
            elif name == "quality":
                lines += ["", "Against VAR in float32 with the same seed: "]
                lines[-1] += "; ".join(
                    f"{k} {v['equal codes']:.1%} equal codes, {v['PSNR']:.1f} dB" for k, v in table.items()
                )
                lines[-1] += ". One code that differs changes what follows it."
            elif name.startswith(("cache", "rise")):
                lines += ["", f"{name}: " + ", ".join(f"{k} {v:.1f}" for k, v in table.items()) + "."]
        lines.append("")
    PAGE.write_text("\n".join(lines), encoding="utf-8")


def _machine(found: dict[str, Any]) -> str:
    units = found["bf16 units"]
    shared = (
        " The machine ran other work meanwhile, so only ratios within this table mean something."
        if found["shared machine"]
        else ""
    )
    return (
        f"{found['cpu']}, one thread, torch {found['torch']}, units for bfloat16: {units}; process CPU time, median of "
        f"{found['rounds']}.{shared}"
    )


TITLES = {
    "picture": "One picture of VAR-d16, 256 pixels, with guidance",
    "others": "VAR, HMAR and CoDe",
    "training": "A training step of two blocks, forward and backward",
}
INTRO = """\
# Speed of next-scale models

Random weights at the published sizes. "plain" is VAR's forward pass written out with PyTorch's own layers, a dense mask
where one is needed, and a cache that grows by concatenation; it has the same weights and ran in turns with ours. Made
by `python bench/models/next_scale_table.py`.

"by oneDNN" is within `arcore.float32_matmul("onednn")`, which the command line chooses by itself on processors where it
pays; it serves plain code as well. Without units for bfloat16 a processor emulates it, and `--precision auto` stays
with float32.

HMAR saves attention alone. By the counts of [cost against resolution](resolution.md) VAR needs 1.11 times HMAR's
operations for a picture of 512 pixels and 1.39 times for one of 1024, guided or not. So where matrix products run as
fast as attention, as on a CPU, the 1.5 of its paper, measured where the cache weighs, is out of reach at 512 pixels.
"""


if __name__ == "__main__":
    raise SystemExit(main())
