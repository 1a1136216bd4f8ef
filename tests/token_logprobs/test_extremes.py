"""Numbers that float32 has no room for, other layouts, other devices, wrong values."""

from __future__ import annotations

import math
import re

import pytest
import torch

from arcore.ops import linear_logprobs, reference_token_logprobs, token_logprobs

EXTREMES = [
    {"temperature": 1e-40}, {"temperature": 1e-300}, {"temperature": 1e46},
    {"temperature": 1.7e308}, {"softcap": 1e300}, {"softcap": 1e-40}, {"softcap": 1e-300},
    {"softcap": 1e-35, "temperature": 1e-35}, {"temperature": torch.tensor([1e-39, 1e38, 1.0])},
]  # fmt: skip


@pytest.mark.parametrize("columns", [1, 48, 50, 2100])
@pytest.mark.parametrize("options", EXTREMES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_positive_temperature_and_softcap(columns, options, dtype):
    torch.manual_seed(columns)
    x = torch.randn(3, columns).to(dtype)
    x[1, 0] = -math.inf if columns > 1 else 0.5
    target = x.argmax(-1)
    mask = torch.rand(3, columns) < 0.9
    mask.scatter_(1, target[:, None], True)
    for kept in (None, mask):
        kw = {**options, "mask": kept, "return_entropy": True}
        a, b = x.clone().requires_grad_(), x.double().requires_grad_()
        got, exact = token_logprobs(a, target, **kw), reference_token_logprobs(b, target, **kw)
        for name in ("logp", "entropy", "logsumexp"):
            want = getattr(exact, name)
            torch.testing.assert_close(getattr(got, name), want.float(), rtol=2e-6, atol=2e-6)
        got.logp.sum().backward()
        assert not a.grad.isnan().any()
        exact.logp.sum().backward()
        want = b.grad.nan_to_num(0.0).float().to(dtype)
        torch.testing.assert_close(a.grad, want, rtol=1e-2 if dtype != torch.float32 else 2e-5, atol=1e-6)


def test_rows_of_one_temperature_do_not_change_the_others():
    x, target = torch.randn(4, 100), torch.randint(100, (4,))
    mixed = token_logprobs(x, target, temperature=torch.tensor([1.0, 1e-39, 0.7, 1e38])).logp
    plain = token_logprobs(x, target, temperature=torch.tensor([1.0, 1.0, 0.7, 1.0])).logp
    assert torch.equal(mixed[[0, 2]], plain[[0, 2]])


@pytest.mark.parametrize("compiled", [False, True])
def test_overlapping_views_have_a_gradient(compiled):
    """Windows over one buffer: empty_like of such a view has another layout than the kernel writes."""

    def loss(buffer):
        return token_logprobs(buffer.unfold(0, 50, 1), torch.zeros(11, dtype=torch.int64)).logp.sum()

    call = torch.compile(loss, backend="aot_eager", fullgraph=True) if compiled else loss
    buffer = torch.randn(60, requires_grad=True)
    call(buffer).backward()
    exact = buffer.detach().double().requires_grad_()
    windows = exact.unfold(0, 50, 1)
    reference_token_logprobs(windows, torch.zeros(11, dtype=torch.int64)).logp.sum().backward()
    torch.testing.assert_close(buffer.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)
    rows = torch.randn(1, 50, requires_grad=True)
    token_logprobs(rows.expand(4, 50), torch.arange(4)).logp.sum().backward()
    assert rows.grad.isfinite().all()


def test_wrong_values_are_value_errors():
    x = torch.randn(2, 3, 70)
    for bad in (-1, 70, 2**40):
        target = torch.zeros(2, 3, dtype=torch.int64)
        target[1, 0] = bad
        text = f"expected targets in [0, 70) or ignore_index=-100 but got {bad} in row 3"
        with pytest.raises(ValueError, match=re.escape(f"arcore.token_logprobs: {text}")):
            token_logprobs(x, target)
        with pytest.raises(ValueError, match=re.escape(text)):
            linear_logprobs(torch.randn(2, 3, 8), torch.randn(70, 8), target)
    with pytest.raises(ValueError, match="temperature to be positive and finite but got nan in row 1"):
        token_logprobs(x[0], target[0].clamp(max=5), temperature=torch.tensor([1.0, math.nan, 1.0]))
    for index in (-100.0, 2.5, True):
        with pytest.raises(TypeError, match="expected ignore_index to be an integer"):
            token_logprobs(x, torch.zeros(2, 3, dtype=torch.int64), ignore_index=index)
    with pytest.raises(TypeError, match=r"expected tile to be an integer but got 4\.5"):
        linear_logprobs(
            torch.randn(3, 8), torch.randn(70, 8), torch.zeros(3, dtype=torch.int64), tile=(4.5, 32)
        )
    with pytest.raises(TypeError, match="expected temperature to be a number or a tensor but got 'hot'"):
        token_logprobs(x, torch.zeros(2, 3, dtype=torch.int64), temperature="hot")


def test_other_devices():
    x, target, weight = torch.randn(3, 8), torch.zeros(3, dtype=torch.int64), torch.randn(50, 8)
    for name, value in (
        ("target", target.to("meta")),
        ("mask", torch.ones(8, device="meta").bool()),
        ("temperature", torch.ones(3, device="meta")),
    ):
        with pytest.raises(ValueError, match=f"expected {name} on the device of .*, cpu, but got meta"):
            token_logprobs(**{"logits": x, "target": target, name: value})
    for name, value in (("weight", weight.to("meta")), ("bias", torch.zeros(50, device="meta"))):
        with pytest.raises(ValueError, match=f"expected {name} on the device of hidden, cpu, but got meta"):
            linear_logprobs(**{"hidden": x, "weight": weight, "target": target, name: value})
    with pytest.raises(ValueError, match="expected target on the device of logits"):
        torch.ops.arcore.token_logprobs(x, target.to("meta"), None, None, 1.0, 0.0, -100, False)
    with pytest.raises(ValueError, match="expected state on the device of logits"):
        state = torch.zeros(3, 4, dtype=torch.float64, device="meta")
        torch.ops.arcore.token_logprobs_backward(
            torch.ones(3), None, None, x, target, None, None, state, 1.0, 0.0, -100
        )
    for dtype in (torch.float32, torch.bfloat16):
        meta = [t.to("meta") for t in (x.to(dtype), weight.to(dtype), target)]
        out = linear_logprobs(*meta, return_entropy=True)
        assert out.entropy.is_meta and out.logp.shape == (3,)


def test_a_tile_ends_within_the_vocabulary():
    state, target = torch.zeros(4, 4, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    mask = torch.ones(4, 1, dtype=torch.int32)
    for first, vocab in ((2**63 - 64, 10), (2**62, -1), (32, 64), (-32, 64), (0, 2**63 - 1)):
        call = (torch.randn(4, 64), target, None, mask, 1.0, 0.0, -100, first, vocab, False, state)
        with pytest.raises(RuntimeError, match="arcore::token_logprobs_update_: expected"):
            torch.ops.arcore.token_logprobs_update_(*call)
    for first, vocab in ((2**63 - 64, 10), (32, 64)):
        with pytest.raises(RuntimeError, match="ends by vocab="):
            torch.ops.arcore.token_logprobs_tile_backward_(
                torch.ones(4), None, None, torch.randn(4, 64), target, None, mask, state, 1.0, 0.0, -100, first,
                vocab, False,
            )  # fmt: skip


def test_how_far_a_row_of_linear_logprobs_depends_on_its_batch():
    """The products are torch's: a row alone and in a batch may differ by rounding, and by no more."""
    torch.manual_seed(0)
    hidden, weight, target = torch.randn(37, 64), torch.randn(3000, 64), torch.randint(3000, (37,))
    whole = linear_logprobs(hidden, weight, target).logp
    alone = torch.cat([linear_logprobs(hidden[i : i + 1], weight, target[i : i + 1]).logp for i in range(37)])
    assert (whole - alone).abs().max() < 4e-6 * whole.abs().max()
