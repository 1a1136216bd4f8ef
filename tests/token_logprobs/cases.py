"""Inputs, the comparison with float64, and what must hold of every result of token_logprobs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from arcore.ops import TokenLogprobs, reference_token_logprobs, token_logprobs

IGNORE = -100
# Smallest error that the rounding of a result of magnitude 1 justifies.
FLOOR = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@dataclass
class Case:
    logits: Tensor
    target: Tensor
    cotangents: tuple[Tensor, Tensor, Tensor]
    options: dict[str, Any] = field(default_factory=dict)


def make_case(
    *shape: int, dtype: torch.dtype = torch.float32, scale: float = 3.0, seed: int = 0, **options: Any
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    *rows, vocab = shape
    logits = (scale * torch.randn(shape, generator=generator)).to(dtype)
    target = torch.randint(max(vocab, 1), rows, generator=generator)
    cotangents = tuple(torch.randn(rows, generator=generator) for _ in range(3))
    return Case(logits, target, cotangents, options)  # type: ignore[arg-type]


def pack_mask(kept: Tensor) -> Tensor:
    """Bool ``[..., V]`` to int32 words of 32 columns."""
    padded = torch.nn.functional.pad(kept, (0, -kept.shape[-1] % 32)).unflatten(-1, (-1, 32))
    words = (padded.long() << torch.arange(32)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def random_mask(*shape: int, share: float = 0.5, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


Results = dict[str, Tensor]


def run(
    function: Callable[..., TokenLogprobs], case: Case, dtype: torch.dtype, *, entropy: bool = True
) -> Results:
    """Outputs and gradients of one implementation, from the case's logits in `dtype`."""
    logits = case.logits.detach().to(dtype).requires_grad_()
    options = dict(case.options)
    temperature = options.get("temperature")
    if isinstance(temperature, Tensor):
        keep = dtype if dtype == torch.float64 else torch.float32
        options["temperature"] = temperature = temperature.detach().to(keep).requires_grad_()
    out = function(logits, case.target, return_entropy=entropy, **options)
    assert (out.entropy is not None) == entropy
    outputs = [x for x in out if x is not None]
    grads = [g.to(x.dtype) for g, x in zip(case.cotangents, outputs, strict=False)]
    torch.autograd.backward(outputs, grads)
    results = {"logp": out.logp.detach(), "logsumexp": out.logsumexp.detach(), "grad_logits": logits.grad}
    if out.entropy is not None:
        results["entropy"] = out.entropy.detach()
    if isinstance(temperature, Tensor):
        results["grad_temperature"] = temperature.grad
    return results


def assert_as_good_as_eager(case: Case, *, entropy: bool = True, function: Callable = token_logprobs) -> None:
    """|ours - float64| <= 2 * |eager PyTorch in the same precision - float64| + floor of the dtype."""
    dtype = case.logits.dtype
    exact = run(reference_token_logprobs, case, torch.float64, entropy=entropy)
    eager = run(reference_token_logprobs, case, dtype, entropy=entropy)
    ours = run(function, case, dtype, entropy=entropy)
    assert ours.keys() == exact.keys()
    for name, expected in exact.items():
        got = ours[name].double()
        assert got.shape == expected.shape, name
        finite = torch.isfinite(expected)
        assert torch.equal(torch.isfinite(got), finite), f"{name}: infinities or NaN in other places"
        assert torch.equal(got[got.isinf()], expected[expected.isinf()]), name
        assert ours[name].dtype == (dtype if name == "grad_logits" else torch.float32), name
        if not finite.any():
            continue
        error = (got - expected)[finite].abs().max().item()
        lost = (eager[name].double() - expected)[finite].abs().max().item()
        size = max(1.0, expected[finite].abs().max().item())
        floor = (FLOOR[dtype] if name == "grad_logits" else FLOOR[torch.float32]) * size
        lost = 0.0 if math.isnan(lost) else lost
        assert error <= 2 * lost + floor, (
            f"{name}: error {error:.3e}, eager loses {lost:.3e}, floor {floor:.1e}"
        )
    assert_possible(ours, case.logits.shape[-1])


def assert_possible(results: Results, vocab: int) -> None:
    """logp <= 0 without exception; 0 <= entropy <= log V up to the last digit."""
    logp = results["logp"]
    assert not (logp > 0).any()
    if "entropy" in results:
        entropy = results["entropy"]
        assert not (entropy < 0).any()
        assert not (entropy > math.log(max(vocab, 1)) * (1 + 2e-7) + 1e-7).any()


def bits(results: Results) -> list[Tensor]:
    return [torch.nan_to_num(x, nan=12345.0) for x in results.values()]
