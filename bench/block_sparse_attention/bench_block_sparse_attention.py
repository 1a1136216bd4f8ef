"""block_sparse_attention beside its peers on CPU: `pytest bench/block_sparse_attention --benchmark-json=out.json`.

H=4, D=64, one thread, process CPU time. GFLOP/s counts only the pairs that the mask allows: 4 * D per pair and head
forward, 10 * D backward, 14 * D for output and tangent (jvp). Peers: SDPA with a dense bool mask, an SDPA loop over the
scales (or blocks) without any mask, compiled FlexAttention (its CPU backend has no backward), SDPA is_causal. Every
implementation is compared with a float64 result before it is timed; one that is wrong prints no number.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from measure import cpu_seconds, peak_extra_bytes
from torch import Tensor
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention as sdpa

from arcore import masks
from arcore.ops import block_sparse_attention

HEADS, HEAD_DIM = 4, 64
VAR_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
VAR_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)

# (rows, keys) slices whose unmasked attention, one after another, equals the masked whole.
Pieces = list[tuple[slice, list[slice]]]


@dataclass(frozen=True)
class Case:
    name: str
    mask: masks.IntervalMask | masks.TreeMask
    pieces: Pieces
    causal: bool = False

    @property
    def n(self) -> int:
        return self.mask.nq


def _scales(name: str, scales: tuple[int, ...], markov: bool) -> Case:
    pieces: Pieces = []
    start = 0
    for side in scales:
        rows = slice(start, start + side * side)
        pieces.append((rows, [slice(start if markov else 0, rows.stop)]))
        start = rows.stop
    return Case(name, (masks.next_scale_markov if markov else masks.next_scale)(scales), pieces)


def _skip_causal(blocks: int, size: int) -> Case:
    clean, pieces = blocks * size, []
    for b in range(blocks):
        pieces.append((slice(b * size, (b + 1) * size), [slice(0, (b + 1) * size)]))
    for b in range(blocks):
        noisy = slice(clean + b * size, clean + (b + 1) * size)
        pieces.append((noisy, [slice(0, b * size), noisy]))
    return Case(f"skip_causal_{blocks}x{size}", masks.skip_causal(blocks, size), pieces)


def _tree(nodes: int, keys: int) -> Case:
    """A random tree behind a long prefix, as drafts are verified."""
    draws = torch.rand(nodes, generator=torch.Generator().manual_seed(0))
    parents = (draws * (torch.arange(nodes) + 1)).long() - 1
    return Case(f"tree_{nodes}x{keys}", masks.tree(parents, keys - nodes), [])


@cache
def cases() -> dict[str, Case]:
    made = [
        _scales("next_scale_2240", VAR_512, False),
        _scales("next_scale_markov_2240", VAR_512, True),
        _scales("next_scale_680", VAR_256, False),
        _scales("next_scale_markov_680", VAR_256, True),
        _skip_causal(4, 256),
        Case("causal_2048", masks.causal(2048), [], causal=True),
        _tree(64, 4096),
    ]
    return {case.name: case for case in made}


@cache
def allowed(name: str) -> Tensor:
    return cases()[name].mask.to_bool()


@cache
def pairs(name: str) -> int:
    return int(allowed(name).sum())


@cache
def inputs(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = cases()[name].mask
    lengths = (mask.nq, mask.nk, mask.nk, mask.nq)
    return tuple(  # type: ignore[return-value]
        torch.randn(1, HEADS, n, HEAD_DIM, generator=generator).to(dtype) for n in lengths
    )


def ours(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return block_sparse_attention(q, k, v, case.mask)


def sdpa_mask(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v, attn_mask=allowed(case.name))


def sdpa_loop(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    parts = []
    for rows, keys in case.pieces:
        ks = k[:, :, keys[0]] if len(keys) == 1 else torch.cat([k[:, :, s] for s in keys], dim=2)
        vs = v[:, :, keys[0]] if len(keys) == 1 else torch.cat([v[:, :, s] for s in keys], dim=2)
        parts.append(sdpa(q[:, :, rows], ks, vs))
    return torch.cat(parts, dim=2)


def sdpa_causal(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v, is_causal=True)


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)


@cache
def _block_mask(name: str):
    return cases()[name].mask.to_block_mask()


def flex(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _compiled_flex()(q, k, v, block_mask=_block_mask(case.name))


IMPLEMENTATIONS: dict[str, Callable[[Case, Tensor, Tensor, Tensor], Tensor]] = {
    "arcore": ours,
    "sdpa_mask": sdpa_mask,
    "sdpa_loop": sdpa_loop,
    "sdpa_causal": sdpa_causal,
    "flex_compiled": flex,
}


# What arcore must reach as a multiple of a peer's GFLOP/s in the same run (case, direction, dtype, peer, multiple).
# "arcore float32" compares with arcore's own float32.
FLOORS = [
    ("next_scale_2240", "forward", "float32", "sdpa_loop", 1.15),
    ("next_scale_2240", "forward", "float32", "sdpa_mask", 1.9),
    ("next_scale_2240", "forward", "float32", "flex_compiled", 2.0),
    ("next_scale_markov_2240", "forward", "float32", "sdpa_loop", 1.1),
    ("next_scale_markov_2240", "forward", "float32", "sdpa_mask", 3.7),
    ("next_scale_680", "forward", "float32", "sdpa_loop", 1.3),
    ("next_scale_markov_680", "forward", "float32", "sdpa_loop", 1.4),
    ("next_scale_markov_680", "forward", "float32", "sdpa_mask", 4.5),
    ("next_scale_2240", "backward", "float32", "sdpa_loop", 1.15),
    ("next_scale_2240", "backward", "float32", "sdpa_mask", 1.7),
    ("next_scale_680", "backward", "float32", "sdpa_loop", 1.35),
    ("next_scale_680", "backward", "float32", "sdpa_mask", 1.7),
    ("next_scale_markov_2240", "backward", "float32", "sdpa_loop", 1.2),
    ("next_scale_markov_2240", "backward", "float32", "sdpa_mask", 3.6),
    ("skip_causal_4x256", "forward", "float32", "sdpa_mask", 4.5),
    ("tree_64x4096", "forward", "float32", "sdpa_mask", 1.2),
    # SDPA's own backward has a unit for bfloat16 on some machines and none on others, where the multiple is above 6.
    ("next_scale_2240", "backward", "bfloat16", "sdpa_mask", 3.0),
    ("next_scale_680", "backward", "bfloat16", "sdpa_mask", 3.0),
    ("next_scale_680", "jvp", "float32", "sdpa_mask", 3.0),
    ("causal_2048", "forward", "float32", "sdpa_causal", 1.0),
    ("causal_2048", "backward", "float32", "sdpa_causal", 1.0),
]


# The same for bfloat16, without a unit for it and with one.
BF16_FLOORS = {
    False: [
        ("next_scale_2240", "forward", "bfloat16", "arcore float32", 0.85),
        ("next_scale_680", "forward", "bfloat16", "arcore float32", 0.85),
    ],
    True: [
        ("next_scale_2240", "forward", "bfloat16", "arcore float32", 1.6),
        ("next_scale_2240", "backward", "bfloat16", "arcore float32", 1.4),
        ("tree_64x4096", "forward", "bfloat16", "sdpa_mask", 1.4),
    ],
}


def _applies(impl: str, case: str, direction: str, dtype: str) -> bool:
    if impl == "sdpa_causal":
        return case.startswith("causal")
    if impl == "sdpa_loop":
        return not case.startswith(("causal", "tree"))
    if impl == "flex_compiled":
        return direction == "forward" and dtype == "float32" and case.startswith("next_scale")
    return True


def _figure(r: dict) -> str:
    name = f"{r['case']} {r['direction']} {r['dtype']}"
    return (
        f"{name:<44} {r['impl']:<14} {r['gflops']:7.1f}  {r['fraction_of_peak']:6.1%} of peak"
        f"  +{r['peak_extra_mib']:.1f} MiB (q, k, v, out: {r['qkvo_mib']} MiB)"
    )


def floors_report(records: list[dict]) -> list[str]:
    """One line per figure, and one per floor that this run can judge."""
    records = [r for r in records if r.get("op") == "block_sparse_attention"]
    if not records:
        return []
    lines = [
        f"GFLOP/s of allowed pairs; measured FMA peak of one core: {records[0]['peak_gflops']} GFLOP/s",
        *(_figure(r) for r in records),
    ]
    gflops = {(r["case"], r["direction"], r["dtype"], r["impl"]): r["gflops"] for r in records}
    unit = torch.ops.arcore.cpu_bf16()
    if any("matmul_gflops" in r for r in records):
        rate = max(r.get("matmul_gflops", 0.0) for r in records)
        lines.insert(1, f"bfloat16 unit in use: {unit}; torch.matmul in bfloat16: {rate} GFLOP/s")
    for case, direction, dtype, peer, multiple in [*FLOORS, *BF16_FLOORS[unit != "none"]]:
        mine = gflops.get((case, direction, dtype, "arcore"))
        own = peer == "arcore float32"
        other = gflops.get((case, direction, "float32", "arcore") if own else (case, direction, dtype, peer))
        if mine is None or other is None:
            continue
        verdict = "ok   " if mine >= multiple * other else "BELOW"
        lines.append(
            f"{verdict} {case} {direction} {dtype}: {mine:6.1f} GFLOP/s = {mine / other:5.2f} x {peer} "
            f"({other:.1f}), floor {multiple}"
        )
    return lines


def _parameters() -> list:
    names = ["next_scale_2240", "next_scale_markov_2240", "next_scale_680", "next_scale_markov_680",
             "skip_causal_4x256", "causal_2048", "tree_64x4096"]  # fmt: skip
    chosen = [("next_scale_680", "jvp", "float32", impl) for impl in ("arcore", "sdpa_mask")]
    chosen += [
        (case, direction, dtype, impl)
        for case in names
        for direction in ("forward", "backward")
        for dtype in ("float32", "bfloat16")
        for impl in IMPLEMENTATIONS
        if _applies(impl, case, direction, dtype)
        and (dtype == "float32" or case.endswith(("e_680", "e_2240", "x4096")))
    ]
    return [pytest.param(*c, id="-".join(c)) for c in chosen]


@cache
def _bf16_matmul_gflops() -> float:
    """What torch reaches in a square product of the machine's bfloat16 unit."""
    x = torch.randn(1024, 1024).bfloat16()
    return 2 * 1024**3 / cpu_seconds(lambda: x @ x) / 1e9


