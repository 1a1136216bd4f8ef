"""Inputs and tolerances shared by the tests of causal_conv1d."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from arcore.ops import causal_conv1d, reference_causal_conv1d

FLOATS = ("x", "weight", "bias", "initial_states")
# What has a time axis, last.
ALONG_TIME = ("x", "grad_out")


@dataclass(frozen=True)
class Case:
    """Everything that one call takes."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    initial_states: Tensor | None
    seq_idx: Tensor | None
    activation: str | None
    reverse: bool
    grad_out: Tensor
    grad_final: Tensor

    def floats(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in FLOATS if getattr(self, name) is not None}

    def map(self, f: Callable[[str, Tensor], Tensor]) -> Case:
        """The case with `f` applied to every float tensor."""
        names = [n.name for n in fields(self) if isinstance(getattr(self, n.name), Tensor)]
        return replace(self, **{n: f(n, getattr(self, n)) for n in names if n != "seq_idx"})

    def to(self, dtype: torch.dtype) -> Case:
        return self.map(lambda _, t: t.to(dtype))


def make_case(
    batch: int = 2,
    dim: int = 20,
    length: int = 70,
    width: int = 4,
    *,
    bias: bool = True,
    initial: bool = False,
    activation: str | None = "silu",
    ids: Tensor | None = None,
    reverse: bool = False,
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return Case(
        x=normal(batch, dim, length),
        weight=normal(dim, width) / width**0.5,
        bias=normal(dim) if bias else None,
        initial_states=normal(batch, dim, width - 1) if initial else None,
        seq_idx=ids,
        activation=activation,
        reverse=reverse,
        grad_out=normal(batch, dim, length),
        grad_final=normal(batch, dim, width - 1),
    )


def call(f: Callable[..., tuple[Tensor, Tensor]], case: Case) -> tuple[Tensor, Tensor]:
    return f(
        *(case.x, case.weight, case.bias, case.seq_idx, case.initial_states, True, None, case.activation),
        reverse=case.reverse,
    )


def everything(case: Case, f: Callable[..., tuple[Tensor, Tensor]] = causal_conv1d) -> dict[str, Tensor]:
    """Output, final states and all gradients."""
    leaves = {name: t.detach().requires_grad_() for name, t in case.floats().items()}
    out, final = call(f, replace(case, **leaves))
    results = [(out, case.grad_out), (final, case.grad_final)]
    results = [(t, grad.to(t.dtype)) for t, grad in results if t.requires_grad]
    grads = torch.autograd.grad(
        [t for t, _ in results], list(leaves.values()), [grad for _, grad in results], allow_unused=True
    )
    zeros = [torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves.values(), strict=True)]
    return {"out": out.detach(), "final": final.detach(), **dict(zip(leaves, zeros, strict=True))}


def check_against_reference(
    case: Case, function: Callable[..., tuple[Tensor, Tensor]] = causal_conv1d
) -> None:
    """Errors against float64 stay within twice what eager PyTorch loses, plus two roundings of fp32."""
    ours = everything(case, function)
    exact = everything(case.to(torch.float64), reference_causal_conv1d)
    eager = everything(case, reference_causal_conv1d)
    storage = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
    for name, value in ours.items():
        assert value.shape == exact[name].shape, name
        assert value.dtype == eager[name].dtype, name
        if value.numel() == 0:
            continue
        scale = exact[name].abs().max().item()
        error = (value.double() - exact[name]).abs().max().item()
        lost = (eager[name].double() - exact[name]).abs().max().item()
        assert error <= 2 * lost + storage[value.dtype] * scale + 1e-30, (
            f"{name}: error {error:.2e} of {scale:.2e}, eager loses {lost:.2e}"
        )
