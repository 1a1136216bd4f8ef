"""Inputs and tolerances shared by the tests of mamba3_scan."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from arcore.ops import Mamba3State, mamba3_scan, reference_mamba3_scan

FLOATS = ("x", "dt", "log_decay", "weight", "B", "C", "turn", "B_bias", "C_bias", "D", "z")
STATES = ("h0", "angle0", "B0", "x0")
# What has a time axis, the second.
ALONG_TIME = ("x", "dt", "log_decay", "weight", "B", "C", "turn", "z", "grad_out")
# What belongs to one row of the batch.
PER_ROW = (*ALONG_TIME, *STATES, "grad_h", "grad_angle", "grad_B", "grad_x")


@dataclass(frozen=True)
class Case:
    """Everything that one call takes."""

    x: Tensor
    dt: Tensor
    log_decay: Tensor
    weight: Tensor
    B: Tensor
    C: Tensor
    turn: Tensor
    B_bias: Tensor | None
    C_bias: Tensor | None
    D: Tensor | None
    z: Tensor | None
    h0: Tensor | None
    angle0: Tensor | None
    B0: Tensor | None
    x0: Tensor | None
    cu_seqlens: Tensor | None
    seq_idx: Tensor | None
    halves: bool
    reverse: bool
    grad_out: Tensor
    grad_h: Tensor
    grad_angle: Tensor
    grad_B: Tensor
    grad_x: Tensor

    def floats(self) -> dict[str, Tensor]:
        names = (*FLOATS, *STATES)
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

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
    dim: int = 12,
    states: int = 16,
    groups: int = 2,
    rank: int = 1,
    angles: int = 5,
    *,
    bias: bool = True,
    skip: bool = True,
    gate: bool = True,
    initial: bool = False,
    lengths: list[int] | None = None,
    ids: Tensor | None = None,
    halves: bool = False,
    reverse: bool = False,
    seed: int = 0,
) -> Case:
    """A random case."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    if lengths is not None:
        batch, length = 1, sum(lengths)
    rows = batch if lengths is None else len(lengths)
    dt = normal(batch, length, heads).abs() * 0.5 + 0.01
    return Case(
        x=normal(batch, length, heads, rank, dim),
        dt=dt,
        log_decay=-dt * torch.rand(heads, generator=generator) * 2,
        weight=normal(batch, length, heads).sigmoid(),
        B=normal(batch, length, rank, groups, states) / math.sqrt(rank),
        C=normal(batch, length, rank, groups, states),
        turn=normal(batch, length, heads, angles),
        B_bias=normal(heads, rank, states) if bias else None,
        C_bias=normal(heads, rank, states) if bias else None,
        D=normal(heads) if skip else None,
        z=normal(batch, length, heads, rank, dim) if gate else None,
        h0=normal(rows, heads, dim, states) if initial else None,
        angle0=normal(rows, heads, angles).abs() if initial else None,
        B0=normal(rows, heads, rank, states) if initial else None,
        x0=normal(rows, heads, rank, dim) if initial else None,
        cu_seqlens=None if lengths is None else torch.tensor([0, *lengths]).cumsum(0).int(),
        seq_idx=ids,
        halves=halves,
        reverse=reverse,
        grad_out=normal(batch, length, heads, rank, dim),
        grad_h=normal(rows, heads, dim, states),
        grad_angle=normal(rows, heads, angles),
        grad_B=normal(rows, heads, rank, states),
        grad_x=normal(rows, heads, rank, dim),
    )


def call(f: Callable[..., Any], case: Case) -> tuple[Tensor, ...]:
    """Output and the four parts of the last state."""
    initial = None if case.h0 is None else Mamba3State(case.h0, case.angle0, case.B0, case.x0)
    out, last = f(
        *(getattr(case, name) for name in FLOATS),
        True,
        initial_state=initial,
        cu_seqlens=case.cu_seqlens,
        seq_idx=case.seq_idx,
        halves=case.halves,
        reverse=case.reverse,
    )
    return out, *last


def everything(case: Case, f: Callable[..., Any] = mamba3_scan) -> dict[str, Tensor]:
    """Output, last state and all gradients."""
    leaves = {name: t.detach().requires_grad_() for name, t in case.floats().items()}
    results = call(f, replace(case, **leaves))
    grads = (case.grad_out, case.grad_h, case.grad_angle, case.grad_B, case.grad_x)
    # The reference's results have no history when every sequence is empty.
    used = [(t, g.to(t.dtype)) for t, g in zip(results, grads, strict=True) if t.requires_grad]
    found = torch.autograd.grad(
        [t for t, _ in used], list(leaves.values()), [g for _, g in used], allow_unused=True
    )
    zeros = [torch.zeros_like(t) if g is None else g for g, t in zip(found, leaves.values(), strict=True)]
    names = ("out", "last_h", "last_angle", "last_B", "last_x")
    values = dict(zip(names, (t.detach() for t in results), strict=True))
    return values | dict(zip(leaves, zeros, strict=True))


def check_against_reference(case: Case, f: Callable[..., Any] = mamba3_scan) -> None:
    """Errors against float64 stay below 1e-5 of the largest value, or what eager PyTorch loses twice over."""
    ours = everything(case, f)
    exact = everything(case.to(torch.float64), reference_mamba3_scan)
    eager = everything(case, reference_mamba3_scan)
    # A 16-bit result may be off by its own rounding.
    storage = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
    for name, value in ours.items():
        assert value.shape == exact[name].shape, name
        assert value.dtype == eager[name].dtype, name
        if value.numel() == 0:
            continue
        scale = exact[name].abs().max().item()
        error, lost = (_distance(name, t, exact[name]) for t in (value, eager[name]))
        allowed = max(1e-5 * scale, 2 * lost) + storage[value.dtype] * scale + 1e-30
        assert error <= allowed, f"{name}: error {error:.2e} of {scale:.2e}, eager loses {lost:.2e}"


def _distance(name: str, ours: Tensor, exact: Tensor) -> float:
    difference = ours.double() - exact
    if name == "last_angle":  # on the circle
        difference = (difference + math.pi).remainder(2 * math.pi) - math.pi
    return difference.abs().max().item()
