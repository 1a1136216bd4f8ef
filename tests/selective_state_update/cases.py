"""Inputs and tolerances shared by the tests of selective_state_update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from arcore.ops import reference_selective_state_update, selective_state_update


@dataclass(frozen=True)
class Step:
    """Everything that one call takes, in order."""

    state: Tensor
    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None
    z: Tensor | None = None
    dt_bias: Tensor | None = None
    dt_softplus: bool = True
    state_batch_indices: Tensor | None = None
    pad_slot_id: int = -1

    def run(self, f=selective_state_update) -> tuple[Tensor, Tensor]:
        """The output, and the state afterwards; the step keeps its own state."""
        state = self.state.clone()
        out = f(state, *(getattr(self, x.name) for x in fields(self) if x.name != "state"))
        return out, state

    def map(self, f) -> Step:
        names = [x.name for x in fields(self) if isinstance(getattr(self, x.name), Tensor)]
        return replace(self, **{n: f(n, getattr(self, n)) for n in names if n != "state_batch_indices"})


def make_step(
    batch: int = 3,
    dim: int = 20,
    d_state: int = 16,
    heads: int | None = None,
    groups: int = 1,
    *,
    skip: bool = True,
    gate: bool = True,
    bias: bool = True,
    softplus: bool = True,
    tied: bool = False,
    seed: int = 0,
) -> Step:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    h = () if heads is None else (heads,)
    g = () if heads is None else (groups,)
    a, dt, dt_bias = normal(*h, dim, d_state), normal(batch, *h, dim), normal(*h, dim)
    if tied:
        a = normal(*h, 1, 1).expand(*h, dim, d_state)
        dt, dt_bias = normal(batch, *h, 1).expand(batch, *h, dim), normal(*h, 1).expand(*h, dim)
    return Step(
        state=normal(batch, *h, dim, d_state),
        x=normal(batch, *h, dim),
        dt=dt if softplus else dt.abs(),
        A=-a.abs() if not tied else a.clamp(max=-0.1),
        B=normal(batch, *g, d_state),
        C=normal(batch, *g, d_state),
        D=normal(*h, dim) if skip else None,
        z=normal(batch, *h, dim) if gate else None,
        dt_bias=dt_bias.abs() if bias else None,
        dt_softplus=softplus,
    )


def check_against_reference(step: Step, function: Callable[..., Tensor] = selective_state_update) -> None:
    """Errors against float64 stay below 2e-6 of the largest value, plus the rounding of 16-bit results."""
    storage = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
    exact = step.map(lambda _, t: t.double()).run(reference_selective_state_update)
    for name, ours, expected in zip(("out", "state"), step.run(function), exact, strict=True):
        assert ours.shape == expected.shape
        if ours.numel():
            scale = expected.abs().max().item()
            error = (ours.double() - expected).abs().max().item()
            assert error <= (2e-6 + storage[ours.dtype]) * scale, f"{name}: {error:.2e} of {scale:.2e}"
