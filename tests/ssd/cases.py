"""Inputs and tolerances shared by the tests of ssd."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from arcore.ops import reference_ssd, ssd

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


def as_on_a_gpu(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Any, z: Any, bias: Any, softplus: bool, last: bool,
    *, dt_limit: tuple[float, float], initial_state: Tensor | None, cu_seqlens: Tensor | None,
    seq_idx: Tensor | None, reverse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`ssd` the way that a GPU's tensors take: by selective_scan."""
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


def check_against_reference(case: Case, f: Callable[..., tuple[Tensor, Tensor]] = ssd) -> None:
    """Errors against float64 stay below 1e-5 of the largest value, or what eager PyTorch loses twice over."""
    ours = everything(case, f)
    exact = everything(case.to(torch.float64), reference_ssd)
    eager = everything(case, reference_ssd)
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
