"""What the recipes for series share: tables of numbers, their windows, and files of forecasts."""

from __future__ import annotations

import math
import shlex
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from arcore._files import atomic_path
from arcore._optional import require
from arcore.data import Series, SeriesWindows, open_series
from arcore.data.identity import identity, place
from arcore.data.series import Missing, Normalise
from arcore.recipes._recipe import Recipe, Start, Work, ZooTask
from arcore.training.checkpoint import read_meta
from arcore.training.checks import number

FORECAST_SUFFIXES = (".csv", ".tsv", ".parquet")


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """Series in tables.

    Attributes:
        data: sunspots, elnino or co2 (in statsmodels), stock_prices, glucose or sea_temperature (in bokeh-sampledata);
            a .csv, .tsv or .parquet file with a row per time; or a folder of them, a series each.
        time: column of dates or whole numbers that orders the rows. Default: the only column of dates, else one named
            time, date, datetime, timestamp or ds; where there is none, the order of the file.
        group: column whose values tell several series in one table apart.
        columns: columns of values, e.g. open high low close. Default: all but time and group.
        missing: what is done where values are missing: refuse, drop their rows, repeat the last value (forward), draw a
            line (linear), or keep the holes for models that know them.
        held_out: share of the rows at the end of each series that is held out.
        stride: rows from the start of a training window to that of the next.
    """

    data: str = "sunspots"
    time: str | None = None
    group: str | None = None
    columns: tuple[str, ...] | None = None
    missing: Missing = "refuse"
    held_out: float = 0.1
    stride: int = 1

    def __post_init__(self) -> None:
        number("stride", self.stride, whole=True, least=1)
        number("held_out", self.held_out, whole=False, least=0, most=1)
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must be a share between 0 and 1 but got {self.held_out}")


@dataclass(frozen=True, kw_only=True)
class ForecastOptions:
    """What comes after a table.

    Attributes:
        data: table to go on from, with the columns that the model was trained on. Default: the one that it was trained
            on.
        horizon: rows to predict. Default: as many as the model was trained to predict.
        num: paths to draw, for models that draw; others know one.
        out: .csv, .tsv or .parquet file.
        seed: decides all random draws.
    """

    data: str | None = None
    horizon: int | None = None
    num: int = field(default=1, metadata={"aliases": ("-n",)})
    out: Path = Path("forecast.csv")
    seed: int = 0

    def __post_init__(self) -> None:
        for name, flag in (("num", "-n"), ("horizon", "--horizon")):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{flag} must be at least 1 but got {getattr(self, name)}")


@dataclass(frozen=True)
class Forecasts:
    """What comes after each of some series.

    Attributes:
        series: those that are known.
        paths: of each series `[N, H, C]`: N paths of H rows, in the units of the table.
    """

    series: Sequence[Series]
    paths: Sequence[Tensor]

    def save(self, path: Path) -> list[str]:
        """Write a table with a row per series, path and time."""
        pandas = require("pandas", extra="series")
        tables = []
        for one, paths in zip(self.series, self.paths, strict=True):
            times = one.times_after(paths.shape[1])
            for number_, rows in enumerate(paths.tolist()):
                table = pandas.DataFrame(rows, columns=list(one.columns))
                table.insert(0, "time", times)
                table.insert(0, "path", number_)
                table.insert(0, "series", one.name)
                tables.append(table)
        table = pandas.concat(tables, ignore_index=True)
        with atomic_path(path) as temporary:
            if path.suffix.lower() == ".parquet":
                require("pyarrow", extra="series")
                table.to_parquet(temporary, index=False)
            else:
                separator = "\t" if path.suffix.lower() == ".tsv" else ","
                table.to_csv(temporary, index=False, sep=separator)
        rows = self.paths[0].shape[1]
        return [f"{path}: {rows} rows after each of {len(self.series)} series, {len(self.paths[0])} paths"]


