"""Inputs and tolerances shared by the tests of ssd."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from arcore.ops import reference_ssd, ssd
from arcore.ops._ssd_backward import segments

FLOATS = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")
# What has a time axis, the second.
ALONG_TIME = ("x", "dt", "B", "C", "z", "grad_out")


@dataclass(frozen=True)
class Case:
    """Everything that one call takes."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    seq_idx: Tensor | None
    dt_softplus: bool
    dt_limit: tuple[float, float]
    reverse: bool
    grad_out: Tensor
    grad_last_state: Tensor

    def floats(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in FLOATS if getattr(self, name) is not None}

    def map(self, f: Callable[[str, Tensor], Tensor]) -> Case:
        """The case with `f` applied to every float tensor."""
        names = [x.name for x in fields(self) if isinstance(getattr(self, x.name), Tensor)]
        names = [n for n in names if n not in ("cu_seqlens", "seq_idx")]
        return replace(self, **{name: f(name, getattr(self, name)) for name in names})

    def to(self, dtype: torch.dtype) -> Case:
        return self.map(lambda _, t: t.to(dtype))


def make_case(
    batch: int = 2,
    length: int = 70,
    heads: int = 6,
    dim: int = 20,
    state: int = 16,
    groups: int = 2,
    *,
    skip: str | None = "channel",
    gate: bool = True,
    bias: bool = True,
    softplus: bool = True,
    limit: tuple[float, float] = (0.0, math.inf),
    initial: bool = False,
    lengths: list[int] | None = None,
    ids: Tensor | None = None,
    reverse: bool = False,
    seed: int = 0,
) -> Case:
    """A random case; skip is "channel", "head" or None."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    if lengths is not None:
        batch, length = 1, sum(lengths)
    rows = batch if lengths is None else len(lengths)
    dt = normal(batch, length, heads) * 0.5
    return Case(
        x=normal(batch, length, heads, dim),
        dt=dt if softplus else dt.abs(),
        A=-torch.rand(heads, generator=generator) * 4,
        B=normal(batch, length, groups, state),
        C=normal(batch, length, groups, state),
        D={"channel": normal(heads, dim), "head": normal(heads), None: None}[skip],
        z=normal(batch, length, heads, dim) if gate else None,
        dt_bias=normal(heads).abs() * 0.2 if bias else None,
        initial_state=normal(rows, heads, dim, state) if initial else None,
        cu_seqlens=None if lengths is None else torch.tensor([0, *lengths]).cumsum(0).int(),
        seq_idx=ids,
        dt_softplus=softplus,
        dt_limit=limit,
        reverse=reverse,
        grad_out=normal(batch, length, heads, dim),
        grad_last_state=normal(rows, heads, dim, state),
    )


def call(f: Callable[..., tuple[Tensor, Tensor]], case: Case) -> tuple[Tensor, Tensor]:
    return f(
        *(case.x, case.dt, case.A, case.B, case.C, case.D, case.z, case.dt_bias, case.dt_softplus, True),
        dt_limit=case.dt_limit,
        initial_state=case.initial_state,
        cu_seqlens=case.cu_seqlens,
        seq_idx=case.seq_idx,
        reverse=case.reverse,
    )


def by_selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Any, z: Any, bias: Any, softplus: bool, last: bool,
    *, dt_limit: tuple[float, float], initial_state: Tensor | None, cu_seqlens: Tensor | None,
    seq_idx: Tensor | None, reverse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`ssd` by selective_scan, the way of what a GPU's own kernels do not have."""
    module = importlib.import_module("arcore.ops.ssd")  # whose name is also that of its function
    v = module._check(x, dt, A, B, C, D, z, bias, initial_state, cu_seqlens, seq_idx, dt_limit)
    return module._by_selective_scan(v, softplus, dt_limit, cu_seqlens, seq_idx, reverse)


def everything(case: Case, f: Callable[..., tuple[Tensor, Tensor]] = ssd) -> dict[str, Tensor]:
    """Output, last state and all gradients."""
    leaves = {name: t.detach().requires_grad_() for name, t in case.floats().items()}
    out, last_state = call(f, replace(case, **leaves))
    results = [(out, case.grad_out), (last_state, case.grad_last_state)]
    # The reference's results have no history when every sequence is empty.
    results = [(t, grad.to(t.dtype)) for t, grad in results if t.requires_grad]
    grads = torch.autograd.grad(
        [t for t, _ in results], list(leaves.values()), [grad for _, grad in results], allow_unused=True
    )
    zeros = [torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves.values(), strict=True)]
    return {"out": out.detach(), "last_state": last_state.detach(), **dict(zip(leaves, zeros, strict=True))}


