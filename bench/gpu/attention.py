"""block_sparse_attention beside its peers on a GPU: bfloat16, D = 64, TFLOP/s of the pairs that the mask allows.

4 * D per pair and head forward, 10 * D backward. Peers in the same process: FlexAttention compiled with the same mask,
SDPA with a dense bool mask, a loop of SDPA calls without a mask (one per scale or block), and varlen_attn where
the mask is a set of documents.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from report import Report, WrongResultError
from timing import Run, copies_for
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from arcore import masks
from arcore.ops import block_sparse_attention

OP = "block_sparse_attention"
HEAD_DIM = 64
VAR_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
VAR_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
# A multiple of what a peer needs; TFLOP/s that the two kernel families aim at on an H100: forward, backward.
AHEAD_OF_FLEX, AHEAD_OF_LOOP = 1.3, 1.0


@dataclass(frozen=True)
class Case:
    name: str
    mask: masks.IntervalMask
    # (rows, keys) whose unmasked attention, one after the other, equals the masked whole.
    pieces: tuple[tuple[slice, tuple[slice, ...]], ...]
    goal_sm80: tuple[float, float]
    goal_sm90a: tuple[float, float]

    @property
    def documents(self) -> bool:
        return all(keys == (rows,) for rows, keys in self.pieces)

    @property
    def pairs(self) -> int:
        return sum((r.stop - r.start) * sum(k.stop - k.start for k in keys) for r, keys in self.pieces)


def _scales(name: str, scales: tuple[int, ...], markov: bool, *goals: tuple[float, float]) -> Case:
    pieces, start = [], 0
    for side in scales:
        rows = slice(start, start + side * side)
        pieces.append((rows, (slice(start if markov else 0, rows.stop),)))
        start = rows.stop
    mask = (masks.next_scale_markov if markov else masks.next_scale)(scales)
    return Case(name, mask, tuple(pieces), *goals)


def _skip_causal(blocks: int, size: int, *goals: tuple[float, float]) -> Case:
    clean, pieces = blocks * size, []
    for b in range(blocks):
        pieces.append((slice(b * size, (b + 1) * size), (slice(0, (b + 1) * size),)))
    for b in range(blocks):
        noisy = slice(clean + b * size, clean + (b + 1) * size)
        pieces.append((noisy, (slice(0, b * size), noisy) if b else (noisy,)))
    return Case(f"skip_causal_{blocks}x{size}", masks.skip_causal(blocks, size), tuple(pieces), *goals)


def cases(gpu: bool) -> Iterator[Case]:
    if not gpu:
        yield _scales("tiny", (1, 2, 3), False, (0, 0), (0, 0))
        return
    yield _scales("var_512", VAR_512, False, (240, 180), (380, 300))
    yield _scales("hmar_512", VAR_512, True, (200, 150), (300, 230))
    yield _scales("var_256", VAR_256, False, (150, 110), (220, 160))
    yield _skip_causal(4, 256, (260, 190), (400, 320))


Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def _ours(case: Case, device: str) -> Function:
    mask = case.mask.to(device)
    return lambda q, k, v: block_sparse_attention(q, k, v, mask)


def _ours_sm90a(case: Case, device: str) -> Function:
    """The same op with the sm_90a kernels, which `run` switches on for this implementation alone."""
    if device != "cuda" or torch.cuda.get_device_capability() != (9, 0):
        raise RuntimeError("the sm_90a kernels need a GPU of compute capability 9.0")
    if os.environ.get("ARCORE_SM90A_HELD_BACK"):
        raise RuntimeError("no number: the sm_90a kernels were not built, or their tests are red")
    return _ours(case, device)


def _sdpa_mask(case: Case, device: str) -> Function:
    allowed = case.mask.to(device).to_bool()
    return lambda q, k, v: sdpa(q, k, v, attn_mask=allowed)


def _sdpa_loop(case: Case, device: str) -> Function:
    def take(x: Tensor, parts: tuple[slice, ...]) -> Tensor:
        return x[:, :, parts[0]] if len(parts) == 1 else torch.cat([x[:, :, s] for s in parts], dim=2)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs = [sdpa(q[:, :, rows], take(k, keys), take(v, keys)) for rows, keys in case.pieces]
        return torch.cat(outs, dim=2)

    return run


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex(case: Case, device: str, backend: str | None = None) -> Function:
    block_mask = case.mask.to(device).to_block_mask()
    options = {"kernel_options": {"BACKEND": backend}} if backend else {}
    return lambda q, k, v: _compiled_flex()(q, k, v, block_mask=block_mask, **options)


def _flex_flash(case: Case, device: str) -> Function:
    return _flex(case, device, "FLASH")


def _varlen(case: Case, device: str) -> Function:
    if not case.documents:
        raise NotImplementedError("varlen_attn shares no keys between its sequences, as this mask does")
    from torch.nn.attention.varlen import varlen_attn

    lengths = [rows.stop - rows.start for rows, _ in case.pieces]
    ends = torch.tensor([0, *lengths]).cumsum(0)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, n, dim = q.shape
        starts = torch.cat([ends[:-1] + b * n for b in range(batch)] + [torch.tensor([batch * n])])
        bounds = _bounds(tuple(starts.tolist()), device)
        packed = [x.transpose(1, 2).reshape(batch * n, heads, dim) for x in (q, k, v)]
        out = varlen_attn(*packed, bounds, bounds, max(lengths), max(lengths))
        return out.view(batch, n, heads, dim).transpose(1, 2)

    return run


@cache
def _bounds(starts: tuple[int, ...], device: str) -> Tensor:
    return torch.tensor(starts, dtype=torch.int32, device=device)


IMPLEMENTATIONS = {
    "arcore": _ours,
    "arcore_sm90a": _ours_sm90a,
    "flex_compiled": _flex,
    "flex_flash": _flex_flash,
    "sdpa_loop": _sdpa_loop,
    "sdpa_mask": _sdpa_mask,
    "varlen": _varlen,
}


def _check(case: Case, got: list[Tensor], inputs: list[Tensor]) -> None:
    """Output and gradients of the first and the last head against float64."""
    batch, heads = inputs[0].shape[:2]
    allowed = case.mask.to(inputs[0].device.type).to_bool()
    for b, h in ((0, 0), (batch - 1, heads - 1)):
        q, k, v, grad = (x[b, h].detach().double() for x in inputs)
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        logits = (q @ k.T / math.sqrt(HEAD_DIM)).masked_fill(~allowed[0, 0], -math.inf)
        out = torch.softmax(logits, -1) @ v
        expected = [out, *torch.autograd.grad(out, (q, k, v), grad)]
        for name, a, e in zip(("out", "grad_q", "grad_k", "grad_v"), got, expected, strict=False):
            error = ((a[b, h].double() - e).norm() / e.norm()).item()
            if not error <= 1e-2:
                raise WrongResultError(f"{name} of entry {b}, head {h} is off by {error:.1e}")


def _inputs(case: Case, report: Report) -> list[list[Tensor]]:
    shape = (8, 16, case.mask.nq, HEAD_DIM) if report.gpu else (1, 2, case.mask.nq, HEAD_DIM)
    size = 4 * math.prod(shape) * 2
    return [
        [torch.randn(shape, device=report.device).bfloat16() for _ in range(4)]
        for _ in range(copies_for(size, report.device))
    ]


def run(report: Report) -> None:
    for case in cases(report.gpu):
        sets = _inputs(case, report)
        batch, heads = sets[0][0].shape[:2]
        per_pair = case.pairs * HEAD_DIM * batch * heads
        for impl, make in IMPLEMENTATIONS.items():
            os.environ["ARCORE_SM90A"] = "1" if make is _ours_sm90a else "0"
            for i, (direction, factor) in enumerate((("forward", 4), ("backward", 10))):

                def runs(
                    case: Case = case, make: Any = make, sets: Any = sets, direction: str = direction
                ) -> list[Run]:
                    return _runs(case, make(case, report.device), sets, direction)

                flops = factor * per_pair
                report.measure(
                    runs, op=OP, case=case.name, impl=impl, direction=direction, dtype="bfloat16",
                    batch=batch, heads=heads, n=case.mask.nq, head_dim=HEAD_DIM,
                    tflops=lambda s, flops=flops: flops / s / 1e12,
                    fraction_of_matmul=lambda s, flops=flops: flops / s / 1e12 / report.ceilings.matmul_tflops,
                    goal_sm80=case.goal_sm80[i], goal_sm90a=case.goal_sm90a[i],
                )  # fmt: skip
        if report.gpu:
            torch.cuda.empty_cache()


def _runs(case: Case, function: Function, sets: list[list[Tensor]], direction: str) -> list[Run]:
    leaves = [[x.detach().requires_grad_() for x in inputs[:3]] for inputs in sets]
    out = function(*leaves[0])
    got = [out] if direction == "forward" else [out, *torch.autograd.grad(out, leaves[0], sets[0][3])]
    _check(case, got, sets[0])
    if direction == "forward":

        def forward(inputs: list[Tensor]) -> object:
            with torch.no_grad():
                return function(*inputs)

        return [lambda x=x: forward(x) for x in (inputs[:3] for inputs in sets)]
    outs = [function(*x) for x in leaves]
    return [
        lambda o=o, x=x, g=s[3]: torch.autograd.grad(o, x, g, retain_graph=True)
        for o, x, s in zip(outs, leaves, sets, strict=True)
    ]


def verdicts(report: Report) -> list[str]:
    """One line per goal that this run can judge."""
    if not report.gpu:
        return []
    lines = []
    for case in cases(report.gpu):
        for direction in ("forward", "backward"):
            where = {"op": OP, "case": case.name, "direction": direction}
            mine = report.find(impl="arcore", **where)
            if mine is None:
                continue
            for family, impl in (("sm80", "arcore"), ("sm90a", "arcore_sm90a")):
                found = report.find(impl=impl, **where)
                if found is None:
                    continue
                goal = found[f"goal_{family}"]
                lines.append(
                    f"{_verdict(found['tflops'] >= goal)} {case.name} {direction}: {found['tflops']:.0f} TFLOP/s, "
                    f"goal of the {family} kernels {goal}"
                )
            flex = [r for i in ("flex_compiled", "flex_flash") if (r := report.find(impl=i, **where))]
            loop = [r for i in ("sdpa_loop", "varlen") if (r := report.find(impl=i, **where))]
            for peers, least in ((flex, AHEAD_OF_FLEX), (loop, AHEAD_OF_LOOP)):
                if peers:
                    best = min(peers, key=lambda r: r["seconds"])
                    ratio = best["seconds"] / mine["seconds"]
                    lines.append(
                        f"{_verdict(ratio >= least)} {case.name} {direction}: {ratio:.2f} x {best['impl']}, "
                        f"goal {least}"
                    )
    return lines


def _verdict(reached: bool) -> str:
    return "ok   " if reached else "BELOW"
