"""The kernel against float64: values, gradients, dtypes, lengths, layouts, kept sets, edge rows."""

from __future__ import annotations

import math

import pytest
import torch

from arcore.ops import reference_token_logprobs, token_logprobs
from tests.token_logprobs.cases import (
    IGNORE,
    assert_as_good_as_eager,
    assert_possible,
    bits,
    make_case,
    pack_mask,
    random_mask,
    run,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0, 30.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7, "rows"])
def test_options(dtype, softcap, temperature):
    rows = torch.rand(2, 5, generator=torch.Generator().manual_seed(2)) + 0.3
    case = make_case(
        2, 5, 2500, dtype=dtype, softcap=softcap, temperature=rows if temperature == "rows" else temperature
    )
    case.target[0, 1] = IGNORE
    assert_as_good_as_eager(case)
    assert_as_good_as_eager(case, entropy=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "vocab", [1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 127, 1000, 2047, 2048, 2049, 6151]
)
def test_lengths(vocab, dtype):
    assert_as_good_as_eager(make_case(3, vocab, dtype=dtype))
    kept = random_mask(3, vocab, share=0.7)
    for mask in (kept, pack_mask(kept)):
        assert_as_good_as_eager(make_case(3, vocab, dtype=dtype, mask=mask, softcap=10.0))


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 30.0, 1e4])
def test_large_vocabulary(scale):
    assert_as_good_as_eager(make_case(3, 128256, scale=scale))


def test_confident_rows():
    """The targets of sharp rows are the likely ones: log-probabilities near 0 stay there."""
    case = make_case(50, 5000, scale=15.0)
    case.target = case.logits.argmax(-1)
    assert_as_good_as_eager(case)


def test_uniform_rows_are_exact():
    for vocab in (1, 10, 4096, 128256):
        out = token_logprobs(torch.full((2, vocab), -3.25), torch.tensor([0, vocab - 1]), return_entropy=True)
        expected = torch.tensor([math.log(vocab)] * 2)
        assert torch.equal(out.entropy, expected)
        assert torch.equal(out.logp, -expected)


@pytest.mark.parametrize("order", ["up", "down"])
def test_growing_and_falling_maximum(order):
    """Every block has a new maximum, or none after the first."""
    logits = torch.linspace(-200, 200, 20000).repeat(2, 1)
    case = make_case(2, 20000)
    case.logits = logits if order == "up" else logits.flip(-1).contiguous()
    case.target = torch.tensor([19990, 100])
    assert_as_good_as_eager(case)


@pytest.mark.parametrize("level", [-1e30, 1e30, -3e38])
def test_extreme_levels(level):
    """Rows far from zero are as good as rows around it."""
    logits = torch.full((1, 100), level)
    out = token_logprobs(logits, torch.tensor([3]), return_entropy=True)
    assert out.logp.item() == pytest.approx(-math.log(100), rel=1e-6)
    assert out.entropy.item() == pytest.approx(math.log(100), rel=1e-6)
    assert out.logsumexp.item() == pytest.approx(level)


@pytest.mark.parametrize("kind", ["bool", "bits"])
@pytest.mark.parametrize("shape", [(4, 3, 700), (700,), (3, 700), (4, 1, 700)])
def test_broadcast_masks(kind, shape):
    kept = random_mask(*shape)
    mask = kept if kind == "bool" else pack_mask(kept)
    assert_as_good_as_eager(make_case(4, 3, 700, mask=mask))


