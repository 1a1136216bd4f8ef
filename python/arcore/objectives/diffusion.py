"""Objectives of diffusion models."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from arcore.nn.kinds import check_kinds
from arcore.schedules import NoiseSchedule, Prediction, VPSchedule, broadcast_time, target, to_x0


@check_kinds
def diffusion_loss(
    output: Tensor,
    clean: Tensor,
    eps: Tensor,
    t: Tensor,
    schedule: NoiseSchedule,
    *,
    prediction: Prediction = "eps",
    weight: Tensor | None = None,
) -> Tensor:
    """Mean squared error of what a network predicts (DDPM, arXiv:2006.11239, equation 14).

    Args:
        output: of the network, `[..., C]`.
        clean, eps: data and noise, like output.
        t: one time per entry of leading axes.
        schedule: of the noise.
        prediction: what the network predicts.
        weight: factor on the squared error, one per entry of leading axes; None is 1.

    Returns:
        Scalar, float32.

    Raises:
        ValueError: shapes do not fit.
    """
    if not output.shape == clean.shape == eps.shape:
        raise ValueError(
            f"expected output, data and noise of one shape but got {tuple(output.shape)}, {tuple(clean.shape)} and "
            f"{tuple(eps.shape)}"
        )
    wanted = target(prediction, clean, eps, t, schedule).float()
    if weight is None:
        return mse_loss(output.float(), wanted)
    return (broadcast_time(weight, output) * (output.float() - wanted).square()).mean()


@check_kinds
def variance_bound(
    output: Tensor,
    variance: Tensor,
    clean: Tensor,
    noisy: Tensor,
    t: Tensor,
    schedule: VPSchedule,
    *,
    cdf: Literal["exact", "tanh"] = "exact",
) -> Tensor:
    """The variational bound as a function of a learned variance (arXiv:2102.09672, section 3.1).

    For t > 0 the divergence from the true distribution one step cleaner to the predicted one; for t = 0 minus the
    logarithm of the probability of the data in bins of width 2 / 255, data of 8 bits from -1 to 1. The prediction of
    the noise takes no gradient from it.

    Args:
        output: predicted noise, `[..., C]`.
        variance: v of `arcore.schedules.DDPM`, like output.
        clean, noisy: like output.
        t: one time per entry of leading axes, at least 0.
        schedule: of the noise.
        cdf: of the normal distribution at t = 0: `"exact"`, or the approximation by a hyperbolic tangent that the
            released code of DiT and MAR computes with. They differ by 2e-4 to 5e-3 relative.

    Returns:
        float32 like output, in bits.

    Raises:
        ValueError: an unknown `cdf`, or shapes do not fit.
    """
    for name, value in (("variance", variance), ("clean", clean), ("noisy", noisy)):
        if value.shape != output.shape:
            raise ValueError(
                f"expected {name} of output's shape {tuple(output.shape)} but got {tuple(value.shape)}"
            )
    x0 = to_x0("eps", output.detach().float(), noisy.float(), t, schedule)
    bar, before = (schedule.alpha_bar(step) for step in (t, t - 1))
    beta = 1 - bar / before
    # At t = 0 the posterior has no width; the one of t = 1 stands in.
    first = torch.minimum(torch.ones_like(t), torch.full_like(t, schedule.num_steps - 1))
    narrow = beta * (1 - before) / (1 - bar)
    bar1, before1 = schedule.alpha_bar(first), schedule.alpha_bar(first - 1)
    narrow = torch.where(t > 0, narrow, (1 - bar1 / before1) * (1 - before1) / (1 - bar1))

    def spread(factor: Tensor) -> Tensor:
        return broadcast_time(factor, x0).float()

    on_x0, on_x = beta * before.sqrt() / (1 - bar), (1 - before) * (1 - beta).sqrt() / (1 - bar)
    true_mean = spread(on_x0) * clean.float() + spread(on_x) * noisy.float()
    mean = spread(on_x0) * x0 + spread(on_x) * noisy.float()
    share = (variance.float() + 1) / 2
    log_variance = share * spread(beta.log()) + (1 - share) * spread(narrow.log())
    log_true = spread(narrow.log())
    divergence = 0.5 * (
        log_variance
        - log_true
        - 1
        + torch.exp(log_true - log_variance)
        + (true_mean - mean).square() * torch.exp(-log_variance)
    )
    inverse = torch.exp(-0.5 * log_variance)

    def below(edge: Tensor) -> Tensor:
        z = (edge - mean) * inverse
        if cdf == "tanh":
            return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
        probability: Tensor = torch.special.ndtr(z)
        return probability

    data, half = clean.float(), 1 / 255
    upper = torch.where(data > 0.999, 1.0, below(data + half))
    lower = torch.where(data < -0.999, 0.0, below(data - half))
    likelihood = -(upper - lower).clamp(min=1e-12).log()
    bits: Tensor = torch.where(spread(t.double()) > 0, divergence, likelihood) / math.log(2)
    return bits
