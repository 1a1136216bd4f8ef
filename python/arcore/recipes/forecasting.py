"""Forecasting: the rows of a table that come next, with quantiles and beside baselines."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from arcore._files import atomic_path
from arcore._optional import how_to_install
from arcore.catalog import get_config, load_checkpoint
from arcore.data.calendar import CALENDAR, Gaps, calendar, season, times_to_come
from arcore.data.forecast_baselines import ETS, SIMPLE, baselines
from arcore.data.forecast_scores import scores
from arcore.data.forecasts import Forecast, Forecasts, save_figure
from arcore.data.identity import place
from arcore.data.load_series import load_series
from arcore.data.series import Normalise, Series, SeriesWindows, Unsorted
from arcore.nn.kinds import check_kinds
from arcore.recipes._recipe import Recipe, Start, Work, ZooTask
from arcore.training.checks import number
from arcore.training.config import TrainConfig

Filling = Literal["refuse", "drop", "forward", "linear"]
# What decides how a table is read; a forecast reads a new table like the one that was trained on.
READING = ("time", "group", "columns", "unsorted", "gaps", "missing")
# Windows at the end of a run on which it is scored, earlier forecasts that give the errors of a new one, and fits of
# exponential smoothing that are not too many to wait for.
TEST_WINDOWS = 32
ERROR_WINDOWS = 64
ETS_FITS = 64
PICTURE = "forecast.png"
SCORES = "scores.json"


class ForecastModel(Protocol):
    """Predicts the rows after a window of rows.

    Attributes:
        context: rows that it reads.
        horizon: rows that it is trained to predict; any number may be asked for.
        normalise: how the values that it reads are scaled.

    One that does not read calendars says so by `reads_calendar = False`; others refuse a table without dates where they
    were trained on one with dates.
    """

    @property
    def context(self) -> int: ...

    @property
    def horizon(self) -> int: ...

    @property
    def normalise(self) -> Normalise | None: ...

    def objective(self, values: Tensor, calendar: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Training loss and figures of windows `[B, context + horizon, C]` with calendars `[B, ..., 5]`."""
        ...

    def forecast(self, values: Tensor, calendar: Tensor, horizon: int) -> Tensor:
        """The next rows.

        Args:
            values: `[B, context, C]`.
            calendar: int64 `[B, context + horizon, 5]`.
            horizon: rows H.

        Returns:
            `[B, H, C]`.
        """
        ...


@check_kinds
@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """A table and how it is read.

    Attributes:
        data: a .csv, .tsv or .parquet file, or a folder of them; or sunspots, elnino, co2, stock_prices, glucose,
            sea_temperature, departures, regional_departures (in packages).
        time: column of dates or numbers. Default: the only column of dates, else one called time, date, datetime,
            timestamp or ds; where there is none, the order of the file.
        group: column whose values tell series apart.
        columns: the columns that are predicted. Default: all others.
        unsorted: rows that are not in the order of time: refuse or sort.
        gaps: missing times: refuse, keep (rows are taken as equally spaced) or fill (rows without values are put in).
        missing: missing values: refuse, drop (the row), forward (the last value) or linear (a line between neighbours).
        held_out_share: share of the rows, the last ones, that the run is tested on.
        validation_share: share of the rows before those that is evaluated while training.
    """

    data: str = "elnino"
    time: str | None = None
    group: str | None = None
    columns: tuple[str, ...] | None = None
    unsorted: Unsorted = "refuse"
    gaps: Gaps = "refuse"
    missing: Filling = "refuse"
    held_out_share: float = 0.2
    validation_share: float = 0.1

    def __post_init__(self) -> None:
        for name in ("held_out_share", "validation_share"):
            number(name, getattr(self, name), whole=False, least=0, most=0.9)
            if not getattr(self, name):
                raise ValueError(f"{name} must be above 0 but got 0")
        columns: Any = self.columns
        if isinstance(columns, list):
            object.__setattr__(self, "columns", tuple(columns))