def test_masks_of_both_kinds_agree_bit_by_bit():
    kept = random_mask(5, 1234, share=0.02)
    kept[2] = False
    case = make_case(5, 1234, mask=kept)
    expected = bits(run(token_logprobs, case, torch.float32))
    case.options["mask"] = pack_mask(kept)
    for a, b in zip(bits(run(token_logprobs, case, torch.float32)), expected, strict=True):
        assert torch.equal(a, b)
    case.options["mask"] = None
    case.logits = torch.where(kept, case.logits, -math.inf)
    for a, b in zip(bits(run(token_logprobs, case, torch.float32)), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_change_no_bit(dtype):
    case = make_case(3, 4, 501, dtype=dtype)
    expected = bits(run(token_logprobs, case, dtype))
    wide = torch.full((3, 9, 4, 510), math.nan, dtype=dtype)
    wide[:, 2, :, 3:504] = case.logits
    logits = wide[:, 2, :, 3:504].requires_grad_()
    out = token_logprobs(logits, case.target, return_entropy=True)
    (grad,) = torch.autograd.grad(list(out), logits, case.cotangents)
    got = [out.logp, out.logsumexp, grad, out.entropy]
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
    swapped = case.logits.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(token_logprobs(swapped, case.target).logp, expected[0])
    shifted = token_logprobs(case.logits[:, :-1], case.target[:, :-1])
    assert torch.equal(shifted.logp, expected[0][:, :-1])
    one = case.logits[:1, :1].expand(3, 4, 501)
    assert torch.equal(token_logprobs(one, case.target).logsumexp, expected[1][:1, :1].expand(3, 4))


def test_expanded_gradients():
    """Gradients with stride 0, as sum() makes them."""
    case = make_case(6, 300)
    logits = case.logits.requires_grad_()
    (got,) = torch.autograd.grad(token_logprobs(logits, case.target).logp.sum(), logits)
    (expected,) = torch.autograd.grad(token_logprobs(logits, case.target).logp, logits, torch.ones(6))
    assert torch.equal(got, expected)


def test_each_output_alone():
    case = make_case(4, 900, temperature=torch.tensor([0.5, 1.0, 1.5, 2.0]), softcap=8.0)
    for index in range(3):
        logits = case.logits.clone().requires_grad_()
        got = token_logprobs(logits, case.target, return_entropy=True, **case.options)[index]
        exact_logits = case.logits.double().requires_grad_()
        exact = reference_token_logprobs(exact_logits, case.target, return_entropy=True, **case.options)[
            index
        ]
        (a,) = torch.autograd.grad(got, logits, case.cotangents[index])
        (b,) = torch.autograd.grad(exact, exact_logits, case.cotangents[index].double())
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-7)


def test_no_rows_and_no_columns():
    out = token_logprobs(torch.empty(0, 50), torch.empty(0, dtype=torch.long), return_entropy=True)
    assert [x.shape for x in out] == [(0,)] * 3
    logits = torch.empty(3, 0, requires_grad=True)
    out = token_logprobs(logits, torch.full((3,), IGNORE))
    out.logp.sum().backward()
    assert logits.grad.shape == (3, 0)
    assert (out.logsumexp == 0).all()
    single = token_logprobs(torch.randn(50), torch.tensor(3))
    assert single.logp.shape == ()


def test_integer_targets():
    case = make_case(5, 40)
    expected = token_logprobs(case.logits, case.target).logp
    assert torch.equal(token_logprobs(case.logits, case.target.int()).logp, expected)
    every_other = torch.stack([case.target, case.target + 1], 1)[:, 0]
    assert torch.equal(token_logprobs(case.logits, every_other).logp, expected)


def test_masked_vocabulary():
    """-inf logits take no part; a target among them gives -inf without a gradient."""
    case = make_case(4, 3000)
    case.logits[:, 1000:] = -math.inf
    case.target[:] = torch.tensor([3, 999, 1000, 2999])
    assert_as_good_as_eager(case)
    results = run(token_logprobs, case, torch.float32)
    assert (results["logp"][2:] == -math.inf).all()
    assert (results["grad_logits"][:, 1000:] == 0).all()


@pytest.mark.parametrize("kind", ["bool", "bits", "minus_infinity"])
def test_rows_that_keep_nothing(kind):
    kept = torch.ones(3, 77, dtype=torch.bool)
    kept[1] = False
    case = make_case(3, 77)
    if kind == "minus_infinity":
        case.logits[1] = -math.inf
    else:
        case.options["mask"] = kept if kind == "bool" else pack_mask(kept)
    assert_as_good_as_eager(case)
    results = run(token_logprobs, case, torch.float32)
    assert results["logp"][1] == results["logsumexp"][1] == -math.inf
    assert results["entropy"][1] == 0
    assert (results["grad_logits"][1] == 0).all()


