"""How good forecasts are: MSE, MAE, MASE, CRPS and RankIC."""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from arcore._optional import require
from arcore.nn.kinds import Axes, Size, check_kinds

SCORES = ("mse", "mae", "mase", "crps")
Rows = Annotated[Tensor, Axes("T C", floating=True)]


@check_kinds
def mase(predicted: Rows, actual: Rows, history: Rows, season: Size = 1) -> Tensor:
    """Mean absolute error over that of the seasonal naive forecast within the history (Hyndman and Koehler 2006).

    Args:
        predicted, actual: `[H, C]`.
        history: `[T, C]`, T > season.
        season: rows of a season.

    Returns:
        `[C]`; NaN in channels in which the history repeats exactly.

    Raises:
        ValueError: the history is no longer than a season, or shapes do not fit.
    """
    if predicted.shape != actual.shape:
        raise ValueError(
            f"expected predicted of actual's shape {tuple(actual.shape)} but got {tuple(predicted.shape)}"
        )
    if len(history) <= season:
        raise ValueError(
            f"MASE at a season of {season} rows needs more rows of history but got {len(history)}"
        )
    scale = (history[season:] - history[:-season]).abs().mean(0)
    error = (predicted - actual).abs().mean(0)
    return torch.where(scale > 0, error / scale, math.nan)


@check_kinds
def crps(paths: Tensor, actual: Tensor) -> Tensor:
    """Continuous ranked probability score of an ensemble (torchmetrics); of a single path the absolute error.

    Args:
        paths: `[P, ...]`.
        actual: `[...]`.

    Returns:
        Scalar, the mean over all values.

    Raises:
        ImportError: torchmetrics is missing.
        ValueError: shapes do not fit.
    """
    if not paths.dim() or not len(paths) or paths.shape[1:] != actual.shape:
        raise ValueError(
            f"expected paths [P, {', '.join(map(str, actual.shape))}], P at least 1, but got {tuple(paths.shape)}"
        )
    if len(paths) == 1:
        return (paths[0] - actual).abs().mean()
    functional = require("torchmetrics.functional.regression", extra="train")
    score: Tensor = functional.continuous_ranked_probability_score(
        paths.flatten(1).T.contiguous().double(), actual.flatten().double()
    )
    return score


@check_kinds
def rank_ic(predicted: Tensor, actual: Tensor) -> Tensor:
    """Spearman's rank correlation of predicted and actual values `[N]` (torchmetrics), as of returns of N assets.

    Raises:
        ImportError: torchmetrics is missing.
        ValueError: the shapes differ or N < 2.
    """
    if predicted.shape != actual.shape or predicted.dim() != 1 or len(predicted) < 2:
        raise ValueError(
            f"expected predicted and actual values [N], N >= 2, but got {tuple(predicted.shape)} and "
            f"{tuple(actual.shape)}"
        )
    functional = require("torchmetrics.functional.regression", extra="train")
    found: Tensor = functional.spearman_corrcoef(predicted.double(), actual.double())
    return found


@check_kinds
def scores(
    paths: Tensor, actual: Tensor, history: Tensor, season: int = 1, scale: Tensor | None = None
) -> dict[str, float]:
    """MSE and MAE of the mean path, MASE of it, and CRPS of the paths.

    Args:
        paths: `[P, H, C]`; P = 1 for a forecast without spread.
        actual: `[H, C]`.
        history: `[T, C]`, before the forecast.
        season: for MASE; 1 where the history is no longer.
        scale: `[C]`, that MSE, MAE and CRPS are measured in units of, so that channels weigh alike; ones when None.

    Returns:
        The figures by the names of `SCORES`.
    """
    scale = torch.ones(actual.shape[1], dtype=actual.dtype) if scale is None else scale
    mean = paths.mean(0)
    known = season if len(history) > season else 1
    found = mase(mean, actual, history, known) if len(history) > known else torch.tensor([math.nan])
    return {
        "mse": float(F.mse_loss(mean / scale, actual / scale)),
        "mae": float(F.l1_loss(mean / scale, actual / scale)),
        "mase": float(found.nanmean()),
        "crps": float(crps(paths / scale, actual / scale)),
    }
