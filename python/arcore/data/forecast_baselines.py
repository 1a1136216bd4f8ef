"""Forecasts that anybody can make, for comparison: last value, seasonal naive, drift, and exponential smoothing."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from arcore._optional import require
from arcore.nn.kinds import Axes, Size, check_kinds

SIMPLE = ("last value", "seasonal naive", "drift")
ETS = "ETS"
# Rows that exponential smoothing is fitted to, and seasons longer than that it leaves out.
ETS_ROWS = 400
ETS_SEASON = 60
History = Annotated[Tensor, Axes("T C", floating=True)]


@check_kinds
def last_value(history: History, horizon: Size) -> Tensor:
    """The last row, again and again: `[T, C]` to `[H, C]`."""
    _check_rows(history)
    return history[-1:].expand(horizon, -1).clone()


@check_kinds
def seasonal_naive(history: History, horizon: Size, season: Size) -> Tensor:
    """The last season, again and again.

    Args:
        history: `[T, C]`, T >= season.
        horizon: rows H to predict.
        season: rows of a season.

    Returns:
        `[H, C]`.

    Raises:
        ValueError: the history is shorter than a season.
    """
    if len(history) < season:
        raise ValueError(f"a season of {season} rows needs as many rows but got {len(history)}")
    return history[len(history) - season + torch.arange(horizon) % season]


@check_kinds
def drift(history: History, horizon: Size) -> Tensor:
    """The line through the first and the last row, continued: `[T, C]` to `[H, C]`."""
    _check_rows(history)
    slope = (history[-1] - history[0]) / max(len(history) - 1, 1)
    return history[-1] + slope * torch.arange(1, horizon + 1).unsqueeze(1)


@check_kinds
def ets(history: History, horizon: Size, season: Size = 1) -> Tensor:
    """Exponential smoothing with a damped trend and, where a season is given, an additive season (statsmodels).

    Each channel by itself, fitted to the last `ETS_ROWS` rows. The season is left out where it is longer than
    `ETS_SEASON` or the history does not hold it twice, and a channel that does not vary is continued as it is.

    Args:
        history: `[T, C]` without missing values.
        horizon: rows H to predict.
        season: rows of a season; 1 for none.

    Returns:
        `[H, C]`.

    Raises:
        ImportError: statsmodels is missing.
    """
    smoothing = require("statsmodels.tsa.holtwinters", extra="series").ExponentialSmoothing
    columns = []
    for channel in history[-ETS_ROWS:].double().T:
        if len(channel) < 8 or bool((channel == channel[0]).all()):
            columns.append(channel[-1:].expand(horizon))
            continue
        seasonal = 1 < season <= ETS_SEASON and len(channel) >= 2 * season
        with warnings.catch_warnings():
            # The optimiser says when it stops early; the fit that it has then is what is compared.
            warnings.simplefilter("ignore")
            model = smoothing(
                channel.numpy(),
                trend="add",
                damped_trend=True,
                seasonal="add" if seasonal else None,
                seasonal_periods=season if seasonal else None,
                initialization_method="estimated",
            )
            columns.append(torch.tensor(model.fit().forecast(horizon)))
    return torch.stack(columns, dim=1).to(history.dtype)


@check_kinds
def baselines(
    history: History, horizon: Size, season: Size = 1, which: Sequence[str] = SIMPLE
) -> dict[str, Tensor]:
    """Forecasts of several baselines.

    Args:
        history: `[T, C]`, oldest first, without missing values.
        horizon: rows H to predict.
        season: rows of a season; below 2 there is no seasonal one.
        which: of `SIMPLE` and `ETS`.

    Returns:
        `[H, C]` by name.

    Raises:
        TypeError, ValueError: the horizon is no positive whole number, the history is empty or has missing values, or
            a name is unknown.
    """
    if not len(history) or bool(history.isnan().any()):
        raise ValueError("baselines need a history of at least one row, without missing values")
    unknown = [name for name in which if name not in (*SIMPLE, ETS)]
    if unknown:
        raise ValueError(f"expected baselines of {', '.join((*SIMPLE, ETS))} but got {unknown[0]!r}")
    made = {}
    for name in which:
        if name == "last value":
            made[name] = last_value(history, horizon)
        elif name == "drift":
            made[name] = drift(history, horizon)
        elif name == ETS:
            made[name] = ets(history, horizon, season)
        elif 1 < season <= len(history):
            made[name] = seasonal_naive(history, horizon, season)
    return made


def _check_rows(history: Tensor) -> None:
    if not len(history):
        raise ValueError(f"expected a history of at least one row but got {tuple(history.shape)}")