def products_in_storage(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Any, z: Any, bias: Any, softplus: bool, last: bool,
    *, dt_limit: tuple[float, float], initial_state: Tensor | None, cu_seqlens: Tensor | None,
    seq_idx: Tensor | None, reverse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The dual form of the paper in plain PyTorch: products in x's dtype, decays, sums and the state in float32.

    One product of steps by steps for a whole row. What a 16-bit implementation without kernels of its own loses.
    """
    arguments = (A, D, bias, softplus, last)
    if reverse:
        flipped = [None if t is None else t.flip(1) for t in (x, dt, B, C, z, seq_idx)]
        x, dt, B, C, z, seq_idx = flipped
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        if reverse:
            bounds = [bounds[-1] - b for b in reversed(bounds)]
        parts = []
        for i, (begin, end) in enumerate(pairwise(bounds)):
            row = len(bounds) - 2 - i if reverse else i
            state = None if initial_state is None else initial_state[row : row + 1]
            cut = [None if t is None else t[:, begin:end] for t in (x, dt, B, C, z)]
            parts.append(_row_in_storage(*cut, state, None, dt_limit, *arguments[:-1]))
        if reverse:
            outs, states = [out for out, _ in parts], [state for _, state in reversed(parts)]
        else:
            outs, states = [out for out, _ in parts], [state for _, state in parts]
        out, state = torch.cat(outs, 1), torch.cat(states)
    else:
        out, state = _row_in_storage(x, dt, B, C, z, initial_state, seq_idx, dt_limit, *arguments[:-1])
    return (out.flip(1) if reverse else out), state


def _row_in_storage(
    x: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Any, initial: Tensor | None, seq_idx: Tensor | None,
    dt_limit: tuple[float, float], A: Tensor, D: Any, bias: Any, softplus: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    kind, heads, length = x.dtype, x.shape[2], x.shape[1]
    if length == 0:
        empty = torch.zeros(x.shape[0], heads, x.shape[3], B.shape[3])
        return x, empty if initial is None else initial.float()
    step = dt.float() if bias is None else dt.float() + bias.float()
    step = (F.softplus(step) if softplus else step).clamp(*dt_limit)
    ids = torch.zeros(x.shape[:2], dtype=torch.int32) if seq_idx is None else seq_idx
    real, number = ids >= 0, segments(ids)
    step = step * real[..., None]
    B, C = (t.repeat_interleave(heads // t.shape[2], 2) * real[..., None, None].to(kind) for t in (B, C))
    total = (step * A.float()).cumsum(1)  # [B, L, H]
    between = total[:, :, None] - total[:, None]
    meets = torch.ones(length, length).tril().bool() & (number[:, :, None] == number[:, None])
    decay = between.masked_fill(~meets[..., None], -math.inf).exp()  # [B, t, s, H]
    scores = torch.einsum("blhn,bshn->blsh", C, B)
    weights = (scores.float() * decay * step[:, None]).to(kind)
    y = torch.einsum("blsh,bshp->blhp", weights, x).float()
    ends = number == number[:, -1:]
    rest = (total[:, -1:] - total).masked_fill(~ends[..., None], -math.inf).exp()
    final = torch.einsum("bshp,bshn->bhpn", ((rest * step)[..., None] * x.float()).to(kind), B).float()
    if initial is not None:
        first = (number == 0)[..., None]
        start = total.masked_fill(~first, -math.inf).exp()
        y = y + start[..., None] * torch.einsum("blhn,bhpn->blhp", C, initial.to(kind)).float()
        kept = (
            total[:, -1].masked_fill(~first[:, -1], -math.inf).exp() if length > 0 else torch.ones(1, heads)
        )
        final = final + kept[..., None, None] * initial.float()
    if D is not None:
        y = y + (D if D.dim() == 2 else D[:, None]).float() * x.float()
    if z is not None:
        y = y * F.silu(z.float())
    return (y * real[..., None, None]).to(kind), final


def check_against_reference(case: Case, f: Callable[..., tuple[Tensor, Tensor]] = ssd) -> None:
    """Errors against float64 stay below 1e-5 of the largest value, or what eager PyTorch loses twice over.

    Where bfloat16 units form the products, the bound is two roundings, or what plain PyTorch loses by the same.
    """
    ours = everything(case, f)
    exact = everything(case.to(torch.float64), reference_ssd)
    units = f is ssd and torch.ops.arcore.cpu_bf16() != "none"
    units = units and {case.x.dtype, case.B.dtype, case.C.dtype} == {torch.bfloat16}
    eager = everything(case, products_in_storage if units else reference_ssd)
    # A 16-bit result may be off by its own rounding.
    storage = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
    for name, value in ours.items():
        assert value.shape == exact[name].shape, name
        assert value.dtype == eager[name].dtype, name
        if value.numel() == 0:
            continue
        scale = exact[name].abs().max().item()
        error = (value.double() - exact[name]).abs().max().item()
        lost = (eager[name].double() - exact[name]).abs().max().item()
        rounding = 8e-3 if units else storage[value.dtype]
        allowed = max(1e-5 * scale, 2 * lost) + rounding * scale + 1e-30
        assert error <= allowed, f"{name}: error {error:.2e} of {scale:.2e}, eager loses {lost:.2e}"