@check_kinds
@dataclass(frozen=True, kw_only=True)
class ForecastSampling:
    """A forecast of the rows after a table.

    Attributes:
        data: table to continue. Default: the one that was trained on.
        horizon: rows to predict. Default: as many as the model was trained for.
        backtest: hold back the last HORIZON rows of the table, predict them, and score the forecast and baselines.
        quantiles: shares of the quantiles.
        season: rows of a season, for baselines and MASE. Default: by the times: 24 hours, 7 or 5 days, 12 months.
        out: PATH.csv and PATH.png receive the forecast, PATH_paths.csv its paths if there are several.
        seed: decides all random draws.
        time, group, columns, unsorted, gaps, missing: how the table is read. Default: as for training.
        num: paths to draw, of models that draw.
    """

    data: str | None = None
    horizon: int | None = None
    backtest: bool = False
    quantiles: tuple[float, ...] = (0.1, 0.5, 0.9)
    season: int | None = None
    out: Path = Path("forecast.png")
    seed: int = 0
    time: str | None = None
    group: str | None = None
    columns: tuple[str, ...] | None = None
    unsorted: Unsorted | None = None
    gaps: Gaps | None = None
    missing: Filling | None = None
    num: int | None = field(default=None, metadata={"aliases": ("-n",)})

    def __post_init__(self) -> None:
        for name, flag in (("horizon", "--horizon"), ("season", "--season"), ("num", "-n")):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{flag} must be at least 1 but got {value}")
        if not self.quantiles or not all(0 < share < 1 for share in self.quantiles):
            raise ValueError(f"--quantiles must lie between 0 and 1 but got {self.quantiles}")


