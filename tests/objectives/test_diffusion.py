"""Objectives of diffusion models."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from arcore.objectives import diffusion_loss, variance_bound
from arcore.schedules import VPSchedule, add_noise, target

SCHEDULE = VPSchedule("linear")


def case(t, shape=(4, 6)):
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(shape, generator=generator) * 1.8 - 0.9
    eps, output, variance = (torch.randn(shape, generator=generator) for _ in range(3))
    times = torch.full(shape[:1], t)
    return clean, eps, output, variance, times, add_noise(SCHEDULE, clean, eps, times)


def test_squared_error_of_every_prediction():
    clean, eps, output, _, t, _ = case(300)
    for kind in ("eps", "x0", "v"):
        wanted = target(kind, clean, eps, t, SCHEDULE)
        assert diffusion_loss(wanted, clean, eps, t, SCHEDULE, prediction=kind) == 0
        loss = diffusion_loss(output, clean, eps, t, SCHEDULE, prediction=kind)
        torch.testing.assert_close(loss, (output - wanted).square().mean())
    half = diffusion_loss(output.bfloat16(), clean.bfloat16(), eps.bfloat16(), t, SCHEDULE)
    assert half.dtype == torch.float32
    with pytest.raises(ValueError, match="of one shape"):
        diffusion_loss(output[:, :3], clean, eps, t, SCHEDULE)


@pytest.mark.parametrize("t", [1, 2, 400, 999])
def test_bound_is_a_divergence(t):
    """Against torch's normal distributions, with the posterior written out in float64."""
    clean, _, output, variance, times, noisy = case(t)
    bar, before = SCHEDULE.alphas_cumprod[t], SCHEDULE.alphas_cumprod[t - 1]
    beta = 1 - bar / before
    posterior = beta * (1 - before) / (1 - bar)
    x0 = (noisy.double() - (1 - bar).sqrt() * output.double()) / bar.sqrt()

    def mean(start):
        return (before.sqrt() * beta * start.double() + (1 - beta).sqrt() * (1 - before) * noisy.double()) / (
            1 - bar
        )

    share = (variance.double() + 1) / 2
    width = beta**share * posterior ** (1 - share)
    expected = kl_divergence(
        Normal(mean(clean), posterior.sqrt()), Normal(mean(x0), width.sqrt())
    ) / math.log(2)
    ours = variance_bound(output, variance, clean, noisy, times, SCHEDULE)
    torch.testing.assert_close(ours.double(), expected, rtol=2e-3, atol=1e-4)


def test_bound_of_the_last_step_is_a_likelihood():
    """The probabilities of all 256 values of a pixel add up to 1."""
    levels = torch.linspace(-1, 1, 256)[:, None]
    noisy, output, variance = torch.full((256, 1), 0.3), torch.zeros(256, 1), torch.zeros(256, 1)
    t = torch.zeros(256, dtype=torch.int64)
    bits = variance_bound(output, variance, levels, noisy, t, SCHEDULE)
    probabilities = 2.0**-bits
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-4)
    assert levels[probabilities.argmax()].item() == pytest.approx(0.3, abs=1 / 255)


def test_bound_of_the_last_step_as_released():
    """With the tangent in place of the normal distribution; the other terms are the same."""
    clean, _, output, variance, times, noisy = case(0)
    ours = variance_bound(output, variance, clean, noisy, times, SCHEDULE)
    theirs = variance_bound(output, variance, clean, noisy, times, SCHEDULE, cdf="tanh")
    x0 = (noisy - (1 - SCHEDULE.alphas_cumprod[0]).sqrt().float() * output) / SCHEDULE.alphas_cumprod[
        0
    ].sqrt().float()
    beta0, beta1 = SCHEDULE.betas[:2]
    narrow = beta1 * (1 - SCHEDULE.alphas_cumprod[0]) / (1 - SCHEDULE.alphas_cumprod[1])
    share = (variance.double() + 1) / 2
    width = (share * beta0.log() + (1 - share) * narrow.log()).div(2).exp()

    def below(edge):
        z = (edge - x0.double()) / width
        return (1 + torch.tanh((2 / math.pi) ** 0.5 * (z + 0.044715 * z**3))) / 2

    expected = -(below(clean + 1 / 255) - below(clean - 1 / 255)).clamp(min=1e-12).log2()
    torch.testing.assert_close(theirs.double(), expected, rtol=1e-3, atol=1e-3)
    assert (theirs - ours).abs().max() > 1e-4
    later = case(5)
    both = [
        variance_bound(*(later[i] for i in (2, 3, 0, 5, 4)), SCHEDULE, cdf=cdf) for cdf in ("exact", "tanh")
    ]
    assert torch.equal(*both)
    with pytest.raises(ValueError, match="cdf to be one of 'exact', 'tanh'"):
        variance_bound(output, variance, clean, noisy, times, SCHEDULE, cdf="fast")


def test_bound_teaches_the_variance_only():
    clean, _, output, variance, times, noisy = case(50)
    output.requires_grad_()
    variance.requires_grad_()
    variance_bound(output, variance, clean, noisy, times, SCHEDULE).sum().backward()
    assert output.grad is None
    assert variance.grad.ne(0).all()
