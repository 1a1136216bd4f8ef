"""Results of forecasting: a table and a picture, with quantiles and with baselines beside them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arcore._files import atomic_path
from arcore._optional import require
from arcore.data.calendar import shown_time
from arcore.data.forecast_scores import rank_ic
from arcore.data.series import Series
from arcore.nn.kinds import check_kinds

# Panels of a picture, and rows of the past that each shows per row of the forecast.
MOST_PANELS = 8
PAST = 3


@check_kinds
@dataclass(frozen=True, eq=False)
class Forecast:
    """A forecast of one series.

    Attributes:
        history: the series up to the forecast.
        times: int64 `[H]`, of the rows that are predicted, in the units of the series.
        paths: float64 `[P, H, C]`; P = 1 for a forecast without spread.
        errors: float64 `[W, H, C]`, errors that earlier forecasts of the same kind made on rows that were not trained
            on; they stand for the spread where there is one path. None: no quantiles are known.
        baselines: float64 `[H, C]` by name.
        actual: float64 `[H, C]`, what came, where that is known.
        scores: figures by the name of the model and of the baselines, where what came is known.
    """

    history: Series
    times: Tensor
    paths: Tensor
    errors: Tensor | None = None
    baselines: Mapping[str, Tensor] = field(default_factory=dict)
    actual: Tensor | None = None
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def mean(self) -> Tensor:
        """Float64 `[H, C]`."""
        return self.paths.mean(0)

    @check_kinds
    def quantile(self, share: float) -> Tensor | None:
        """The value that a share of the outcomes lies below, `[H, C]`, of the paths or of earlier errors; or None."""
        if len(self.paths) > 1:
            return self.paths.quantile(share, dim=0)
        if self.errors is None or len(self.errors) < 2:
            return None
        return self.mean + self.errors.quantile(share, dim=0)


@check_kinds
@dataclass(frozen=True)
class Forecasts:
    """Forecasts of one or several series.

    Attributes:
        forecasts: at least one.
        quantiles: shares, e.g. 0.1, 0.5 and 0.9.
        title: of the picture.
        notes: sentences for people.
    """

    forecasts: Sequence[Forecast]
    quantiles: tuple[float, ...] = (0.1, 0.5, 0.9)
    title: str = ""
    notes: tuple[str, ...] = ()

    def table(self) -> Any:
        """A `pandas.DataFrame`: a row per series, column and time, with mean, quantiles, baselines and what came."""
        pandas = require("pandas", extra="series")
        rows = []
        for one in self.forecasts:
            bands = {share: one.quantile(share) for share in self.quantiles}
            for c, column in enumerate(one.history.columns):
                for h, time in enumerate(one.times.tolist()):
                    row = {
                        "series": one.history.name,
                        "column": column,
                        "time": shown_time(one.history, time),
                        "mean": float(one.mean[h, c]),
                    }
                    row |= {
                        f"q{share:g}": float(band[h, c]) for share, band in bands.items() if band is not None
                    }
                    row |= {name: float(values[h, c]) for name, values in one.baselines.items()}
                    if one.actual is not None:
                        row["actual"] = float(one.actual[h, c])
                    rows.append(row)
        return pandas.DataFrame(rows)

    def path_table(self) -> Any:
        """A `pandas.DataFrame`: a row per series, path and time, with a column per channel."""
        pandas = require("pandas", extra="series")
        parts = []
        for one in self.forecasts:
            times = [shown_time(one.history, time) for time in one.times.tolist()]
            for number, path in enumerate(one.paths):
                part = pandas.DataFrame(path.numpy(), columns=list(one.history.columns))
                part.insert(0, "time", times)
                part.insert(0, "path", number)
                part.insert(0, "series", one.history.name)
                parts.append(part)
        return pandas.concat(parts, ignore_index=True)

    def score_lines(self) -> list[str]:
        """A line per model and baseline: the mean over the series of each score."""
        names = list(dict.fromkeys(name for one in self.forecasts for name in one.scores))
        lines = []
        for name in names:
            found = [one.scores[name] for one in self.forecasts if name in one.scores]
            shown = "  ".join(f"{key} {sum(s[key] for s in found) / len(found):.4g}" for key in found[0])
            lines.append(f"{name:16} {shown}")
        ranks = self.rank_ics()
        if ranks:
            shown = "  ".join(f"{column} {value:.3g}" for column, value in ranks.items())
            lines.append(f"RankIC over {len(self.forecasts)} series: {shown}")
        return lines

    def rank_ics(self) -> dict[str, float]:
        """By column, the rank correlation over the series of predicted and actual growth to the last row.

        Empty for fewer than three series, or where what came is not known; a column that is 0 somewhere is left out.
        """
        known = [(one, one.actual) for one in self.forecasts if one.actual is not None]
        if len(known) < 3:
            return {}
        last = torch.stack([one.history.values[-1] for one, _ in known])
        ends = [
            torch.stack(rows) for rows in zip(*((one.mean[-1], came[-1]) for one, came in known), strict=True)
        ]
        predicted, actual = (end / last - 1 for end in ends)
        return {
            name: float(rank_ic(predicted[:, c], actual[:, c]))
            for c, name in enumerate(self.forecasts[0].history.columns)
            if bool((last[:, c] != 0).all())
        }

    @check_kinds
    def draw(self, figure: Any) -> None:
        """Draw the first panels on a `matplotlib.figure.Figure`: past, forecast with its band, baselines, what came."""
        panels = [(one, c) for one in self.forecasts for c in range(len(one.history.columns))][:MOST_PANELS]
        columns = 1 if len(panels) < 3 else 2
        axes = figure.subplots(math.ceil(len(panels) / columns), columns, squeeze=False).flatten()
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        several = len({one.history.name for one in self.forecasts}) > 1
        for axis, (one, c) in zip(axes, panels, strict=False):
            _panel(axis, one, c, self.quantiles)
            name = one.history.columns[c]
            axis.set_title(f"{one.history.name}: {name}" if several else name, fontsize=9)
        axes[0].legend(fontsize=7, loc="best")
        if self.title:
            figure.suptitle(self.title, fontsize=10)

    @check_kinds
    def save(self, path: Path | None) -> list[str]:
        """Write `PATH.csv`, `PATH.png` and, of forecasts with several paths, `PATH_paths.csv`; any suffix is dropped.

        Returns:
            Sentences about what was written, and the scores.
        """
        said = [*self.notes, *self.score_lines()]
        if path is None:
            return said
        tables = {path.with_suffix(".csv"): (self.table(), "times, means, quantiles and baselines")}
        if any(len(one.paths) > 1 for one in self.forecasts):
            count = len(self.forecasts[0].paths)
            tables[path.with_name(f"{path.stem}_paths.csv")] = (self.path_table(), f"{count} paths")
        for target, (table, what) in tables.items():
            with atomic_path(target) as temporary:
                table.to_csv(temporary, index=False)
            said.append(f"{target}: {what}")
        picture = path.with_suffix(".png")
        panels = min(MOST_PANELS, sum(len(one.history.columns) for one in self.forecasts))
        save_figure(self.draw, picture, (10.0, 2.4 * math.ceil(panels / (1 if panels < 3 else 2)) + 0.8))
        said.append(f"{picture}: picture")
        return said


@check_kinds
def save_figure(draw: Any, path: Path, size: tuple[float, float] = (6.0, 4.0)) -> None:
    """Write what `draw` draws on a `matplotlib.figure.Figure` as a picture.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure = require("matplotlib.figure", extra="plot").Figure(figsize=size, layout="constrained")
    draw(figure)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix.removeprefix(".") or "png", dpi=110)