class ForecastTask(ZooTask):
    """The model's own loss on windows of series."""

    model: Any

    def loss(self, images: Tensor, labels: Tensor, *rest: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Args: the fields of a batch of `arcore.data.Window`."""
        del labels
        found: tuple[Tensor, dict[str, Tensor]] = self.model.objective(images, rest[-2])
        return found


class Forecasting(Recipe):
    """Tables continued."""

    defaults: ClassVar[TrainConfig] = TrainConfig(steps=500, batch_size=32, lr=1e-3, checkpoint_every=100)
    options: ClassVar[type] = TableOptions
    sampling: ClassVar[type | None] = ForecastSampling
    task: ClassVar[type[ZooTask]] = ForecastTask
    movable: ClassVar[tuple[str, ...]] = ("data",)
    # Columns of which one that does not vary is an error; None for all.
    must_vary: ClassVar[tuple[str, ...] | None] = None

    def read(self, options: Any, **more: Any) -> list[Series]:
        """The series of `options`, with fields of `more` in their place."""
        given = {name: getattr(options, name) for name in ("data", *READING)} | more
        return load_series(given.pop("data"), **given)

    def overrides(self, windows: SeriesWindows, config: Any) -> dict[str, Any]:
        """Fields of the model's config that the data decide."""
        return {"channels": len(windows.columns)} if hasattr(config, "channels") else {}

    def windows(self, series: Sequence[Series], model: Any, options: Any, split: Any) -> SeriesWindows:
        """Windows of context and horizon."""
        return SeriesWindows(
            series,
            length=model.context + model.horizon,
            horizon=model.horizon,
            split=split,
            held_out=options.held_out_share,
            validation=options.validation_share,
            normalise=model.normalise,
        )

    def prepare(self, start: Start, options: Any) -> Work:
        series = self.read(options, say=start.say)
        shape: Any = get_config(start.preset, **start.changes)
        train = self.windows(series, shape, options, "train")
        for note in train.notes:
            start.say(note)
        constant = [
            name for name in train.constant if self.must_vary is None or name.lower() in self.must_vary
        ]
        if constant:
            where = f" of {train.series[0].file}" if train.series[0].file else ""
            last = train.series[0].place(len(train.series[0].values) - 1)
            needed = self.must_vary is not None
            way_out = "give rows in which it does" if needed else "leave it out with --columns"
            raise ValueError(
                f"the column {constant[0]!r}{where} does not vary in the training rows (up to {last}), so there "
                f"is nothing to learn from it; {way_out}"
            )
        if start.networks:
            if train.digest() != start.facts.get("series"):
                raise ValueError(
                    f"the table {options.data!r} is no longer that of the run in {start.source}: give that with "
                    "--data, or start a new run in another folder"
                )
            networks = dict(start.networks)
        else:
            networks = self.networks(start, options, train, shape)
        facts = {
            "preset": start.preset,
            "data": place(options.data),
            "series": train.digest(),
            "columns": list(train.columns),
            "dates": all(one.dates for one in train.series),
            "mean": train.mean.tolist(),
            "std": train.std.tolist(),
        }
        task = self.task(start.config, networks, facts)
        return Work(task, train, self.windows(series, shape, options, "validation"))

    def networks(self, start: Start, options: Any, train: SeriesWindows, shape: Any) -> dict[str, Any]:
        """New networks."""
        return {"model": start.fresh(**self.overrides(train, shape))}

    def paths(
        self, networks: Mapping[str, Any], values: Tensor, dates: Tensor, horizon: int, options: Any
    ) -> Tensor:
        """Forecasts, `[P, B, H, C]` in the units of `values` `[B, context, C]`."""
        found: Tensor = networks["model"].forecast(values, dates, horizon)
        return found.unsqueeze(0)

    def reads(self, model: Any, facts: Mapping[str, Any], horizon: int, options: Any, rows: int) -> int:
        """How many rows before a forecast are read, where the shortest table has `rows`."""
        return int(model.context)

    def moments(self, model: Any, facts: Mapping[str, Any], tail: Tensor) -> tuple[Tensor, Tensor]:
        """What values are scaled with, `[C]` each: the moments of the training rows, or of the rows read `[T, C]`."""
        if model.normalise == "train":
            return torch.tensor(facts["mean"], dtype=torch.float64), torch.tensor(
                facts["std"], dtype=torch.float64
            )
        if model.normalise is None:
            return torch.zeros(tail.shape[1], dtype=torch.float64), torch.ones(
                tail.shape[1], dtype=torch.float64
            )
        std = tail.std(0, correction=0)
        return tail.mean(0), torch.where(std > 1e-12 * tail.mean(0).abs(), std, 1.0)

    @torch.no_grad()
    def predict(
        self,
        networks: Mapping[str, Any],
        facts: Mapping[str, Any],
        pasts: Sequence[Series],
        horizon: int,
        options: Any,
    ) -> Tensor:
        """Forecasts of the rows after each series, float64 `[P, B, H, C]` in the units of the table.

        Raises:
            ValueError: a series has fewer rows than the model reads (file and last line are named).
        """
        model = networks["model"]
        context = self.reads(model, facts, horizon, options, min(len(past.values) for past in pasts))
        device = next(model.parameters()).device
        values, moments, dates = [], [], []
        for past in pasts:
            if len(past.values) < context:
                raise ValueError(
                    f"the series {past.name!r} has {len(past.values)} rows (up to {past.place(len(past.values) - 1)}) "
                    f"but the model reads {context}; give a longer table"
                )
            tail = past.values[-context:]
            mean, std = self.moments(model, facts, tail)
            values.append(((tail - mean) / std).float())
            moments.append((mean, std))
            times = (
                None
                if past.times is None
                else torch.cat([past.times[-context:], times_to_come(past, horizon)])
            )
            dates.append(
                calendar(times)
                if past.dates and times is not None
                else torch.zeros(context + horizon, len(CALENDAR), dtype=torch.int64)
            )
        paths = self.paths(
            networks, torch.stack(values).to(device), torch.stack(dates).to(device), horizon, options
        )
        means, stds = (torch.stack([pair[i] for pair in moments]).unsqueeze(1) for i in (0, 1))
        return paths.cpu().double() * stds + means

    def finish(self, checkpoint: Path, out: Path) -> list[str]:
        networks, facts = load_checkpoint(checkpoint)
        options = self.options(**facts["options"])
        model: Any = networks["model"].eval()
        series = self.read(options)
        windows = self.windows(series, model, options, "test")
        chosen = torch.linspace(0, len(windows) - 1, min(TEST_WINDOWS, len(windows))).long().unique().tolist()
        origins = [
            (w.series, w.start + windows.length - model.horizon) for w in map(windows.__getitem__, chosen)
        ]
        ends = [(windows.series[which], end) for which, end in origins]
        found = self.backtest(networks, facts, ends, model.horizon, self.default_sampling(), None)
        score = _mean_scores(found)
        with atomic_path(out / SCORES) as temporary:
            temporary.write_text(json.dumps(score, indent=2) + "\n", encoding="utf-8")
        shown = Forecasts(found[-1:], title=f"{facts['preset']}: the last test window")
        save_figure(shown.draw, out / PICTURE, (8.0, 5.0))
        words = ["arcore", "sample", str(out), "--horizon", str(model.horizon), "--out", "forecast.png"]
        lines = [
            f"{len(found)} test windows of {model.horizon} rows, in units of the training rows' deviation:"
        ]
        lines += [
            f"  {name:16} " + "  ".join(f"{key} {value:.4g}" for key, value in row.items())
            for name, row in score.items()
        ]
        lines += _without_ets(len(windows.columns), len(ends))
        return [*lines, f"picture: {out / PICTURE}", f"forecast: {shlex.join(words)}"]

    def default_sampling(self) -> Any:
        """The sampling options of a forecast that nobody chose options for."""
        assert self.sampling is not None
        return self.sampling()

    def backtest(
        self,
        networks: Mapping[str, Any],
        facts: Mapping[str, Any],
        ends: Sequence[tuple[Series, int]],
        horizon: int,
        options: Any,
        rows: int | None,
    ) -> list[Forecast]:
        """Forecasts from several rows of series on, of which what came is known, with scores and baselines.

        Args:
            networks, facts: of the checkpoint.
            ends: series, and the row that is the first to be predicted.
            horizon: rows to predict.
            options: of sampling.
            rows: of a season; None goes by the times.
        """
        pasts = [series.rows(slice(end)) for series, end in ends]
        paths = self.predict(networks, facts, pasts, horizon, options)
        made = []
        for at, (series, end) in enumerate(ends):
            actual = series.values[end : end + horizon]
            own = rows or season(series)
            known = _baselines(pasts[at], horizon, own, len(ends))
            scale = torch.tensor(facts["std"], dtype=torch.float64) if "std" in facts else None
            named = {"forecast": paths[:, at]} | {name: one.unsqueeze(0) for name, one in known.items()}
            made.append(
                Forecast(
                    history=pasts[at],
                    times=torch.arange(horizon)
                    if series.times is None
                    else series.times[end : end + horizon],
                    paths=paths[:, at],
                    baselines=known,
                    actual=actual,
                    scores={
                        name: scores(one, actual, pasts[at].values, own, scale) for name, one in named.items()
                    },
                )
            )
        return made

    def sample(
        self,
        networks: Mapping[str, Any],
        facts: Mapping[str, Any],
        options: Any,
        show: Callable[[str], None],
    ) -> Forecasts:
        model = networks["model"]
        horizon = options.horizon or model.horizon
        trained = self.options(**facts["options"]) if "options" in facts else self.options()
        other = {name: getattr(options, name) for name in READING if getattr(options, name) is not None}
        source = options.data or facts.get("data")
        if source is None:
            raise ValueError("say which table to continue with --data TABLE.csv")
        series = self.read(trained, data=source, **other)
        self.check_columns(model, facts, series)
        if options.backtest:
            short = next((one for one in series if len(one.values) <= horizon + 1), None)
            if short is not None:
                raise ValueError(
                    f"the series {short.name!r} has {len(short.values)} rows (up to "
                    f"{short.place(len(short.values) - 1)}), too few for --backtest to hold back {horizon} of them"
                )
            ends = [(one, len(one.values) - horizon) for one in series]
            made = self.backtest(networks, facts, ends, horizon, options, options.season)
        else:
            paths = self.predict(networks, facts, series, horizon, options)
            made = [
                Forecast(
                    one,
                    times_to_come(one, horizon),
                    paths[:, which],
                    baselines=_baselines(one, horizon, options.season or season(one), len(series)),
                )
                for which, one in enumerate(series)
            ]
        notes = _without_ets(len(series[0].columns), len(series))
        if len(made[0].paths) == 1:
            made = [
                dataclasses.replace(
                    one, errors=self._errors(networks, facts, one.history, horizon, options, trained)
                )
                for one in made
            ]
            count = min(0 if one.errors is None else len(one.errors) for one in made)
            notes.append(
                f"quantiles are those of the errors of {count} earlier forecasts of rows that were held out"
                if count > 1
                else "no quantiles: the table has too few held-out rows to know the errors of earlier forecasts"
            )
        title = f"{facts.get('preset', 'forecast')}, {horizon} rows"
        return Forecasts(made, tuple(sorted(options.quantiles)), title, tuple(notes))

    def check_columns(self, model: Any, facts: Mapping[str, Any], series: Sequence[Series]) -> None:
        """Refuse tables of other columns than those that the scales and weights belong to, or without dates."""
        wanted = facts.get("columns")
        if wanted is not None and model.normalise != "window" and list(series[0].columns) != wanted:
            raise ValueError(
                f"the model was trained on the columns {', '.join(wanted)} but the table has "
                f"{', '.join(series[0].columns)}; choose them with --columns"
            )
        undated = next((one for one in series if not one.dates), None)
        if facts.get("dates") and undated is not None and getattr(model, "reads_calendar", True):
            raise ValueError(
                f"{undated.file or undated.name}: the model was trained on rows with dates and reads them, but these "
                "have none: name the column that holds them with --time"
            )

    def _errors(
        self, networks: Any, facts: Any, past: Series, horizon: int, options: Any, trained: Any
    ) -> Tensor | None:
        """What earlier forecasts missed by, `[W, H, C]`: those that predict rows in the held-out share of the past."""
        context, size = (
            self.reads(networks["model"], facts, horizon, options, len(past.values)),
            len(past.values),
        )
        first = max(context, size - int(size * trained.held_out_share))
        last = size - horizon
        if last - first < 1:
            return None
        ends = torch.linspace(first, last, min(ERROR_WINDOWS, last - first + 1)).long().unique().tolist()
        paths = self.predict(networks, facts, [past.rows(slice(end)) for end in ends], horizon, options)
        actual = torch.stack([past.values[end : end + horizon] for end in ends])
        return actual - paths.mean(0)


def _baselines(past: Series, horizon: int, rows: int, forecasts: int) -> dict[str, Tensor]:
    which = SIMPLE if _without_ets(len(past.columns), forecasts) else (*SIMPLE, ETS)
    return baselines(past.values, horizon, rows, which)


def _without_ets(columns: int, forecasts: int) -> list[str]:
    """Why exponential smoothing is not among the baselines, in one sentence; empty where it is."""
    if importlib.util.find_spec("statsmodels") is None:
        return [
            f"{ETS} is not among the baselines: it needs the package statsmodels; run "
            f"{how_to_install('series', 'statsmodels')}"
        ]
    fits = columns * forecasts
    if fits > ETS_FITS:
        return [
            f"{ETS} is not among the baselines: {forecasts} forecasts of {columns} columns are {fits} fits of it, and "
            f"at most {ETS_FITS} are waited for"
        ]
    return []


def _mean_scores(found: Sequence[Forecast]) -> dict[str, dict[str, float]]:
    return {
        name: {key: sum(one.scores[name][key] for one in found) / len(found) for key in found[0].scores[name]}
        for name in found[0].scores
    }


RECIPE = Forecasting()
