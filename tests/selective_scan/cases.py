"""Inputs and tolerances shared by the tests of selective_scan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from arcore.ops import reference_selective_scan, selective_scan

FLOATS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
LONG_FLOATS = ("u", "delta", "z")


@dataclass(frozen=True)
class Case:
    """Everything that one call takes."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None
    z: Tensor | None = None
    delta_bias: Tensor | None = None
    initial_state: Tensor | None = None
    cu_seqlens: Tensor | None = None
    seq_idx: Tensor | None = None
    delta_softplus: bool = False
    reverse: bool = False
    grad_out: Tensor = field(default_factory=lambda: torch.empty(0))
    grad_last_state: Tensor = field(default_factory=lambda: torch.empty(0))

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
    dim: int = 20,
    length: int = 70,
    state: int = 16,
    *,
    b: str = "varying",
    c: str = "varying",
    skip: bool = True,
    gate: bool = True,
    bias: bool = True,
    softplus: bool = True,
    initial: bool = False,
    lengths: list[int] | None = None,
    ids: Tensor | None = None,
    reverse: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """A random case; b and c are "constant", "varying" or the number of groups as text."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    def matrix(kind: str) -> Tensor:
        if kind == "constant":
            return normal(dim, state)
        return normal(batch, state, length) if kind == "varying" else normal(batch, int(kind), state, length)

    if lengths is not None:
        batch, length = 1, sum(lengths)
    rows = batch if lengths is None else len(lengths)
    delta = normal(batch, dim, length, scale=0.5)
    case = Case(
        u=normal(batch, dim, length),
        delta=delta if softplus else delta.abs(),
        A=-torch.rand(dim, state, generator=generator) * 4,
        B=matrix(b),
        C=matrix(c),
        D=normal(dim) if skip else None,
        z=normal(batch, dim, length) if gate else None,
        delta_bias=normal(dim, scale=0.2).abs() if bias else None,
        initial_state=normal(rows, dim, state) if initial else None,
        cu_seqlens=None if lengths is None else torch.tensor([0, *lengths]).cumsum(0).int(),
        seq_idx=ids,
        delta_softplus=softplus,
        reverse=reverse,
        grad_out=normal(batch, dim, length),
        grad_last_state=normal(rows, dim, state),
    )
    if dtype == torch.float32:
        return case
    # Only what travels in bulk is ever stored in 16 bits.
    bulk = {"u", "delta", "z", "B", "C", "grad_out"}
    return case.map(lambda name, t: t.to(dtype) if name in bulk else t)


def call(f: Callable[..., tuple[Tensor, Tensor]], case: Case) -> tuple[Tensor, Tensor]:
    return f(
        case.u,
        case.delta,
        case.A,
        case.B,
        case.C,
        case.D,
        case.z,
        case.delta_bias,
        case.delta_softplus,
        True,
        initial_state=case.initial_state,
        cu_seqlens=case.cu_seqlens,
        seq_idx=case.seq_idx,
        reverse=case.reverse,
    )


def everything(case: Case, f: Callable[..., tuple[Tensor, Tensor]] = selective_scan) -> dict[str, Tensor]:
    """Output, last state and all gradients."""
    leaves = {name: t.detach().requires_grad_() for name, t in case.floats().items()}
    out, last_state = call(f, replace(case, **leaves))
    results = [(out, case.grad_out), (last_state, case.grad_last_state)]
    # The reference's state has no history when every sequence is empty.
    results = [(t, grad.to(t.dtype)) for t, grad in results if t.requires_grad]
    grads = torch.autograd.grad(
        [t for t, _ in results], list(leaves.values()), [grad for _, grad in results], allow_unused=True
    )
    zeros = [torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves.values(), strict=True)]
    return {"out": out.detach(), "last_state": last_state.detach(), **dict(zip(leaves, zeros, strict=True))}


def check_against_reference(
    case: Case, function: Callable[..., tuple[Tensor, Tensor]] = selective_scan
) -> None:
    """Errors against float64 stay below 1e-5 of the largest value, or what eager PyTorch loses twice over."""
    ours = everything(case, function)
    exact = everything(case.to(torch.float64), reference_selective_scan)
    eager = everything(case, reference_selective_scan)
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
        allowed = max(1e-5 * scale, 2 * lost) + storage[value.dtype] * scale + 1e-30
        assert error <= allowed, f"{name}: error {error:.2e} of {scale:.2e}, eager loses {lost:.2e}"
