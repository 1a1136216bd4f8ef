"""decoder_step beside the same layer in PyTorch's ops on a CPU: `pytest bench/decoder_step`.

The thirty layers of SmolLM2-135M, one token of 1 and of 8 rows behind 256 others, float32, one thread, process CPU
time, median of 7 steps taken in turns. The floor is reading the weights once, at the speed at which torch sums them in
the same run.

By tokens: what a call takes that reads 1 to 32 tokens of one text, in each storage of the weights (float32, bfloat16,
blocks of 8 and of 4 bits), and the last layer (`linear_step`) likewise, as multiples of one token. Two floors stand
beside them: the bytes of the weights, and the multiply-adds of all tokens at the rate that `run_fma` reaches from
registers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from measure import cpu_seconds, fma_peak_gflops, interleaved_seconds

from arcore.nn import DecoderLayer, GatedMLP, GroupedAttention, RotaryTable, TokenCache
from arcore.ops import decoder_step, quantise_blocks
from arcore.ops._block_values import KINDS

LAYERS, DIM, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, CONTEXT = 30, 576, 9, 3, 64, 1536, 256


@cache
def layers() -> tuple[DecoderLayer, ...]:
    made = [
        DecoderLayer(
            DIM,
            attention=GroupedAttention(DIM, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM),
            mlp=GatedMLP(DIM, HIDDEN),
        ).requires_grad_(False)
        for _ in range(LAYERS)
    ]
    return tuple(made)


def filled(batch: int) -> TokenCache:
    cache = TokenCache(
        num_layers=LAYERS, batch=batch, num_heads=KV_HEADS, max_length=CONTEXT + 8, head_dim=HEAD_DIM
    )
    cache.keys.normal_()
    cache.values.normal_()
    cache.open(CONTEXT)
    cache.commit(CONTEXT)
    return cache


IMPLEMENTATIONS = ("arcore", "pytorch")
LEAST = 1.2


@cache
@torch.no_grad()
def step_runs(batch: int) -> dict[str, Callable[[], object]]:
    """A step of both, and reading the weights."""
    cache, x = filled(batch), torch.randn(batch, DIM)
    angles = RotaryTable(HEAD_DIM).span(CONTEXT, CONTEXT + 1, torch.device("cpu"))
    cos, sin = (angle.view(1, HEAD_DIM) for angle in angles)
    lengths = torch.full((batch,), CONTEXT)
    plans = [layer.step_weights() for layer in layers()]

    def ours() -> None:
        y = x.clone()
        cache.open(1)
        for i, weights in enumerate(plans):
            keys, values = cache.layer(i)
            decoder_step(y, **weights, keys=keys, values=values, cos=cos, sin=sin, lengths=lengths)

    def peer() -> None:
        y = x
        for i, layer in enumerate(layers()):
            attention: Any = layer.attention
            keys, values = cache.layer(i)
            qkv = F.linear(F.rms_norm(y, (DIM,), layer.norm1.weight, 1e-5), attention.qkv.weight)
            heads = qkv.view(batch, -1, HEAD_DIM)
            qk = heads[:, : HEADS + KV_HEADS]
            first, second = qk.chunk(2, -1)
            qk = qk * angles.cos[0, 0] + torch.cat([second, first], -1) * angles.sin[0, 0]
            keys[:, :, CONTEXT] = qk[:, HEADS:]
            values[:, :, CONTEXT] = heads[:, HEADS + KV_HEADS :]
            seen = slice(CONTEXT + 1)
            out = F.scaled_dot_product_attention(
                qk[:, :HEADS].unsqueeze(2), keys[:, :, seen], values[:, :, seen], enable_gqa=True
            )
            y = y + F.linear(out.reshape(batch, -1), attention.out.weight)
            gate, up = F.linear(
                F.rms_norm(y, (DIM,), layer.norm2.weight, 1e-5), layer.mlp.gate_up.weight
            ).chunk(2, -1)
            y = y + F.linear(F.silu(gate) * up, layer.mlp.down.weight)

    weights = [p for layer in layers() for p in layer.parameters()]
    return {"arcore": ours, "pytorch": peer, "floor": lambda: [w.sum() for w in weights]}


@cache
@torch.no_grad()
def step_times(batch: int) -> dict[str, float]:
    return interleaved_seconds(step_runs(batch), 7)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("batch", [1, 8])
@torch.no_grad()
def bench_decoder_step(batch: int, impl: str, benchmark: Any) -> None:
    torch.set_num_threads(1)
    times = step_times(batch)
    benchmark.extra_info |= {
        "op": "decoder_step", "case": f"smollm2_135m_batch_{batch}", "impl": impl, "direction": "step",
        "seconds": times[impl], "floor_seconds": times["floor"],
    }  # fmt: skip
    benchmark.pedantic(step_runs(batch)[impl], rounds=1)


def floors_report(records: list[dict[str, Any]]) -> list[str]:
    own = [r for r in records if r.get("op") == "decoder_step"]
    lines = []
    for r in own:
        theirs = next((p for p in own if p["case"] == r["case"] and p["impl"] != "arcore"), None)
        if r["impl"] != "arcore" or theirs is None:
            continue
        ratio = theirs["seconds"] / r["seconds"]
        lines.append(
            f"{'ok   ' if ratio >= LEAST else 'BELOW'} {r['case']}: {r['seconds'] * 1e3:.1f} ms = {ratio:.2f} x "
            f"PyTorch's ops ({theirs['seconds'] * 1e3:.1f}), floor {LEAST:g}; reading the weights "
            f"{r['floor_seconds'] * 1e3:.1f} ms"
        )
    return lines


COUNTS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32)
VOCABULARY = 49152
# Tokens of a call that may take what one takes and the multiply-adds of the others, as if nothing ran side by side.
CHECKED, NOISE = (5, 8), 1.1


@pytest.mark.parametrize("storage", ["float32", "bfloat16", *KINDS])
@torch.no_grad()
def bench_by_tokens(storage: str, benchmark: Any) -> None:
    torch.set_num_threads(1)
    dtype = torch.bfloat16 if storage == "bfloat16" else torch.float32

    def kept(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return quantise_blocks(value, storage) if storage in KINDS and value.dim() == 2 else value.to(dtype)

    plans = [
        {name: kept(value) for name, value in given.items()}
        for given in (layer.step_weights() for layer in layers())
    ]
    last = kept(torch.randn(VOCABULARY, DIM))
    room = CONTEXT + max(COUNTS)
    keys, values = (torch.randn(LAYERS, 1, KV_HEADS, room, HEAD_DIM).to(dtype) for _ in range(2))
    lengths = torch.full((1,), CONTEXT)

    def call(count: int) -> Any:
        x = torch.randn(count, DIM).to(dtype)
        span = RotaryTable(HEAD_DIM).span(CONTEXT, CONTEXT + count, torch.device("cpu"))
        cos, sin = (angle.reshape(-1, HEAD_DIM) for angle in span)

        def run() -> None:
            y = x.clone()
            for i, weights in enumerate(plans):
                decoder_step(
                    y, **weights, keys=keys[i], values=values[i], cos=cos, sin=sin, lengths=lengths, drafts=count
                )  # fmt: skip

        return run

    def product(count: int) -> Any:
        x = torch.randn(count, DIM).to(dtype)
        return lambda: torch.ops.arcore.linear_step(x, last, None)

    layer_times = interleaved_seconds({str(n): call(n) for n in COUNTS}, 7)
    last_times = interleaved_seconds({str(n): product(n) for n in COUNTS}, 7)
    matrices = [w for plan in plans for w in plan.values() if isinstance(w, torch.Tensor) and w.dim() > 1]
    read = cpu_seconds(lambda: [w.view(-1).view(torch.float32).sum() for w in matrices], 3)
    numbers = sum(p.numel() for layer in layers() for p in layer.parameters() if p.dim() > 1)
    multiply = 2e-9 * numbers / fma_peak_gflops()
    benchmark.extra_info |= {
        "op": "decoder_step", "case": f"tokens_{storage}", "impl": "arcore", "direction": "by tokens",
        "dtype": storage, "seconds": layer_times["1"],
    }  # fmt: skip
    benchmark.extra_info |= {"storage": storage, "bytes_ms": read * 1e3, "fma_ms_per_token": multiply * 1e3}
    for name, times in (("layers", layer_times), ("last", last_times)):
        one = times["1"]
        benchmark.extra_info[name] = {n: round(t * 1e3, 2) for n, t in times.items()}
        row = "  ".join(f"{n}: {t * 1e3:.1f} ({t / one:.2f})" for n, t in times.items())
        print(f"\n{storage} {name}, ms (times one token)  {row}")
    print(
        f"floors: {read * 1e3:.1f} ms of bytes by torch's sum, {multiply * 1e3:.2f} ms of multiply-adds per token"
    )
    benchmark.pedantic(call(5), rounds=1)
    # Blocks have fewer bytes to hide arithmetic behind.
    for count in CHECKED if storage not in KINDS else ():
        most = NOISE * (layer_times["1"] + (count - 1) * multiply)
        verdict = "ok   " if layer_times[str(count)] <= most else "BELOW"
        print(
            f"{verdict} {storage}, {count} tokens: {layer_times[str(count)] * 1e3:.1f} ms, at most {most * 1e3:.1f}"
        )
