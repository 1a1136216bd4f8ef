"""linear_logprobs against float64 and against token_logprobs of the whole logits."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import linear

from arcore.ops import linear_logprobs, reference_linear_logprobs, token_logprobs
from tests.token_logprobs.cases import FLOOR, IGNORE, pack_mask, random_mask

NAMES = ("hidden", "weight", "bias", "temperature")


def make_inputs(rows=(2, 33), width=40, vocab=500, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*rows, width, generator=generator).to(dtype)
    weight = (torch.randn(vocab, width, generator=generator) / 2).to(dtype)
    bias = torch.randn(vocab, generator=generator).to(dtype)
    target = torch.randint(vocab, rows, generator=generator)
    temperature = torch.rand(rows, generator=generator) + 0.5
    cotangents = [torch.randn(rows, generator=generator) for _ in range(3)]
    return (hidden, weight, bias, temperature), target, cotangents


def run(function, inputs, target, cotangents, dtype, **options):
    kinds = [dtype] * 3 + [torch.float64 if dtype == torch.float64 else torch.float32]
    hidden, weight, bias, temperature = (
        x.detach().to(kind).requires_grad_() for x, kind in zip(inputs, kinds, strict=True)
    )
    out = function(hidden, weight, target, bias=bias, temperature=temperature, return_entropy=True, **options)
    grads = torch.autograd.grad(
        list(out), (hidden, weight, bias, temperature), [c.to(out.logp.dtype) for c in cotangents]
    )
    return {
        **dict(zip(out._fields, (x.detach() for x in out), strict=True)),
        **dict(zip(NAMES, grads, strict=True)),
    }


def assert_as_good_as_eager(inputs, target, cotangents, **options):
    dtype = inputs[0].dtype
    exact = run(reference_linear_logprobs, inputs, target, cotangents, torch.float64, **options)
    eager = run(reference_linear_logprobs, inputs, target, cotangents, dtype, **options)
    ours = run(linear_logprobs, inputs, target, cotangents, dtype, **options)
    for name, expected in exact.items():
        got = ours[name].double()
        assert got.shape == expected.shape, name
        assert ours[name].dtype == (dtype if name in NAMES[:3] else torch.float32), name
        finite = torch.isfinite(expected)
        assert torch.equal(torch.isfinite(got), finite), name
        error = (got - expected)[finite].abs().max().item()
        lost = (eager[name].double() - expected)[finite].abs().max().item()
        size = max(1.0, expected[finite].abs().max().item())
        assert error <= 2 * lost + FLOOR[dtype] * size, f"{name}: error {error:.3e}, eager loses {lost:.3e}"
    assert not (ours["logp"] > 0).any()


TILES = [None, (66, 512), (66, 96), (10, 512), (7, 32), (1, 64)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_tiles(dtype, tile):
    assert_as_good_as_eager(*make_inputs(dtype=dtype), tile=tile)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", [None, "bool", "bits", "one_row"])
def test_options(dtype, mask):
    inputs, target, cotangents = make_inputs(dtype=dtype)
    target[0, ::5] = IGNORE
    kept = random_mask(*((500,) if mask == "one_row" else (2, 33, 500)), share=0.8)
    words = None if mask is None else kept if mask == "bool" else pack_mask(kept)
    assert_as_good_as_eager(inputs, target, cotangents, softcap=6.0, mask=words, tile=(20, 96))


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 4097])
@pytest.mark.parametrize("rows", [(1,), (3,), (1030,)])
def test_sizes(vocab, rows):
    assert_as_good_as_eager(*make_inputs(rows=rows, width=8, vocab=vocab))


def test_many_rows_sum_in_float32():
    """grad_weight adds up 4096 rows of bfloat16 tiles; in bfloat16 sums the later tiles would be lost."""
    inputs, target, _ = make_inputs(rows=(4096,), width=8, vocab=64, dtype=torch.bfloat16)
    ones = [torch.ones(4096)] * 3
    assert_as_good_as_eager(inputs, target, ones, tile=(16, 32))


def test_tiles_hardly_change_results():
    inputs, target, cotangents = make_inputs()
    whole = run(linear_logprobs, inputs, target, cotangents, torch.float32, tile=(66, 512))
    for tile in TILES[2:]:
        for name, x in run(linear_logprobs, inputs, target, cotangents, torch.float32, tile=tile).items():
            torch.testing.assert_close(x, whole[name], rtol=2e-5, atol=2e-5)


def test_is_token_logprobs_of_the_logits():
    (hidden, weight, bias, _), target, _ = make_inputs()
    logits = linear(hidden, weight, bias)
    expected = token_logprobs(logits, target, temperature=0.8, return_entropy=True)
    got = linear_logprobs(hidden, weight, target, bias=bias, temperature=0.8, return_entropy=True)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_only_needed_gradients():
    (hidden, weight, bias, _), target, _ = make_inputs()
    for asked in range(8):
        needs = [bool(asked >> i & 1) for i in range(3)]
        h, w, b = (x.clone().requires_grad_(n) for x, n in zip((hidden, weight, bias), needs, strict=True))
        out = linear_logprobs(h, w, target, bias=b).logp.sum()
        assert out.requires_grad == any(needs)
        if any(needs):
            out.backward()
        assert [x.grad is not None for x in (h, w, b)] == needs


def test_layouts():
    (hidden, weight, _, _), target, _ = make_inputs()
    expected = linear_logprobs(hidden, weight, target).logp
    strided = hidden.transpose(0, 1).contiguous().transpose(0, 1)
    columns = weight.t().contiguous().t().requires_grad_()
    got = linear_logprobs(strided, columns, target).logp
    torch.testing.assert_close(got, expected)
    got.sum().backward()
    plain = weight.clone().requires_grad_()
    linear_logprobs(hidden, plain, target).logp.sum().backward()
    torch.testing.assert_close(columns.grad, plain.grad)


def test_no_rows():
    weight = torch.randn(40, 8, requires_grad=True)
    hidden = torch.empty(0, 8, requires_grad=True)
    out = linear_logprobs(hidden, weight, torch.empty(0, dtype=torch.long), return_entropy=True)
    assert [x.shape for x in out] == [(0,)] * 3
    out.logp.sum().backward()
    assert (weight.grad == 0).all()
    assert hidden.grad.shape == (0, 8)


def test_nan_stays_in_its_row():
    (hidden, weight, _, _), target, _ = make_inputs(rows=(5,))
    clean = linear_logprobs(hidden, weight, target, return_entropy=True)
    hidden[2] = math.nan
    dirty = linear_logprobs(hidden, weight, target, return_entropy=True)
    for a, b in zip(dirty, clean, strict=True):
        assert a[2].isnan()
        assert torch.equal(a[[0, 1, 3, 4]], b[[0, 1, 3, 4]])


def test_autocast():
    (hidden, weight, bias, _), target, _ = make_inputs()
    hidden.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear_logprobs(hidden, weight, target, bias=bias)
    low = (x.detach().bfloat16() for x in (hidden, weight))
    assert torch.equal(out.logp, linear_logprobs(*low, target, bias=bias.bfloat16()).logp)
    out.logp.sum().backward()
    assert hidden.grad.dtype == torch.float32


def test_second_derivative_raises():
    (hidden, weight, _, _), target, _ = make_inputs()
    hidden.requires_grad_()
    (grad,) = torch.autograd.grad(
        linear_logprobs(hidden, weight, target).logp.sum(), hidden, create_graph=True
    )
    with pytest.raises(RuntimeError, match="no second derivative; use reference_linear_logprobs"):
        grad.sum().backward()
