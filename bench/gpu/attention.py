"""block_sparse_attention beside its peers on a GPU: bfloat16, D = 64, TFLOP/s of the pairs that the mask allows.

4 * D per pair and head forward, 10 * D backward. Peers in the same process: FlexAttention compiled with the same mask,
SDPA with a dense bool mask, a loop of SDPA calls without a mask (one per scale or block), and varlen_attn where
the mask is a set of documents.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from report import Report, wrong_result
from timing import Run, copies_for
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from arcore import masks
from arcore.ops import block_sparse_attention

OP = "block_sparse_attention"
OWN = ("arcore", "arcore_sm90a", "arcore_sm90a_fused")
HEAD_DIM = 64
VAR_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
VAR_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
NEXT_SCALE_521 = (1, 2, 4, 6, 8, 12, 16)  # the mask of pytorch's issue 173933
# Published TFLOP/s, to read beside the dense and causal cases: what, forward, backward.
ANCHORS = (
    ("FlashAttention-3, H100, D 64, dense forward at 2k, 4k, 8k", "460 / 476 / 496", ""),
    ("cuDNN, H200, D 64, window of 1024", "310 to 349", "264 to 300"),
    ("cuDNN, H200, D 128, dense", "633 to 691", "504 to 594"),
)
# Multiples of what peers need: the kernels for every GPU against FlexAttention and against loops of dense calls, the
# sm_90a kernels against the best peer that is right. Beside each case TFLOP/s that both families aim at on one H200.
AHEAD_OF_FLEX, AHEAD_OF_LOOP, AHEAD_OF_BEST = 1.3, 1.0, 1.3


@dataclass(frozen=True)
class Case:
    name: str
    mask: masks.IntervalMask
    # (rows, keys) whose unmasked attention, one after the other, equals the masked whole.
    pieces: tuple[tuple[slice, tuple[slice, ...]], ...]
    goal_sm80: tuple[float, float] = (0.0, 0.0)
    goal_sm90a: tuple[float, float] = (0.0, 0.0)
    head_dim: int = HEAD_DIM
    batch: int = 8
    heads: int = 16
    group: int = 1  # query heads that share a key head

    @property
    def documents(self) -> bool:
        return all(keys == (rows,) for rows, keys in self.pieces)

    @property
    def pairs(self) -> int:
        if self.name.startswith("causal"):
            return self.mask.num_pairs
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


def _causal(n: int, head_dim: int, batch: int) -> Case:
    """Causal attention, for which dense peers have a path of their own."""
    whole = slice(0, n)
    name = f"causal_{n // 1024}k_d{head_dim}"
    return Case(name, masks.causal(n), ((whole, (whole,)),), head_dim=head_dim, batch=batch)


def _varlen_blocks(lengths: tuple[int, ...], head_dim: int) -> Case:
    """Documents of different lengths, each seen whole."""
    pieces, start = [], 0
    for length in lengths:
        rows = slice(start, start + length)
        pieces.append((rows, (rows,)))
        start += length
    mask = masks.documents(list(lengths), causal=False)
    return Case(f"documents_d{head_dim}", mask, tuple(pieces), head_dim=head_dim)


def _varlen_block_causal(documents: tuple[tuple[int, ...], ...], head_dim: int) -> Case:
    """Documents of different lengths, each in blocks that see themselves and those before them."""
    bounds, pieces, start = [], [], 0
    for blocks in documents:
        stop = start
        for size in blocks:
            rows = slice(stop, stop + size)
            stop = rows.stop
            pieces.append((rows, (slice(start, stop),)))
            bounds += [[start, stop]] * size
        start = stop
    mask = masks.IntervalMask(torch.tensor(bounds, dtype=torch.int32).view(1, 1, -1, 2), start)
    return Case(f"varlen_blocks_d{head_dim}", mask, tuple(pieces), head_dim=head_dim)


def cases(gpu: bool) -> Iterator[Case]:
    if not gpu:
        yield _scales("tiny", (1, 2, 3), False, (0, 0), (0, 0))
        yield replace(_varlen_block_causal(((4, 3), (5,)), 64), name="tiny_blocks_gqa", group=2)
        return
    yield _scales("var_512", VAR_512, False, (240, 180), (380, 260))
    yield _scales("hmar_512", VAR_512, True, (200, 150), (300, 200))
    yield _scales("var_256", VAR_256, False, (150, 110), (220, 150))
    yield _skip_causal(4, 256, (260, 190), (400, 280))
    # Beyond the goals: the other head dims, lengths and masks that people ask for.
    for case in (_scales("var_512", VAR_512, False), _skip_causal(4, 256)):
        yield replace(case, name=f"{case.name}_d128", head_dim=128, heads=10)
    yield replace(_scales("next_scale_521", NEXT_SCALE_521, False), head_dim=72, heads=10)
    yield _varlen_blocks((100, 700, 256, 992, 1500, 548), 64)
    yield _varlen_block_causal(((256,) * 4, (64,) * 5, (512, 256, 256), (100, 28) * 4), 64)
    for n, batch in ((2048, 8), (4096, 5), (8192, 5)):
        yield _causal(n, 64, batch)
    yield _causal(4096, 128, 5)
    yield replace(_causal(4096, 128, 5), name="causal_4k_d128_gqa", group=4)


Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def _ours(case: Case, device: str) -> Function:
    mask = case.mask.to(device)
    return lambda q, k, v: block_sparse_attention(q, k, v, mask)


def _ours_sm90a(case: Case, device: str) -> Function:
    """The same op with the sm_90a kernels, which `run` switches on for this implementation alone."""
    if device != "cuda" or torch.cuda.get_device_capability() != (9, 0):
        raise RuntimeError("the sm_90a kernels need a GPU of compute capability 9.0")
    return _ours(case, device)


def _ours_fused(case: Case, device: str) -> Function:
    """The sm_90a kernels with the backward of five products; its forward is theirs."""
    return _ours_sm90a(case, device)


def _shared(case: Case) -> dict[str, bool]:
    """What torch's functions are told where query heads share a key head."""
    return {"enable_gqa": True} if case.group > 1 else {}