class TableRecipe(Recipe):
    """A recipe that reads series.

    A batch is a `Window`: the loss of the task takes its fields. A window has the rows that
    a model sees and, at its end, those that it predicts.

    Attributes:
        task: the loss.
        normalise: how windows are scaled, see `SeriesWindows`.
    """

    options: ClassVar[type] = TableOptions
    sampling: ClassVar[type | None] = ForecastOptions
    movable: ClassVar[tuple[str, ...]] = ("data",)
    task: ClassVar[type[ZooTask]]
    normalise: ClassVar[Normalise | None] = "train"

    @abstractmethod
    def window(self, config: Any, options: Any) -> tuple[int, int]:
        """Rows of a training window, and how many at its end are predicted.

        Args:
            config: of the model.
            options: of the type `options`.
        """

    def overrides(self, series: Sequence[Series]) -> dict[str, Any]:
        """Fields of the model's config that the data decide, for example the number of channels."""
        return {}

    def prepare(self, start: Start, options: Any) -> Work:
        series = read(options, start.say)
        networks = dict(start.networks) or {self.trained: self.build(start, options, series)}
        length, horizon = self.window(getattr(networks[self.trained], "config", None), options)
        shape: dict[str, Any] = {"length": length, "horizon": horizon, "normalise": self.normalise}
        shape |= {"held_out": options.held_out, "missing": options.missing}
        train = SeriesWindows(series, stride=options.stride, **shape)
        for note in train.notes:
            start.say(f"{options.data}: {note}")
        # Every row is predicted as often as possible; nothing is held out of series that are too short.
        test = SeriesWindows(series, split="test", stride=horizon, **shape)
        digest = identity(train).digest
        if start.facts and start.facts.get("content") != digest:
            raise ValueError(
                f"the series in {options.data!r} are no longer those of the run in {start.source}: give those with "
                "--data, or start a new run in another folder"
            )
        facts = {
            "preset": start.preset,
            "data": place(options.data),
            "content": digest,
            "columns": list(train.columns),
            "mean": train.mean.tolist(),
            "std": train.std.tolist(),
            "window": [length, horizon],
        }
        return Work(self.task(start.config, networks, facts | self.facts(options)), train, test)

    def build(self, start: Start, options: Any, series: Sequence[Series]) -> nn.Module:
        """A new network."""
        return start.fresh(**self.overrides(series))

    def facts(self, options: Any) -> dict[str, Any]:
        """Further entries of config.json."""
        return {}

    def finish(self, checkpoint: Path, out: Path) -> list[str]:
        words = ["arcore", "sample", str(out), "--out", str(out / "forecast.csv")]
        return [f"predict what comes next: {shlex.join(words)}"]

    def check_sampling(self, options: Any) -> None:
        if options.out.suffix.lower() not in FORECAST_SUFFIXES:
            known = ", ".join(FORECAST_SUFFIXES)
            raise ValueError(
                f"--out {options.out}: a forecast is a table, expected a name that ends in {known}"
            )

    def sample(
        self,
        networks: Mapping[str, Any],
        facts: Mapping[str, Any],
        options: Any,
        show: Callable[[str], None],
    ) -> Forecasts:
        known = dict(facts.get("options") or read_meta(Path(facts["folder"])).get("options", {}))
        known["data"] = options.data or facts["data"]
        known["columns"] = tuple(facts["columns"])
        series = read(self.options(**{name: _tuple(value) for name, value in known.items()}), lambda _: None)
        length, trained = facts["window"]
        horizon, paths = options.horizon or trained, []
        for one in series:
            rows = one.values[-(length - trained) or len(one.values) :]
            if len(rows) < length - trained:
                raise ValueError(
                    f"the series {one.name!r} has {len(rows)} rows and the model goes on from {length - trained}"
                )
            paths.append(self.forecast(networks, rows, horizon, facts, options))
            if not all(map(math.isfinite, paths[-1].flatten().tolist())):
                raise ValueError(f"the forecast of the series {one.name!r} is not finite")
        return Forecasts(series, paths)

    def forecast(
        self,
        networks: Mapping[str, Any],
        rows: Tensor,
        horizon: int,
        facts: Mapping[str, Any],
        options: Any,
    ) -> Tensor:
        """Paths `[N, horizon, C]` that come after the float64 rows `[L, C]` of a table, in its units.

        `facts` holds `mean` and `std` of the training rows.
        """
        raise NotImplementedError


def read(options: Any, say: Callable[[str], None]) -> list[Series]:
    """The series that options name, without holes unless they are kept; says which column orders them."""
    found = open_series(options.data, time=options.time, group=options.group, columns=options.columns)
    if found.inferred_time is not None:
        say(f"{options.data}: the column {found.inferred_time!r} orders the rows")
    names = ", ".join(found.series[0].columns)
    rows = torch.tensor([len(one.values) for one in found.series])
    say(f"{options.data}: {len(rows)} series of {names}, {int(rows.sum())} rows in all")
    return found.series


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
