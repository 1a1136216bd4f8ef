"""Autoformer's claim: correlations, delays and parts are exact; it forecasts El Nino."""

from __future__ import annotations

from typing import Any

import torch

from arcore.catalog.claims import Claim, Row, at_most, equals
from arcore.data.load_series import load_series
from arcore.data.series import SeriesWindows
from arcore.zoo.series._fitting import fit, held_out_errors
from arcore.zoo.series.autoformer.model import (
    Autoformer,
    autoformer_tiny,
    correlation,
    decompose,
    top_delays,
)


def claim(*, quick: bool) -> Claim:
    """Correlations, delays and decomposition; with training, the error on El Nino beside that of the last value."""
    generator = torch.Generator().manual_seed(0)
    rows = [_fft_is_direct(generator), *_adds_up(generator)]
    # Any pattern of 12 rows, four times over; delays 0, 12, 24 and 36 are equally good.
    pattern = torch.randn(1, 12, generator=generator, dtype=torch.float64).repeat(1, 4)
    delays, _ = top_delays(correlation(pattern, pattern), 1, shared=False)
    rows.append(equals("best delays of a series of period 12, modulo 12", (delays % 12).max(), 0))
    if quick:
        return Claim(tuple(rows))
    series = load_series("elnino")
    torch.manual_seed(0)
    model = Autoformer(autoformer_tiny())
    windows = SeriesWindows(series, length=60, horizon=12, held_out=0.2, normalise="train")
    fit(model, windows, count=300, batch=16)
    error, naive = held_out_errors(model, series, 12)
    rows.append(at_most("elnino: squared error of 12 rows over that of the last value", error / naive, 0.8))
    window = windows[len(windows) - 1]
    past = window.values[None, :48]

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        with torch.no_grad():
            season, trend = model(past, window.calendar[None])
            found, share = model.delays(past, window.calendar[None, :48])
        after = range(48, 60)
        left.plot(range(60), window.values[:, 0], color="black", linewidth=1, label="El Nino, normalised")
        for name, part in (("trend", trend), ("season", season), ("sum", season + trend)):
            left.plot(after, part[0, :, 0], label=name)
        left.legend(fontsize=7)
        right.bar(found[0].tolist(), share[0].tolist())
        right.set_xlabel("delay in months")
        right.set_ylabel("weight")

    return Claim(tuple(rows), draw, (9.0, 3.5))


def _fft_is_direct(generator: torch.Generator) -> Row:
    q, k = torch.randn(2, 3, 25, generator=generator)
    direct = torch.stack([(q.roll(-delay, -1) * k).sum(-1) for delay in range(25)], -1)
    return at_most("correlation by FFT less the direct one", (correlation(q, k) - direct).abs().max(), 1e-5)


def _adds_up(generator: torch.Generator) -> list[Row]:
    x = torch.randn(2, 40, 3, generator=generator, dtype=torch.float64)
    season, trend = decompose(x, 25)
    return [at_most("season plus trend less the series", (season + trend - x).abs().max(), 1e-15)]