def _sdpa_mask(case: Case, device: str) -> Function:
    allowed = case.mask.to(device).to_bool()
    return lambda q, k, v: sdpa(q, k, v, attn_mask=allowed, **_shared(case))


def _take(x: Tensor, parts: tuple[slice, ...], dim: int = 2) -> Tensor:
    chosen = [x.narrow(dim, s.start, s.stop - s.start) for s in parts]
    return chosen[0] if len(parts) == 1 else torch.cat(chosen, dim=dim)


def _flash_loop(case: Case, attention: Callable[..., Any]) -> Function:
    """A FlashAttention of [B, N, H, D] tensors, without a mask for each piece, or once where the mask is causal."""
    causal = case.name.startswith("causal")

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        if causal:
            outs = [attention(q, k, v, causal=True)]
        else:
            outs = [
                attention(_take(q, (rows,), 1), _take(k, keys, 1), _take(v, keys, 1))
                for rows, keys in case.pieces
            ]
        # Some versions return the logarithms of the sums beside the output.
        return torch.cat([o[0] if isinstance(o, tuple) else o for o in outs], dim=1).transpose(1, 2)

    return run


def _flash3(case: Case, device: str) -> Function:
    """FlashAttention-3, the package of its folder `hopper`; there is a wheel for few versions of torch."""
    from flash_attn_interface import flash_attn_func

    return _flash_loop(case, flash_attn_func)


def _flash4(case: Case, device: str) -> Function:
    """FlashAttention-4, written in CuTe's Python language."""
    from flash_attn.cute import flash_attn_func

    return _flash_loop(case, flash_attn_func)


def _sdpa_loop(case: Case, device: str, backend: str | None = None) -> Function:
    if case.name.startswith("causal"):
        raise NotImplementedError("a causal mask is no set of pieces without a mask")
    piece = partial(sdpa, **_shared(case))

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if backend is None:
            outs = [piece(q[:, :, rows], _take(k, keys), _take(v, keys)) for rows, keys in case.pieces]
            return torch.cat(outs, dim=2)
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel([getattr(SDPBackend, backend)]):
            outs = [piece(q[:, :, rows], _take(k, keys), _take(v, keys)) for rows, keys in case.pieces]
        return torch.cat(outs, dim=2)

    return run


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex(case: Case, device: str, backend: str | None = None) -> Function:
    block_mask = case.mask.to(device).to_block_mask()
    options: dict[str, Any] = {"kernel_options": {"BACKEND": backend}} if backend else {}
    options |= _shared(case)
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


