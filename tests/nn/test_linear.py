"""Products through oneDNN: the numbers of PyTorch, whatever the strides, and only where nothing is lost by it."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F

from arcore.matmul import slow_halves
from arcore.nn import Linear, linear
from arcore.nn.linear import MIN_OF_FEW, MIN_OF_ONE, MIN_PRODUCTS, STEP_ROWS

K, M = 1027, 8195
assert K * M > MIN_PRODUCTS  # a single row is enough for oneDNN
INPUTS = {
    "vector": lambda: torch.randn(K),
    "rows": lambda: torch.randn(3, 5, K),
    "many rows": lambda: torch.randn(5, 9, K),
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


@torch.no_grad()
def test_weights_that_are_slices_stay_with_torch(monkeypatch):
    """oneDNN has plain loops alone for them, a thousand times slower."""
    seen = []
    module = sys.modules["arcore.nn.linear"]
    own = module._onednn
    monkeypatch.setattr(module, "_onednn", lambda x, weight, *rest: seen.append(1) or own(x, weight, *rest))
    x = torch.randn(STEP_ROWS[torch.float32] + 1, K)
    for weight, dense in (
        (torch.randn(M, K), 1),
        (torch.randn(K, M).t(), 1),
        (torch.randn(2 * M, K)[::2], 0),
        (torch.randn(M, K + 5)[:, :K], 0),
    ):
        seen.clear()
        linear(x, weight)
        assert len(seen) == dense * (own is not None)


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
        if torch.bfloat16 not in slow_halves():
            low, many = layer.bfloat16(), torch.randn(STEP_ROWS[torch.bfloat16] + 1, K).bfloat16()
            assert torch.equal(low(many), F.linear(many, low.weight, low.bias))
        double, many = layer.double(), torch.randn(40, K).double()
        assert torch.equal(double(many), F.linear(many, double.weight, double.bias))


@torch.no_grad()
def test_without_onednn(monkeypatch: pytest.MonkeyPatch):
    x, weight = torch.randn(STEP_ROWS[torch.float32] + 1, K), torch.randn(M, K)
    monkeypatch.setattr(sys.modules["arcore.nn.linear"], "_onednn", None)
    assert torch.equal(linear(x, weight), F.linear(x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(48,), (1, 48), (2, 2, 48), (3, 48), (8, 48), (5, 6, 48)])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_few_rows_are_rounded_once_and_alike(shape: tuple[int, ...], bias: bool, dtype: torch.dtype):
    x, weight = torch.randn(shape).to(dtype), torch.randn(2**11 + 5, 48).to(dtype)
    added = torch.randn(len(weight)).to(dtype) if bias else None
    out = linear(x, weight, added, rows=32)
    expected = F.linear(x.double(), weight.double(), None if added is None else added.double())
    assert out.dtype == dtype
    assert out.shape == expected.shape
    allowed = 2.0**-8 if dtype == torch.bfloat16 else 1e-6
    assert (out.double() - expected).abs().max() <= allowed * expected.abs().max()
    rows = x.view(-1, 48)
    for i in range(len(rows)):  # whatever rows are beside it
        assert torch.equal(linear(rows[i], weight, added, rows=32), out.view(-1, len(weight))[i])


@pytest.mark.parametrize(
    ("rows", "outputs", "once"), [(1, 1024, True), (4, 128, True), (1, 128, False), (33, 1024, False)]
)
@torch.no_grad()
def test_a_few_rows_in_float32(rows: int, outputs: int, once: bool, monkeypatch: pytest.MonkeyPatch):
    module, seen = sys.modules["arcore.nn.linear"], []
    own = module.call_below
    monkeypatch.setattr(module, "call_below", lambda *args: seen.append(1) or own(*args))
    x, weight, bias = torch.randn(rows, 512), torch.randn(outputs, 512), torch.randn(outputs)
    assert once == (
        rows <= STEP_ROWS[torch.float32] and outputs * 512 >= (MIN_OF_ONE if rows == 1 else MIN_OF_FEW)
    )
    out = linear(x, weight, bias)
    assert len(seen) == once
    expected = F.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4)
    if rows == 4:
        for i in range(rows - 1):
            assert torch.equal(linear(x[i : i + 2], weight, bias)[0], out[i])


@torch.no_grad()
def test_what_few_rows_do_not_fit_goes_to_torch():
    weight = torch.randn(37, 48).bfloat16()
    for x, w in (
        (torch.randn(0, 48), weight),
        (torch.randn(STEP_ROWS[torch.bfloat16] + 1, 48), weight),
        (torch.randn(2, 48), torch.randn(48, 37).bfloat16().t()),
    ):
        assert torch.equal(linear(x.bfloat16(), w), F.linear(x.bfloat16(), w))
    x = torch.randn(2, 48).bfloat16()
    together = torch.vmap(lambda row: linear(row, weight))(x)
    torch.testing.assert_close(together, F.linear(x, weight), rtol=0.02, atol=0.05)
    torch.library.opcheck(torch.ops.arcore.linear_step.default, (x, weight, None))
    for wrong, complaint in (
        (x[0], "expected x of shape"),
        (torch.zeros(65, 48).bfloat16(), "at most 64 rows but got 65"),
        (x.float(), "expected weight of dtype float32"),
        (x.double(), "expected x of dtype float32 or bfloat16"),
    ):
        with pytest.raises(
            RuntimeError, match=f"arcore::(linear_step|decoder_step): .*{complaint}|{complaint}"
        ):
            torch.ops.arcore.linear_step(wrong, weight, None)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="linear_step has no derivative"):
        torch.ops.arcore.linear_step(x.requires_grad_(), weight, None).sum().backward()