@pytest.mark.parametrize("place", [0, 5, 2047, 2048, 4000])
@pytest.mark.parametrize("rest", ["numbers", "minus_infinity"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_stays_in_its_row(place, rest, value):
    case = make_case(3, 4001)
    clean = run(token_logprobs, case, torch.float32)
    if rest == "minus_infinity":
        case.logits[1] = -math.inf
    case.logits[1, place] = value
    dirty = run(token_logprobs, case, torch.float32)
    for name in clean:
        assert torch.equal(dirty[name][[0, 2]], clean[name][[0, 2]]), name
        assert dirty[name][1].isnan().any(), name
    assert dirty["logp"][1].isnan()


def test_masked_nan_is_never_seen():
    kept = random_mask(3, 500)
    case = make_case(3, 500, mask=kept)
    expected = bits(run(token_logprobs, case, torch.float32))
    case.logits[~kept] = math.nan
    for a, b in zip(bits(run(token_logprobs, case, torch.float32)), expected, strict=True):
        assert torch.equal(a, b)


def test_ignored_rows_are_not_read():
    case = make_case(3, 500)
    case.target[1] = IGNORE
    case.logits[1] = math.nan
    results = run(token_logprobs, case, torch.float32)
    assert all((x[1] == 0).all() for x in results.values())
    case.options["ignore_index"] = -1
    case.target[1] = -1
    assert all((x[1] == 0).all() for x in run(token_logprobs, case, torch.float32).values())


def test_an_ignored_column_may_be_a_real_one():
    """ignore_index=0 (padding id) skips rows whose target is 0, as cross_entropy does."""
    case = make_case(3, 50, ignore_index=0)
    case.target[:] = torch.tensor([0, 1, 0])
    out = token_logprobs(case.logits, case.target, ignore_index=0)
    assert out.logp[0] == out.logp[2] == 0
    assert out.logp[1] < 0


def test_agrees_with_cross_entropy():
    case = make_case(20, 1000)
    case.target[::3] = IGNORE
    logits = case.logits.requires_grad_()
    loss = -token_logprobs(logits, case.target).logp
    expected = torch.nn.functional.cross_entropy(logits, case.target, reduction="none")
    torch.testing.assert_close(loss, expected)
    (a,) = torch.autograd.grad(loss.sum(), logits)
    (b,) = torch.autograd.grad(expected.sum(), logits)
    torch.testing.assert_close(a, b)


def test_invariants_over_many_rows():
    for dtype in DTYPES:
        for scale in (0.1, 3.0, 50.0):
            case = make_case(2000, 33, dtype=dtype, scale=scale)
            assert_possible(run(token_logprobs, case, dtype), 33)


def test_gradient_rows_sum_to_the_cotangent_of_logsumexp():
    """The other two outputs do not change when a constant is added to a row."""
    case = make_case(8, 5000)
    grad = run(token_logprobs, case, torch.float32)["grad_logits"]
    torch.testing.assert_close(grad.double().sum(-1).float(), case.cotangents[1], rtol=1e-4, atol=1e-5)


def test_no_gradient_without_need():
    case = make_case(3, 50)
    assert not token_logprobs(case.logits, case.target).logp.requires_grad
    temperature = torch.ones(3, requires_grad=True)
    token_logprobs(case.logits, case.target, temperature=temperature).logp.sum().backward()
    assert temperature.grad is not None


def test_second_derivative_raises():
    case = make_case(3, 50)
    logits = case.logits.requires_grad_()
    (grad,) = torch.autograd.grad(token_logprobs(logits, case.target).logp.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; use reference_token_logprobs"):
        grad.sum().backward()