def _sdpa_causal(case: Case, device: str) -> Function:
    if not case.name.startswith("causal"):
        raise NotImplementedError("the mask is not causal")
    return lambda q, k, v: sdpa(q, k, v, is_causal=True, **_shared(case))


def _cudnn_flex(case: Case, device: str) -> Function:
    """cudnn.flex_attention of nvidia-cudnn-frontend: the same unions of key intervals, in [B, N, H, D]."""
    from cudnn.flex_attention import create_mask_plan, flex_attn_func

    plans: dict[torch.Size, Any] = {}

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
        if q.shape not in plans:
            endpoints = case.mask.to(device).to_cudnn(q.shape[0])
            plans[q.shape] = create_mask_plan(endpoints, *rows, build_backward=True)
        out: Tensor = flex_attn_func(*rows, mask_plan=plans[q.shape])
        return out.transpose(1, 2)

    return run


IMPLEMENTATIONS = {
    "arcore": _ours,
    "arcore_sm90a": _ours_sm90a,
    "arcore_sm90a_fused": _ours_fused,
    "flex_compiled": _flex,
    "flex_flash": _flex_flash,
    "flash3": _flash3,
    "flash4": _flash4,
    "sdpa_loop": _sdpa_loop,
    "sdpa_loop_cudnn": lambda case, device: _sdpa_loop(case, device, "CUDNN_ATTENTION"),
    "sdpa_loop_flash": lambda case, device: _sdpa_loop(case, device, "FLASH_ATTENTION"),
    "sdpa_loop_efficient": lambda case, device: _sdpa_loop(case, device, "EFFICIENT_ATTENTION"),
    "sdpa_causal": _sdpa_causal,
    "cudnn_flex": _cudnn_flex,
    "sdpa_mask": _sdpa_mask,
    "varlen": _varlen,
}


def _check(case: Case, got: list[Tensor], inputs: list[Tensor]) -> None:
    """Output and gradients of the first and the last key head, with its query heads, against float64."""
    batch, kv_heads = inputs[1].shape[:2]
    allowed = case.mask.to(inputs[0].device.type).to_bool()
    for b, h in ((0, 0), (batch - 1, kv_heads - 1)):
        mine = slice(h * case.group, (h + 1) * case.group)
        places = {"out": mine, "grad_q": mine, "grad_k": h, "grad_v": h}
        q, grad = (x[b, mine].detach().double() for x in (inputs[0], inputs[3]))
        k, v = (x[b, h].detach().double() for x in inputs[1:3])
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        logits = (q @ k.T / math.sqrt(case.head_dim)).masked_fill(~allowed[0, 0], -math.inf)
        out = torch.softmax(logits, -1) @ v
        expected = [out, *torch.autograd.grad(out, (q, k, v), grad)]
        for (name, place), a, e in zip(places.items(), got, expected, strict=False):
            error = ((a[b, place].double() - e).norm() / e.norm()).item()
            if not error <= 1e-2:
                wrong_result(f"{name} of entry {b}, key head {h} is off by {error:.1e}")


LAUNCHES = 100  # a race in a backward shows in some of many launches


def _same_again(function: Function, leaves: list[Tensor], grad: Tensor, first: list[Tensor]) -> None:
    """The gradients of LAUNCHES more launches: other orders of sums may differ by rounding, races by more."""
    worst = torch.zeros((), device=grad.device)
    out = function(*leaves)
    for _ in range(LAUNCHES if grad.device.type == "cuda" else 2):
        for a, b in zip(torch.autograd.grad(out, leaves, grad, retain_graph=True), first, strict=True):
            worst = torch.maximum(worst, (a.float() - b.float()).norm() / b.float().norm())
    if not worst.item() <= 1e-2:
        wrong_result(f"gradients change by {worst.item():.1e} between launches")


