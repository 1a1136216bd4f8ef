"""Candles: open, high, low, close, volume and amount, as the systems of Kronos read them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from arcore.data.series import Series

PRICES = ("open", "high", "low", "close")
CANDLE = (*PRICES, "volume", "amount")
# Added to the deviation of a window, and where normalised values are cut off.
EPS = 1e-5
CLIP = 5.0


def candles(series: Series) -> Series:
    """The six columns of a series of prices, found without regard to case.

    A volume that is missing is 0; an amount that is missing is the volume times the mean of the four prices.

    Raises:
        ValueError: a price is missing (the file is named).
    """
    found = {name.lower(): number for number, name in reversed(list(enumerate(series.columns)))}
    absent = [name for name in PRICES if name not in found]
    if absent:
        where = series.file or f"the series {series.name!r}"
        raise ValueError(
            f"{where} has no column {absent[0]!r}: candles need {', '.join(PRICES)}, and volume and amount if there "
            f"are any, but the columns are {', '.join(series.columns)}"
        )
    prices = torch.stack([series.values[:, found[name]] for name in PRICES], dim=1)
    volume = torch.zeros(len(prices), dtype=torch.float64)
    if "volume" in found:
        volume = series.values[:, found["volume"]]
    amount = series.values[:, found["amount"]] if "amount" in found else volume * prices.mean(1)
    if "volume" not in found:
        amount = torch.zeros_like(volume)
    values = torch.cat([prices, volume.unsqueeze(1), amount.unsqueeze(1)], dim=1)
    return replace(series, columns=CANDLE, values=values)


def rescaled(values: Tensor, std: Tensor) -> Tensor:
    """Windows `[B, L, C]` scaled by their deviations `[B, C]`, as scaled by `std + EPS` and cut off at `CLIP`."""
    std = std.unsqueeze(1)
    return (values * (std / (std + EPS))).clamp(-CLIP, CLIP)