def _check(case: Case, result: Tensor, direction: str, dtype: torch.dtype) -> None:
    q, k, v, grad = (x.double() for x in inputs(case.name, dtype))
    q.requires_grad_(direction == "backward")

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = q @ k.transpose(-1, -2) / math.sqrt(HEAD_DIM)
        return torch.softmax(logits.masked_fill(~allowed(case.name), -math.inf), dim=-1) @ v

    expected = jvp(dense, (q, k, v), (grad, v, k))[1] if direction == "jvp" else dense(q, k, v)
    if direction == "backward":
        (expected,) = torch.autograd.grad(expected, q, grad)
    tolerance = (1e-5 if dtype == torch.float32 else 3e-2) * max(1.0, expected.abs().max().item())
    error = (result.double() - expected).abs().max().item()
    assert error <= tolerance, f"wrong result (error {error:.2e} > {tolerance:.2e}): no number for it"


@pytest.mark.parametrize(("case_name", "direction", "dtype_name", "impl"), _parameters())
def bench_attention(benchmark, peak_gflops, case_name, direction, dtype_name, impl):
    case, dtype = cases()[case_name], getattr(torch, dtype_name)
    q, k, v, grad = inputs(case_name, dtype)
    function = IMPLEMENTATIONS[impl]
    if direction == "forward":

        def run() -> Tensor:
            with torch.no_grad():
                return function(case, q, k, v)

    elif direction == "jvp":
        # Of SDPA, only the formula in ATen's own operations has a forward mode.
        def run() -> Tensor:
            with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
                return jvp(lambda *x: function(case, *x), (q, k, v), (grad, v, k))[1]

    else:
        q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
        out = function(case, q, k, v)

        def run() -> Tensor:
            return torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)[0]

    _check(case, run(), direction, dtype)
    slow = dtype == torch.bfloat16 and direction == "backward" and impl != "arcore"
    benchmark.group = f"{case_name} {direction} {dtype_name}"
    benchmark._timer = time.process_time
    rounds = 2 if slow else 41 if case.n < 1000 else 11
    benchmark.pedantic(run, rounds=rounds, iterations=1, warmup_rounds=0 if slow else 2)
    # jvp: the products of the output and of its tangent.
    flops = {"forward": 4, "backward": 10, "jvp": 14}[direction] * pairs(case_name) * HEAD_DIM * HEADS
    gflops = flops / benchmark.stats.stats.median / 1e9
    if dtype == torch.bfloat16:
        benchmark.extra_info["matmul_gflops"] = round(_bf16_matmul_gflops(), 1)
    benchmark.extra_info.update(
        op="block_sparse_attention", case=case_name, impl=impl, direction=direction, dtype=dtype_name,
        gflops=round(gflops, 2), peak_gflops=round(peak_gflops, 1), fraction_of_peak=round(gflops / peak_gflops, 3),
        peak_extra_mib=round(peak_extra_bytes(run) / 2**20, 2),
        qkvo_mib=round(4 * q.numel() * q.element_size() / 2**20, 2),
    )  # fmt: skip