def _inputs(case: Case, report: Report) -> list[list[Tensor]]:
    batch, heads = (case.batch, case.heads) if report.gpu else (1, 2)
    shape = (batch, heads, case.mask.nq, case.head_dim)
    of_keys = (batch, heads // case.group, case.mask.nk, case.head_dim)
    shapes = (shape, of_keys, of_keys, shape)
    size = 2 * sum(map(math.prod, shapes))
    return [
        [torch.randn(s, device=report.device).bfloat16() for s in shapes]
        for _ in range(copies_for(size, report.device))
    ]


def run(report: Report) -> None:
    for case in cases(report.gpu):
        sets = _inputs(case, report)
        batch, heads = sets[0][0].shape[:2]
        per_pair = case.pairs * case.head_dim * batch * heads
        for impl, make in IMPLEMENTATIONS.items():
            if report.wanted is not None and impl not in report.wanted:
                continue
            # "require": a number of the sm_90a kernels is theirs.
            os.environ["ARCORE_SM90A"] = "require" if make in (_ours_sm90a, _ours_fused) else "0"
            os.environ["ARCORE_SM90A_BACKWARD"] = "fused" if make is _ours_fused else "two"
            for i, (direction, factor) in enumerate((("forward", 4), ("backward", 10))):
                if make is _ours_fused and direction == "forward":
                    continue

                def runs(
                    case: Case = case, make: Any = make, sets: Any = sets, direction: str = direction
                ) -> list[Run]:
                    return _runs(case, make(case, report.device), sets, direction)

                flops = factor * per_pair
                # Small cases are a matter of launches.
                small = report.gpu and case.mask.nq <= 1024
                report.measure(
                    runs, graph=small, op=OP, case=case.name, impl=impl, direction=direction, dtype="bfloat16",
                    batch=batch, heads=heads, n=case.mask.nq, head_dim=case.head_dim, group=case.group,
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
    if direction == "backward" and case.mask.nq <= 3000:
        _same_again(function, leaves[0], sets[0][3], got[1:])
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
    lines = [f"published: {what}: {forward} forward, {backward or 'no'} backward TFLOP/s"
             for what, forward, backward in ANCHORS]  # fmt: skip
    for case in cases(report.gpu):
        if case.goal_sm80 == (0.0, 0.0):
            continue
        for direction in ("forward", "backward"):
            where = {"op": OP, "case": case.name, "direction": direction}
            mine = report.find(impl="arcore", **where)
            if mine is None:
                continue
            own = [record for impl in OWN if (record := report.find(impl=impl, **where))]
            for found in own:
                name = "sm80" if found is mine else found["impl"].removeprefix("arcore_")
                goal = found["goal_sm80" if found is mine else "goal_sm90a"]
                lines.append(
                    f"{_verdict(found['tflops'] >= goal)} {case.name} {direction}: {found['tflops']:.0f} TFLOP/s, "
                    f"goal of the {name} kernels {goal}"
                )
            two, fused = (report.find(impl=impl, **where) for impl in OWN[1:])
            if two and fused:
                lines.append(
                    f"      {case.name} {direction}: fused {two['seconds'] / fused['seconds']:.2f} x the two kernels"
                )
            fastest = min(own[1:] or own, key=lambda record: record["seconds"])
            rivals = [r for i in IMPLEMENTATIONS if i not in OWN and (r := report.find(impl=i, **where))]
            if rivals:
                best = min(rivals, key=lambda r: r["seconds"])
                ratio = best["seconds"] / fastest["seconds"]
                lines.append(
                    f"{_verdict(ratio >= AHEAD_OF_BEST)} {case.name} {direction}: {fastest['impl']} {ratio:.2f} x the "
                    f"best peer, {best['impl']}, goal {AHEAD_OF_BEST}"
                )
            flex = [r for i in ("flex_compiled", "flex_flash") if (r := report.find(impl=i, **where))]
            loop = [
                r
                for i in ("sdpa_loop", "sdpa_loop_cudnn", "sdpa_loop_flash", "varlen", "cudnn_flex")
                if (r := report.find(impl=i, **where))
            ]
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