def _panel(axis: Any, one: Forecast, c: int, quantiles: Sequence[float]) -> None:
    horizon = len(one.times)
    shown = min(len(one.history.values), max(PAST * horizon, 24))
    before, after = list(range(-shown + 1, 1)), list(range(horizon + 1))
    past = one.history.values[-shown:, c]
    # What is predicted begins at the last value, so that one row can be seen too.
    joined = past[-1:].nan_to_num()
    axis.axvline(0, color="grey", linewidth=0.5)
    axis.plot(before, past, color="black", linewidth=1, label="past")
    bands = sorted(quantiles)
    for low, high in zip(bands[: len(bands) // 2], reversed(bands), strict=False):
        below, above = one.quantile(low), one.quantile(high)
        if below is not None and above is not None:
            label = f"{low:g} to {high:g}"
            edges = (torch.cat([joined, edge[:, c]]) for edge in (below, above))
            axis.fill_between(after, *edges, color="C0", alpha=0.2, linewidth=0, label=label)
    for number, (name, values) in enumerate(one.baselines.items()):
        line = torch.cat([joined, values[:, c]])
        axis.plot(after, line, color=f"C{number + 1}", linewidth=0.8, linestyle="--", label=name)
    axis.plot(after, torch.cat([joined, one.mean[:, c]]), color="C0", linewidth=1.6, label="forecast")
    if one.actual is not None:
        line = torch.cat([joined, one.actual[:, c]])
        axis.plot(after, line, color="black", linewidth=1, linestyle=":", label="what came")
    if one.history.times is not None:
        times = torch.cat([one.history.times[-shown:], one.times])
        # The time of the last row known, and the ends where they do not lie too near.
        ticks = [0, shown - 1] if horizon < shown / 4 else [0, shown - 1, shown + horizon - 1]
        labels = [
            shown_time(one.history, int(times[tick])).removesuffix(":00").removesuffix(" 00:00")
            for tick in ticks
        ]
        axis.set_xticks([tick - shown + 1 for tick in ticks], labels, fontsize=7)
    axis.tick_params(labelsize=7)
