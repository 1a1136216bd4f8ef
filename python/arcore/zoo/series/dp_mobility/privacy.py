"""Noise on gradients and on counts, and the privacy that it buys."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from arcore._optional import require

# Orders of Renyi divergence that budgets are the least over.
ORDERS = (*(1 + x / 10 for x in range(1, 100)), *range(12, 257))


def clipped_gradients(
    model: nn.Module, rows: Tensor, dates: Tensor, limit: float
) -> tuple[dict[str, Tensor], Tensor]:
    """The sum over samples of their gradients, each scaled down to a norm of at most `limit`.

    Args:
        model: with an `objective`.
        rows: windows `[B, L, C]`; B may be 0.
        dates: calendars `[B, L, 5]`.
        limit: largest norm C of a sample's gradient, over all parameters together.

    Returns:
        Sums by name of the parameter, and the norms `[B]` after clipping.
    """
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    if not len(rows):
        return {name: torch.zeros_like(value) for name, value in weights.items()}, rows.new_zeros(0)

    def loss(weights: dict[str, Tensor], row: Tensor, date: Tensor) -> Tensor:
        out: Tensor = functional_call(
            _Objective(model), {f"model.{k}": v for k, v in weights.items()}, (row, date)
        )
        return out

    found: dict[str, Tensor] = vmap(grad(loss), in_dims=(None, 0, 0))(weights, rows, dates)
    norms = torch.stack([one.flatten(1).square().sum(1) for one in found.values()]).sum(0).sqrt()
    factor = (limit / norms.clamp(min=1e-12)).clamp(max=1)
    sums = {name: torch.einsum("b,b...->...", factor, one) for name, one in found.items()}
    return sums, norms * factor


class _Objective(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, row: Tensor, date: Tensor) -> Tensor:
        loss: Tensor = self.model.objective(row.unsqueeze(0), date.unsqueeze(0))[0]
        return loss


def private_gradients(
    model: nn.Module, rows: Tensor, dates: Tensor, *, limit: float, noise: float, expected: float
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients of DP-SGD: the clipped sum, normal noise of deviation `noise * limit`, over the expected batch.

    Args:
        model, rows, dates, limit: see `clipped_gradients`.
        noise: multiplier sigma.
        expected: mean number of samples of a batch.

    Returns:
        Gradients by name of the parameter, and the samples' norms after clipping.
    """
    sums, norms = clipped_gradients(model, rows, dates, limit)
    made = {name: (one + noise * limit * torch.randn_like(one)) / expected for name, one in sums.items()}
    return made, norms


def noise_multiplier(epsilon: float, delta: float, rate: float, steps: int) -> float:
    """The noise that spends a budget of (epsilon, delta) in so many steps, by the RDP accountant of opacus.

    Args:
        epsilon, delta: the budget.
        rate: probability that a sample is in a batch.
        steps: optimiser steps.

    Raises:
        ValueError: a number is out of range, or no noise is enough.
        ImportError: opacus is missing.
    """
    check_budget(epsilon, delta)
    utils = require("opacus.accountants.utils", extra="private")
    found: float = utils.get_noise_multiplier(
        target_epsilon=epsilon, target_delta=delta, sample_rate=rate, steps=steps, accountant="rdp"
    )
    return found


def spent(noise: float, delta: float, rate: float, steps: int) -> float:
    """The epsilon that so many steps with this noise have spent, by opacus."""
    analysis = require("opacus.accountants.analysis.rdp", extra="private")
    cost = analysis.compute_rdp(q=rate, noise_multiplier=noise, steps=steps, orders=ORDERS)
    epsilon, _ = analysis.get_privacy_spent(orders=ORDERS, rdp=cost, delta=delta)
    return float(epsilon)


def gaussian_sigma(epsilon: float, delta: float, sensitivity: float = 1.0) -> float:
    """Deviation of the least normal noise that makes a number (epsilon, delta)-private (Balle and Wang 2018).

    Raises:
        ValueError: a number is out of range.
        ImportError: scipy is missing.
    """
    check_budget(epsilon, delta)
    normal = require("scipy.stats", extra="private").norm
    optimize = require("scipy.optimize", extra="private")

    def excess(log_sigma: float) -> float:
        sigma = math.exp(log_sigma)
        half, shift = 1 / (2 * sigma), epsilon * sigma
        second = math.exp(epsilon + normal.logcdf(-half - shift))
        return float(normal.cdf(half - shift)) - second - delta

    return sensitivity * math.exp(optimize.brentq(excess, -12.0, 20.0, xtol=1e-12))


def check_budget(epsilon: float, delta: float) -> None:
    """Raise ValueError unless epsilon > 0 and 0 < delta < 1."""
    if not 0 < epsilon < math.inf:
        raise ValueError(
            f"epsilon must be a number above 0 but got {epsilon}: 8 is weak, 1 is strong privacy"
        )
    if not 0 < delta < 1:
        raise ValueError(
            f"delta must lie between 0 and 1, far below 1 over the number of samples, but got {delta}"
        )
