"""ssd beside its peers on CPU: `pytest bench/ssd --benchmark-json=out.json`.

Mamba-2-130m's sizes: 24 heads of 64 channels, 128 states, one group, fp32, D, bias and softplus. One thread, process
CPU time. Peers: transformers' own chunked scan, with the chunk size of the published models, and our step-by-step
`selective_scan` with everything written out per channel. The floor is the FMA peak, measured in the same run. Every
implementation is compared with a float64 result before it is timed.

`bench_ssd_bf16`: bfloat16 x, dt, B and C beside the same in float32, in turns, at the sizes of Mamba-2-130m and -2.7b;
where the processor has units for products of bfloat16 they are to pay (BF16_FLOORS).
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from measure import cpu_seconds, interleaved_seconds, peak_extra_bytes
from torch import Tensor

from arcore.ops import reference_ssd, selective_scan, ssd

HEADS, DIM, STATES = 24, 64, 128
LENGTHS = (128, 1024)
CHUNK = 64
# Heads of the published models of those names; their other sizes are the same.
SIZES = {"130m": HEADS, "2.7b": 80}
# How many times float32's speed on a bfloat16 unit.
BF16_FLOORS = {"forward": 1.6, "backward": 1.4}


@cache
def inputs(length: int, heads: int = HEADS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "x": normal(1, length, heads, DIM),
        "dt": normal(1, length, heads),
        "A": -torch.rand(heads, generator=generator) * 4,
        "B": normal(1, length, 1, STATES),
        "C": normal(1, length, 1, STATES),
        "D": normal(heads),
        "dt_bias": normal(heads) * 0.1,
    }


def ours(v: dict[str, Tensor]) -> Tensor:
    return ssd(v["x"], v["dt"], v["A"], v["B"], v["C"], v["D"], None, v["dt_bias"], True)


def by_steps(v: dict[str, Tensor]) -> Tensor:
    x = v["x"]
    out = selective_scan(
        x.flatten(2).transpose(1, 2),
        v["dt"][..., None].expand(x.shape).flatten(2).transpose(1, 2),
        v["A"].repeat_interleave(DIM)[:, None].expand(-1, STATES),
        *(v[k].permute(0, 2, 3, 1) for k in ("B", "C")),
        v["D"].repeat_interleave(DIM),
        None,
        v["dt_bias"].repeat_interleave(DIM),
        delta_softplus=True,
    )
    return out.transpose(1, 2).unflatten(2, (HEADS, DIM))


def transformers_chunks(v: dict[str, Tensor]) -> Tensor:
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    out = mamba2_chunk_scan(
        *(v[k] for k in ("x", "dt", "A", "B", "C")),
        chunk_size=256,
        D=v["D"],
        dt_bias=v["dt_bias"],
        dt_softplus=True,
    )
    return out[0] if isinstance(out, tuple) else out


IMPLEMENTATIONS = {"arcore": ours, "transformers": transformers_chunks, "selective_scan": by_steps}


def flops(length: int, heads: int = HEADS) -> int:
    """Multiply-adds times two: C H and u B per step, M u up to the diagonal, C B once per four heads."""
    per_head = 4 * DIM * STATES + DIM * CHUNK + STATES * CHUNK // 4
    return length * heads * per_head


def floors_report(records: list[dict]) -> list[str]:
    own = {(r["case"], r["direction"], r["impl"]): r for r in records if r.get("op") == "ssd"}
    lines = []
    for (case, direction, impl), r in own.items():
        if impl != "arcore":
            continue
        peers = [
            f"{own[case, direction, peer]['seconds'] / r['seconds']:.1f} x faster than {peer} "
            f"({own[case, direction, peer]['seconds'] * 1e3:.1f} ms)"
            for peer in IMPLEMENTATIONS
            if peer != "arcore" and (case, direction, peer) in own
        ]
        peak = f", {r['gflops'] / r['peak_gflops']:.0%} of the FMA peak" if r.get("peak_gflops") else ""
        lines.append(f"{case} {direction}: {r['seconds'] * 1e3:.2f} ms{peak}; {'; '.join(peers)}")
        if "float32_seconds" in r:
            ratio = r["float32_seconds"] / r["seconds"]
            floor = BF16_FLOORS[direction] if r["unit"] != "none" else 0.9
            verdict = "ok   " if ratio >= floor else "BELOW"
            lines.append(
                f"{verdict} {case} {direction}: {ratio:.2f} x float32, floor {floor} (unit: {r['unit']})"
            )
    return lines


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.filterwarnings("ignore")
def bench_ssd(benchmark, peak_gflops: float, length: int, direction: str, impl: str):
    if impl == "transformers":
        pytest.importorskip("transformers")
    f, v = IMPLEMENTATIONS[impl], inputs(length)
    exact = {key: t.double() for key, t in v.items()}
    expected = reference_ssd(
        *(exact[k] for k in ("x", "dt", "A", "B", "C", "D")), None, exact["dt_bias"], dt_softplus=True
    )
    with torch.no_grad():
        error = (f(v).double() - expected).abs().max().item()
    assert error <= 1e-5 * expected.abs().max().item(), f"wrong result (error {error:.2e}): no number for it"
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    leaves = {k: t.clone().requires_grad_() if k in ("x", "dt", "B", "C") else t for k, t in v.items()}

    def forward() -> object:
        with torch.no_grad():
            return f(v)

    def both() -> object:
        return torch.autograd.grad(f(leaves), [t for t in leaves.values() if t.requires_grad], grad)

    run = forward if direction == "forward" else both
    seconds = cpu_seconds(run, rounds=9 if impl == "arcore" else 3)
    counted = direction == "forward" and impl == "arcore"
    benchmark.extra_info.update(
        op="ssd",
        case=f"mamba2_130m_{length}",
        direction=direction,
        impl=impl,
        seconds=seconds,
        peak_extra_mib=round(peak_extra_bytes(run) / 2**20, 1),
        **({"gflops": flops(length) / seconds / 1e9, "peak_gflops": peak_gflops} if counted else {}),
    )
    benchmark.group = f"ssd mamba2_130m_{length} {direction}"
    benchmark.pedantic(run, rounds=3)


@pytest.mark.parametrize("direction", BF16_FLOORS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.filterwarnings("ignore")
def bench_ssd_bf16(benchmark, size: str, direction: str):
    heads, length = SIZES[size], LENGTHS[-1]
    exact = {key: t.double() for key, t in inputs(length, heads).items()}
    expected = reference_ssd(
        *(exact[k] for k in ("x", "dt", "A", "B", "C", "D")), None, exact["dt_bias"], dt_softplus=True
    )
    runs = {}
    for dtype in (torch.float32, torch.bfloat16):
        v = {k: t.to(dtype) if k in ("x", "dt", "B", "C") else t for k, t in inputs(length, heads).items()}
        leaves = [v[k].requires_grad_() for k in ("x", "dt", "B", "C")] if direction == "backward" else []
        with torch.set_grad_enabled(direction == "backward"):
            out = ours(v)
        error = (out.double() - expected).abs().max().item()
        assert error <= (1e-5 if dtype == torch.float32 else 2e-2) * expected.abs().max().item()
        grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        runs[dtype] = (
            (
                lambda out=out, leaves=leaves, grad=grad: torch.autograd.grad(
                    out, leaves, grad, retain_graph=True
                )
            )
            if direction == "backward"
            else (lambda v=v: ours(v))
        )
    with torch.set_grad_enabled(direction == "backward"):
        seconds = interleaved_seconds({str(k): f for k, f in runs.items()}, rounds=15)
        extra = peak_extra_bytes(runs[torch.bfloat16])
    benchmark.extra_info.update(
        op="ssd",
        case=f"mamba2_{size}_{length}_bfloat16",
        direction=direction,
        impl="arcore",
        dtype="bfloat16",
        seconds=seconds["torch.bfloat16"],
        float32_seconds=seconds["torch.float32"],
        unit=torch.ops.arcore.cpu_bf16(),
        peak_extra_mib=round(extra / 2**20, 1),
        **(
            {"gflops": flops(length, heads) / seconds["torch.bfloat16"] / 1e9}
            if direction == "forward"
            else {}
        ),
    )
    benchmark.group = f"ssd mamba2_{size}_{length} {direction} bfloat16"
    benchmark.pedantic(lambda: None, rounds=1)
