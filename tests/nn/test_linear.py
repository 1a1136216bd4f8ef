"""Products through oneDNN: the numbers of PyTorch, whatever the strides, and only where nothing is lost by it."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F

from arcore.nn import Linear, linear
from arcore.nn.linear import MIN_PRODUCTS

K, M = 1027, 8195
assert K * M > MIN_PRODUCTS  # a single row is enough for oneDNN
INPUTS = {
    "vector": lambda: torch.randn(K),
    "rows": lambda: torch.randn(3, 5, K),
    "columns": lambda: torch.randn(2, K, 7).transpose(1, 2),
    "slice": lambda: torch.randn(4, K + 9)[:, 3 : 3 + K],
    "one row several times": lambda: torch.randn(1, K).expand(6, K),
    "no rows": lambda: torch.randn(0, K),
}
WEIGHTS = {
    "dense": lambda: torch.randn(M, K),
    "transposed": lambda: torch.randn(K, M).t(),
    "every other row": lambda: torch.randn(2 * M, K)[::2],
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("x", INPUTS)
@torch.no_grad()
def test_same_as_torch(x: str, weight: str, bias: bool):
    inputs, weights = INPUTS[x](), WEIGHTS[weight]()
    added = torch.randn(M) if bias else None
    expected = F.linear(inputs.double(), weights.double(), None if added is None else added.double())
    out = linear(inputs, weights, added)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected.float(), rtol=1e-5, atol=1e-4)


def test_gradients_autocast_and_other_precisions_are_those_of_torch():
    layer, x = Linear(K, M), torch.randn(3, K, requires_grad=True)
    layer(x).square().sum().backward()
    assert x.grad is not None
    assert torch.equal(
        x.grad, torch.autograd.grad(F.linear(x, layer.weight, layer.bias).square().sum(), x)[0]
    )
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        low = layer.bfloat16()
        assert torch.equal(low(x.bfloat16()), F.linear(x.bfloat16(), low.weight, low.bias))


@torch.no_grad()
def test_without_onednn(monkeypatch: pytest.MonkeyPatch):
    x, weight = torch.randn(3, K), torch.randn(M, K)
    monkeypatch.setattr(sys.modules["arcore.nn.linear"], "_onednn", None)
    assert torch.equal(linear(x, weight), F.linear(x, weight))
