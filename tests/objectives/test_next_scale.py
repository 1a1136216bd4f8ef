"""The next-scale loss against its formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from arcore.objectives import next_scale_loss


@pytest.fixture
def case():
    logits = torch.randn(2, 14, 5, dtype=torch.float64, requires_grad=True)
    indices = [torch.randint(5, (2, n)) for n in (1, 4, 9)]
    return logits, indices


def losses(logits, indices, smoothing=0.0):
    log_p = logits.float().log_softmax(-1)
    target = F.one_hot(torch.cat(indices, 1), 5) * (1 - smoothing) + smoothing / 5
    return -(log_p * target).sum(-1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mean_over_tokens(case, smoothing):
    logits, indices = case
    loss = next_scale_loss(logits, indices, label_smoothing=smoothing)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, losses(logits, indices, smoothing).mean())


def test_weights_are_relative(case):
    logits, indices = case
    plain = next_scale_loss(logits, indices)
    torch.testing.assert_close(next_scale_loss(logits, indices, scale_weights=[3, 3, 3]), plain)
    one, two, three = losses(logits, indices).split([1, 4, 9], dim=1)
    weighted = next_scale_loss(logits, indices, scale_weights=[2.0, 0.0, 1.0])
    torch.testing.assert_close(weighted, (2 * one.sum() + three.sum()) / (2 * 2 + 1 * 18))
    alike = next_scale_loss(logits, indices, scale_weights=[1.0, 1 / 4, 1 / 9])
    torch.testing.assert_close(alike, (one.mean() + two.mean() + three.mean()) / 3)


def test_half_precision_logits_lose_nothing_more(case):
    logits, indices = case
    half = logits.detach().bfloat16()
    torch.testing.assert_close(next_scale_loss(half, indices), next_scale_loss(half.float(), indices))


def test_gradient(case):
    logits, indices = case
    next_scale_loss(logits, indices).backward()
    expected = (logits.softmax(-1) - F.one_hot(torch.cat(indices, 1), 5)) / 28
    torch.testing.assert_close(logits.grad, expected.detach(), rtol=1e-5, atol=1e-7)


def test_bad_arguments(case):
    logits, indices = case
    with pytest.raises(ValueError, match=r"\(B, L\) = \(2, 14\), the codes given, but got \(2, 13, 5\)"):
        next_scale_loss(logits[:, 1:], indices)
    with pytest.raises(ValueError, match=r"but got \(28, 5\)"):
        next_scale_loss(logits.flatten(0, 1), indices)
    for weights in ([1, 1], [1, -1, 1], [0, 0, 0]):
        with pytest.raises(ValueError, match="expected 3 scale_weights, none negative and one positive"):
            next_scale_loss(logits, indices, scale_weights=weights)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_cross_entropy(smoothing, dtype):
    logits = (3 * torch.randn(2, 14, 300)).to(dtype).requires_grad_()
    indices = [torch.randint(300, (2, n)) for n in (1, 4, 9)]
    plain = logits.detach().clone().requires_grad_()
    expected = F.cross_entropy(
        plain.float().flatten(0, 1), torch.cat(indices, 1).flatten(), label_smoothing=smoothing
    )
    loss = next_scale_loss(logits, indices, label_smoothing=smoothing)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(logits.grad, plain.grad)
