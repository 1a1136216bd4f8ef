"""What the claims of forecasting systems share: a short training on windows, and errors on held-out ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from arcore.catalog.claims import steps
from arcore.data.series import Series, SeriesWindows


def fit(
    model: Any,
    windows: SeriesWindows,
    *,
    count: int,
    batch: int = 32,
    lr: float = 1e-3,
    seed: int = 0,
    what: str = "training",
    objective: Callable[[Tensor, Tensor], tuple[Tensor, Any]] | None = None,
) -> nn.Module:
    """Train a model on windows drawn at random with AdamW and a rate that falls along a half cosine.

    Args:
        model: a `ForecastModel` (`arcore.recipes.forecasting`).
        windows: training windows.
        count: steps.
        batch: windows of a step.
        lr: highest rate.
        seed: of the draws.
        what: is being done, for the progress.
        objective: loss of values and calendars; the model's own when None.

    Returns:
        The model, in evaluation mode.
    """
    objective = objective or model.objective
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, count)
    model.train()
    for _ in steps(count, what):
        chosen = torch.randint(len(windows), (batch,), generator=generator).tolist()
        values, dates = stacked(windows, chosen)
        loss, _ = objective(values, dates)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    out: nn.Module = model.eval()
    return out


def stacked(windows: SeriesWindows, chosen: list[int]) -> tuple[Tensor, Tensor]:
    """Values `[B, L, C]` and calendars `[B, L, 5]` of some windows."""
    picked = [windows[i] for i in chosen]
    return torch.stack([w.values for w in picked]), torch.stack([w.calendar for w in picked])


@torch.no_grad()
def held_out_errors(
    model: Any, series: list[Series], horizon: int, *, held_out: float = 0.2
) -> tuple[float, float]:
    """Mean squared errors over all held-out windows: of the model, and of the last value.

    Args:
        model: a `ForecastModel` in evaluation mode.
        series: the series.
        horizon: rows that are predicted.
        held_out: share of the rows, the last ones.
    """
    windows = SeriesWindows(
        series,
        length=model.context + horizon,
        horizon=horizon,
        split="test",
        held_out=held_out,
        normalise=model.normalise,
    )
    values, dates = stacked(windows, list(range(len(windows))))
    past, future = values[:, : model.context], values[:, model.context :]
    # In the scale of the training rows, so that windows weigh alike.
    scale = torch.stack([windows[i].std for i in range(len(windows))]).unsqueeze(1) / windows.std.float()
    found = model.forecast(past, dates, horizon)
    return tuple(  # type: ignore[return-value]
        float(((one - future) * scale).square().mean()) for one in (found, past[:, -1:].expand_as(future))
    )
