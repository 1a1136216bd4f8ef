"""The claim of private forecasts: laws of noise and budget, and errors on flights."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from arcore.catalog.claims import Claim, Row, at_least, at_most, steps
from arcore.data.load_series import load_series
from arcore.data.series import SeriesWindows
from arcore.zoo.series._fitting import stacked
from arcore.zoo.series.dp_mobility import MobilityForecaster, dp_mobility_tiny
from arcore.zoo.series.dp_mobility.privacy import (
    clipped_gradients,
    noise_multiplier,
    private_gradients,
    spent,
)


def claim(*, quick: bool) -> Claim:
    """Norms, noise and budgets; with training, the errors of both private ways over that without privacy."""
    torch.manual_seed(0)
    model = MobilityForecaster(dp_mobility_tiny())
    rows, dates = 30 * torch.rand(20, 7, 6), torch.ones(20, 7, 5, dtype=torch.int64)
    _, norms = clipped_gradients(model, rows, dates, 0.05)
    clean, _ = private_gradients(model, rows, dates, limit=0.05, noise=0.0, expected=20)
    noisy, _ = private_gradients(model, rows, dates, limit=0.05, noise=2.0, expected=20)
    drawn = torch.cat([(noisy[name] - clean[name]).flatten() for name in clean])
    budgets = [spent(1.1, 1e-5, 0.02, count) for count in (1, 10, 100, 1000)]
    found = [
        at_most("largest norm of a sample's gradient over the limit", norms.max() / 0.05, 1 + 1e-5),
        at_most(
            "deviation of the noise over sigma C / B, less 1",
            abs(float(drawn.std()) / (2 * 0.05 / 20) - 1),
            0.03,
        ),
        at_least(
            "least growth of epsilon with the steps",
            min(b - a for a, b in pairwise(budgets)),
            1e-6,
        ),
        at_most("Renyi budget by the formula less that of opacus, relative", _renyi_difference(), 1e-6),
        at_most("the same for full batches: order / (2 sigma^2)", _full_batch_difference(), 1e-9),
    ]
    if quick:
        return Claim(tuple(found))
    return Claim((*found, *_errors()))


def _renyi_difference() -> float:
    """Largest relative difference for whole orders of the subsampled Gaussian."""
    from math import comb, exp, log

    from opacus.accountants.analysis.rdp import compute_rdp

    worst = 0.0
    for rate, noise in ((0.01, 1.0), (0.1, 2.0), (0.5, 5.0)):
        for order in (2, 3, 8, 20):
            terms = [
                comb(order, k) * (1 - rate) ** (order - k) * rate**k * exp((k * k - k) / (2 * noise**2))
                for k in range(order + 1)
            ]
            ours = log(sum(terms)) / (order - 1)
            theirs = float(compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=[order])[0])
            worst = max(worst, abs(ours - theirs) / theirs)
    return worst


def _full_batch_difference() -> float:
    from opacus.accountants.analysis.rdp import compute_rdp

    return max(
        abs(
            float(compute_rdp(q=1.0, noise_multiplier=noise, steps=1, orders=[order])[0])
            - order / (2 * noise**2)
        )
        for noise in (0.7, 2.0)
        for order in (2, 5, 32)
    )


def _errors(count: int = 250, batch: int = 512) -> list[Row]:
    """Root mean squared errors on held-out hours of flights, private over not."""
    from arcore.zoo.series.dp_mobility.recipe import MOMENTUM, SGD_RATE, NoisyCounts

    series = load_series("regional_departures")
    shape: dict[str, Any] = {"length": 7, "horizon": 1, "held_out": 0.2, "normalise": None}
    train, test = (SeriesWindows(series, split=split, **shape) for split in ("train", "test"))
    clean = stacked(train, list(range(len(train))))
    held_out, days = stacked(test, list(range(len(test))))
    spread = float(series[0].values.std(0).mean())
    # The budget per count at which the noise is 2 % of the counts' deviation.
    noisy = NoisyCounts(train, 0.02 * spread, 0)
    picked = [noisy[i].values for i in range(len(train))]
    noise = noise_multiplier(8.0, 1e-5, batch / len(train), count)

    def error(name: str, rows: Tensor, private: float | None) -> float:
        torch.manual_seed(0)
        model = MobilityForecaster(dp_mobility_tiny())
        optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        if private is not None:
            optimizer = torch.optim.SGD(model.parameters(), lr=SGD_RATE * 5e-3, momentum=MOMENTUM)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, count)
        for _ in steps(count, f"training, privacy: {name}"):
            chosen = torch.rand(len(rows)) < batch / len(rows)
            part = (rows[chosen], clean[1][chosen])
            optimizer.zero_grad()
            if private is None:
                model.objective(*part)[0].backward()
            else:
                found, _ = private_gradients(model, *part, limit=1.0, noise=private, expected=batch)
                for key, parameter in model.named_parameters():
                    parameter.grad = found[key]
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            out = model.forecast(held_out[:, :6], days, 1)[:, 0]
        return float((out - held_out[:, 6]).square().mean().sqrt())

    base = error("none", clean[0], None)
    by_input = error("input", torch.stack(picked), None)
    by_gradient = error("gradient", clean[0], noise)
    return [
        at_most("error with noise of 2 % on the counts over that without", by_input / base, 1.05),
        at_most("error with private gradients, epsilon 8, over that without", by_gradient / base, 1.1),
    ]
