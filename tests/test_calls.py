"""A call that nobody differentiates or follows goes straight to its kernel; any other takes the road with all rules."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from arcore import masks, ops

torch.manual_seed(0)
Q, X, Z = torch.randn(2, 2, 5, 8), torch.randn(2, 16, 9), torch.randn(2, 9, 16).transpose(1, 2)
MASK, DECAY, B = masks.causal(5), -torch.rand(16, 3), torch.randn(2, 3, 9)
WEIGHT, BIAS, LOGITS = torch.randn(16, 4), torch.randn(16), torch.randn(3, 33)
SEED = torch.tensor([4, 5, 6])

CALLS: dict[str, Callable[[Tensor], Any]] = {
    "block_sparse_attention": lambda x: ops.block_sparse_attention(x, Q, Q, MASK, return_lse=True),
    "selective_scan": lambda x: ops.selective_scan(
        x, Z, DECAY, B, B, BIAS, Z, BIAS, delta_softplus=True, return_last_state=True
    ),
    "causal_conv1d": lambda x: ops.causal_conv1d(
        x, WEIGHT, BIAS, activation="silu", return_final_states=True
    ),
    "sample": lambda x: ops.sample(
        x,
        temperature=0.7,
        top_k=9,
        top_p=0.9,
        seed=SEED,
        return_prob=True,
        return_logprob="raw",
        return_kept=True,
    ),
}
FIRST = {"block_sparse_attention": Q, "selective_scan": X, "causal_conv1d": X, "sample": LOGITS}
# Calls of Python functions in one call of the public one, itself included.
MOST_CALLS = {"block_sparse_attention": 5, "selective_scan": 5, "causal_conv1d": 5, "sample": 16}


def tensors(result: Any) -> list[Tensor]:
    return [t for t in result if t is not None]


@pytest.mark.parametrize("name", CALLS)
def test_both_roads_give_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = tensors(CALLS[name](FIRST[name]))
    monkeypatch.setattr(sys.modules[f"arcore.ops.{name}"], "untracked", lambda *_: False)
    around = tensors(CALLS[name](FIRST[name]))
    assert len(straight) == len(around) >= 2
    for a, b in zip(straight, around, strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride() and a.dtype == b.dtype
        assert not a.requires_grad


@pytest.mark.parametrize("name", CALLS)
def test_a_call_without_gradients_runs_few_python_functions(name: str) -> None:
    call, x = CALLS[name], FIRST[name]
    call(x)
    seen: list[str] = []

    def profile(frame: Any, event: str, _: Any) -> None:
        if event == "call":
            seen.append(frame.f_code.co_qualname if sys.version_info >= (3, 11) else frame.f_code.co_name)

    sys.setprofile(profile)
    try:
        call(x)
    finally:
        sys.setprofile(None)
    seen.remove(next(s for s in seen if "lambda" in s))
    assert len(seen) <= MOST_CALLS[name], seen


@pytest.mark.parametrize("name", [n for n in CALLS if n != "sample"])
def test_gradients_and_transforms_are_not_passed_by(name: str) -> None:
    call, x = CALLS[name], FIRST[name]

    def total(x: Tensor) -> Tensor:
        return sum((t.sum() for t in tensors(call(x))), torch.zeros(()))

    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(total(leaf), leaf)
    assert grad.abs().sum() > 0
    torch.testing.assert_close(torch.func.grad(total)(x), grad)
    tangent = torch.ones_like(x)
    moved = torch.func.jvp(total, (x,), (tangent,))[1]
    torch.testing.assert_close(moved, grad.sum(), rtol=1e-3, atol=1e-3)
    with torch.autograd.forward_ad.dual_level():
        dual = total(torch.autograd.forward_ad.make_dual(x, tangent))
        found = torch.autograd.forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(found, moved)


@pytest.mark.parametrize("name", CALLS)
def test_what_the_op_refuses_is_told_by_the_public_function(name: str) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"^arcore\.{name}: expected "):
        CALLS[name](FIRST[name].double())
    unfit = torch.zeros(4, 33) if name == "sample" else FIRST[name][None, None]
    with pytest.raises((TypeError, ValueError), match=rf"^arcore\.{name}: expected "):
        CALLS[name](unfit)
