"""Series of numbers from tables: windows, normalisation, splits in time, missing values, several series side by side.

A table has one row per time; its columns are channels. Several series stand in one table, told apart by a column, or in
several files of a folder. Nothing crosses from one series to another, and nothing that is held out is looked at when
the rest is normalised. Calendars and gaps in time are in `arcore.data.calendar`.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import importlib
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from arcore._optional import require
from arcore.data._walk import counted, some, walk
from arcore.data.calendar import CALENDAR, calendar
from arcore.nn.checks import (
    came,
    check_instance,
    check_number,
    check_path,
    check_sequence,
    check_text,
    check_whole,
)
from arcore.nn.kinds import check_kinds

TABLE_SUFFIXES = frozenset({".csv", ".tsv", ".parquet"})
# What a column of times is called where its values do not tell.
TIME_NAMES = frozenset({"time", "date", "datetime", "timestamp", "ds"})
# Functions of arcore.data.real.
SERIES_NAMES = (
    *("sunspots", "elnino", "co2", "stock_prices", "glucose", "sea_temperature"),
    *("departures", "regional_departures"),
)
# 31/01/2024 or 01/31/2024.
_DAY_AND_MONTH = re.compile(r"\s*(\d{1,2})([./-])(\d{1,2})\2\d{2,4}\b")
Missing = Literal["refuse", "drop", "forward", "linear", "keep"]
Normalise = Literal["train", "window"]
Split = Literal["train", "validation", "test", "all"]
Unsorted = Literal["sort", "refuse"]


@check_kinds
@dataclass(frozen=True, eq=False)
class Series:
    """One series.

    Attributes:
        name: of the series.
        columns: names of its C channels.
        values: float64 `[T, C]`, oldest first; NaN where a value is missing.
        times: int64 `[T]`, growing: nanoseconds since 1970 for dates, else the numbers of the table; None where the
            table has no times.
        dates: the times are dates.
        file: that it was read from, or empty.
        lines: int64 `[T]`, the line of the file that each row stands on, or None.
    """

    name: str
    columns: tuple[str, ...]
    values: Tensor
    times: Tensor | None = None
    dates: bool = False
    file: str = ""
    lines: Tensor | None = None

    @check_kinds
    def place(self, row: int) -> str:
        """Where a row comes from, for messages: `"table.csv, line 7"`, or `"row 6"` (from 1) without a file."""
        where = f"row {row + 1}" if self.lines is None else f"line {int(self.lines[row])}"
        return f"{self.file}, {where}" if self.file else where

    @check_kinds
    def rows(self, index: slice | Tensor) -> Series:
        """The same series with some of its rows."""
        return replace(
            self,
            values=self.values[index],
            times=None if self.times is None else self.times[index],
            lines=None if self.lines is None else self.lines[index],
        )


class Window(NamedTuple):
    """A piece of a series.

    Attributes:
        values: float32 `[L, C]`, normalised; 0 where a value is missing.
        observed: bool `[L, C]`, False where a value is missing.
        mean, std: float32 `[C]`; `values * std + mean` is what the table has.
        series: number of the series that it is from.
        calendar: int64 `[L, 5]`, see `arcore.data.calendar.calendar`; zeros where the series has no dates.
        start: row of the series, missing ones dealt with, that the window begins with.
    """

    values: Tensor
    observed: Tensor
    mean: Tensor
    std: Tensor
    series: int
    calendar: Tensor
    start: int


def read_tables(
    source: str | Path,
    *,
    time: str | None = None,
    group: str | None = None,
    columns: Sequence[str] | None = None,
    unsorted: Unsorted = "sort",
) -> list[Series]:
    """Read a table, or a folder of tables, as series.

    Args:
        source: a `.csv`, `.tsv` or `.parquet` file; or a folder of them, each one series (or several, by `group`).
        time: column of dates or numbers that orders the rows; None takes them in the order of the file.
        group: column whose values tell series apart.
        columns: channels; None takes all columns but `time` and `group`, which must then all be numbers.
        unsorted: what becomes of rows that do not stand in the order of `time`: sorted, or refused.

    Returns:
        Series, sorted by name.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: pandas, or for parquet pyarrow, is missing.
        ValueError: a column is missing or holds text, times are no dates or numbers, come twice in a series or are
            refused for their order, or the table is empty (file, column and line are named).
    """
    path = check_path("source", source)
    for name, value in (("time", time), ("group", group)):
        if value is not None:
            check_text(name, value, ", the name of a column,")
    if columns is not None:
        check_sequence("columns", columns, "names")
    if not path.exists():
        raise FileNotFoundError(
            f"the table {path} does not exist: expected a .csv or .parquet file, or a folder of them"
        )
    files = [path]
    known = ", ".join(sorted(TABLE_SUFFIXES))
    if not path.is_dir() and path.suffix.lower() not in TABLE_SUFFIXES:
        raise ValueError(f"{path} is no table (known endings: {known}); if it is one, give it that ending")
    if path.is_dir():
        found = walk(path)
        if found.dangling:
            raise ValueError(counted(found.dangling, "{} without a target", "link", "links"))
        files = [file for file in found.files if file.suffix.lower() in TABLE_SUFFIXES]
        others = [file for file in found.files if file.suffix.lower() not in TABLE_SUFFIXES]
        if others or not files:
            raise ValueError(
                counted(
                    others,
                    f"{{}} of {path} no tables (known endings: {known}); move away",
                    "file is",
                    "files are",
                )
                if others
                else f"the folder {path} holds no tables ({known})"
            )
    series = []
    for file in files:
        name = file.relative_to(path).with_suffix("").as_posix() if path.is_dir() else file.stem
        try:
            table = _read(file)
            read = series_of_table(
                table,
                time=time,
                group=group,
                columns=columns,
                name=name,
                unsorted=unsorted,
                lines=_lines(file, len(table)),
            )
        except ValueError as error:
            raise ValueError(f"the table {file}: {error}") from error
        series += [replace(one, file=str(file)) for one in read]
    return sorted(series, key=lambda one: one.name)


@check_kinds
def series_of_table(
    table: Any,
    *,
    time: str | None = None,
    group: str | None = None,
    columns: Sequence[str] | None = None,
    name: str = "",
    unsorted: Unsorted = "sort",
    lines: Sequence[int] | None = None,
) -> list[Series]:
    """The series of a `pandas.DataFrame`; arguments and errors are those of `read_tables`.

    Args:
        table: the frame.
        time, group, columns, unsorted: see `read_tables`.
        name: of the series, or put before the names that `group` gives.
        lines: the line of a file that each row stands on, for messages; None counts rows from 1.
    """
    if not hasattr(table, "columns") or not hasattr(table, "iloc"):
        raise TypeError(f"expected table to be a pandas.DataFrame but got {came(table)}")
    if unsorted not in ("sort", "refuse"):
        raise ValueError(f"unsorted must be 'sort' or 'refuse' but got {unsorted!r}")
    pandas = require("pandas", extra="series")
    if not len(table):
        raise ValueError("it has no rows")
    repeated = sorted(set(table.columns[table.columns.duplicated()]))
    if repeated:
        raise ValueError(f"it has several columns of the name {some(repeated)}")
    if isinstance(columns, str):
        raise TypeError(f"expected columns as a list of names but got the text {columns!r}")
    wanted = [one for one in table.columns if one not in (time, group)] if columns is None else list(columns)
    for one in (*wanted, *(() if time is None else (time,)), *(() if group is None else (group,))):
        if one not in table.columns:
            raise ValueError(f"it has no column {one!r}: it has {', '.join(map(str, table.columns))}")
    if not wanted:
        raise ValueError("it has no columns of values")
    table = table.reset_index(drop=True)
    for one in wanted:
        _check_numbers(pandas, table, one, lines)
    parts = (
        [("", table)]
        if group is None
        else [(str(key), part) for key, part in table.groupby(group, sort=True)]
    )
    if group is not None and table[group].isna().any():
        row = int(table[group].isna().to_numpy().argmax())
        raise ValueError(
            f"the column {group!r} has empty entries, so that rows belong to no series: the first is on "
            f"{_place(lines, row)}"
        )
    day_first = time is not None and _day_first(table[time], time, lines)
    made = []
    for key, part in parts:
        label = f"{name}/{key}" if name and key else (name or key)
        times = None
        dates = time is not None and not pandas.api.types.is_numeric_dtype(part[time].dtype)
        if time is not None:
            times = _times(pandas, part[time], time, lines, day_first=day_first)
            back = (times.diff() < 0).nonzero()
            if unsorted == "refuse" and len(back):
                row = int(back[0, 0]) + 1
                raise ValueError(
                    f"the times of the column {time!r} are not in order: {part[time].iloc[row]} on "
                    f"{_place(lines, part.index[row])} follows {part[time].iloc[row - 1]}; sort the rows, or say "
                    "--unsorted sort (unsorted='sort')"
                )
            order = times.argsort(stable=True)
            times, part = times[order], part.iloc[order.numpy()]
            twice = (times.diff() == 0).nonzero()
            if len(twice):
                again = int(twice[0, 0]) + 1
                at = part[time].iloc[again]
                where = f" of the series {label!r}" if group else ""
                hint = (
                    ""
                    if group
                    else "; if it holds several series, name the column that tells them apart with --group (group)"
                )
                raise ValueError(
                    f"the time {at} comes twice in the column {time!r}{where} "
                    f"({_place(lines, part.index[again - 1])} and {_place(lines, part.index[again])}){hint}"
                )
        values = torch.tensor(part[wanted].to_numpy("float64", na_value=math.nan))
        # Windows are float32.
        beyond = values.abs() > torch.finfo(torch.float32).max
        if beyond.any():
            row, column = beyond.nonzero()[0].tolist()
            value = float(values[row, column])
            what = (
                "an infinite value" if math.isinf(value) else f"the value {value:g}, beyond float32's range,"
            )
            raise ValueError(f"the column {wanted[column]!r} has {what} on {_place(lines, part.index[row])}")
        at_line = None if lines is None else torch.tensor([lines[row] for row in part.index])
        made.append(Series(label, tuple(map(str, wanted)), values, times, dates, lines=at_line))
    return made


class Opened(NamedTuple):
    """What `open_series` found.

    Attributes:
        series: sorted by name.
        inferred_time: the column that was taken for times without having been named; None where one was named, or
            there is none.
    """

    series: list[Series]
    inferred_time: str | None


def open_series(
    source: str | Path,
    *,
    time: str | None = None,
    group: str | None = None,
    columns: Sequence[str] | None = None,
    unsorted: Unsorted = "sort",
) -> Opened:
    """Open what `arcore train --data` names for models of series.

    Args:
        source: a name in `SERIES_NAMES`, a table or a folder of tables.
        time: column of times. None takes the only column of dates, or else the first that is called time, date,
            datetime, timestamp or ds in letters of any case, where there is one.
        group, columns, unsorted: see `read_tables`.

    Raises:
        TypeError: `source` is neither a name nor a path.
        FileNotFoundError, ImportError, ValueError: see `read_tables`.
    """
    if not isinstance(source, str | Path):
        raise TypeError(
            f"expected data as {', '.join(SERIES_NAMES)} or the path of a table but got {source!r}"
        )
    if source in SERIES_NAMES and not Path(source).exists():
        for name, value in (("time", time), ("group", group)):
            if value is not None:
                raise ValueError(f"{name} is for tables of your own: {source} has its times and groups")
        found = getattr(importlib.import_module("arcore.data.real"), str(source))()
        return Opened(found if columns is None else [_chosen(one, columns) for one in found], None)
    if not Path(source).exists() and (close := difflib.get_close_matches(str(source), SERIES_NAMES, n=1)):
        raise FileNotFoundError(
            f"there is neither a data set nor a table {source!r}: did you mean {close[0]!r}?"
        )
    inferred = None
    if time is None and Path(source).exists():
        inferred = _time_column(Path(source), {group, *(columns or ())})
    made = read_tables(source, time=time or inferred, group=group, columns=columns, unsorted=unsorted)
    return Opened(made, inferred)


def _chosen(series: Series, columns: Sequence[str]) -> Series:
    missing = [name for name in columns if name not in series.columns]
    if missing:
        raise ValueError(
            f"the series {series.name!r} has no column {missing[0]!r}: it has {', '.join(series.columns)}"
        )
    places = [series.columns.index(name) for name in columns]
    return replace(series, columns=tuple(columns), values=series.values[:, places])


def _time_column(path: Path, others: set[str | None]) -> str | None:
    """The column that orders the rows of a table, or of the first one of a folder."""
    if path.is_dir():
        tables = [file for file in walk(path).files if file.suffix.lower() in TABLE_SUFFIXES]
        if not tables:
            return None
        path = tables[0]
    pandas = require("pandas", extra="series")
    try:
        table = _read(path)
    except ValueError:
        return None  # told when it is read
    names = [name for name in table.columns if name not in others]
    dates = [name for name in names if _holds_dates(pandas, table[name])]
    if len(dates) == 1:
        return str(dates[0])
    called = [name for name in names if str(name).lower() in TIME_NAMES]
    return str(called[0]) if called else None


def _holds_dates(pandas: Any, column: Any) -> bool:
    if pandas.api.types.is_datetime64_any_dtype(column.dtype):
        return True
    if pandas.api.types.is_numeric_dtype(column.dtype):
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Some day is above 12 in most columns, but perhaps not among the first; the reader looks at all.
        head, both = column.head(100), (False, True)
        return any(
            pandas.to_datetime(head, errors="coerce", utc=True, dayfirst=day).notna().all() for day in both
        )


def fill_missing(series: Series, how: Missing) -> Series:
    """Deal with missing values.

    Args:
        series: the series.
        how: `"refuse"` raises where one is missing; `"drop"` leaves out rows in which one is; `"forward"` repeats the
            last value and `"linear"` draws a line between the values around, both in the order of rows, where rows
            before a channel's first value are left out (and `"linear"` repeats the last value at the end); `"keep"`
            leaves NaN.

    Returns:
        The series, with fewer rows perhaps.

    Raises:
        ValueError: a value is missing, or no row is left, or there is no such way.
    """
    check_instance("series", series, Series)
    filled, keep = _filled(series, how)
    if filled is series.values:
        return series
    return replace(series, values=filled).rows(keep)


def _filled(series: Series, how: Missing) -> tuple[Tensor, Tensor]:
    """Values without holes, and which rows stay."""
    values, gone = series.values, series.values.isnan()
    if how not in ("refuse", "drop", "forward", "linear", "keep"):
        raise ValueError(f"missing must be refuse, drop, forward, linear or keep but got {how!r}")
    everything = torch.ones(len(values), dtype=torch.bool)
    if how == "keep" or not gone.any():
        return values, everything
    if how == "refuse":
        counts = {name: int(count) for name, count in zip(series.columns, gone.sum(0), strict=True) if count}
        shown = ", ".join(f"{count} in {name!r}" for name, count in counts.items())
        raise ValueError(
            f"the series {series.name!r} lacks values: {shown} of {len(values)} rows, the first on "
            f"{series.place(int(gone.any(1).nonzero()[0, 0]))}; say --missing drop, forward or linear "
            "(missing='drop', 'forward', 'linear' or 'keep')"
        )
    if how == "drop":
        filled, keep = values.clone(), ~gone.any(dim=1)
    else:
        place = torch.arange(len(values)).unsqueeze(1).expand_as(values)
        before = torch.where(gone, -1, place).cummax(dim=0).values
        filled = last = values.gather(0, before.clamp(min=0))
        if how == "linear":
            size = len(values)
            after = torch.where(gone, size, place).flip(0).cummin(dim=0).values.flip(0)
            following = values.gather(0, after.clamp(max=size - 1))
            share = (place - before).double() / (after - before).clamp(min=1)
            inside = gone & (after < size) & (before >= 0)
            filled = torch.where(inside, last + share * (following - last), last)
        keep = (before >= 0).all(dim=1)
    if not keep.any():
        raise ValueError(f"no row of the series {series.name!r} has all its values")
    return filled, keep


class SeriesWindows(Dataset[Window]):
    """Windows of series, split in time.

    Of each series the last part in time is held out for tests, and before it a part for validation, if one is asked
    for. A window of `"train"` lies before both entirely. A window of `"validation"` or `"test"` has its last `horizon`
    rows in its part, and may begin before: what is predicted was never trained on.

    Args:
        series: of the same columns.
        length: rows L of a window.
        horizon: rows at the end of a window that are to be predicted, at most L; L holds out whole windows.
        stride: rows from the start of a window to that of the next.
        split: `"train"`, `"validation"`, `"test"` or `"all"`.
        held_out: share of the rows of each series that are held out for tests.
        validation: share of them, before those, that is held out for validation.
        normalise: `"train"` by mean and deviation of each channel over the training rows of all series; `"window"` by
            those of the first L - `horizon` rows of each window; None leaves values as they are. A channel that does
            not vary is not scaled, see `constant`.
        missing: see `fill_missing`.

    Attributes:
        mean, std: float64 `[C]` of the training rows.
        series: the series with missing values dealt with, as far as the split reaches.
        constant: names of the channels that do not vary in the training rows.
        notes: sentences on series that are too short.

    Raises:
        TypeError: a length is no whole number.
        ValueError: the series have other columns than each other, values are missing, a length or share is out of
            range, or no series is long enough.
    """

    def __init__(
        self,
        series: Sequence[Series],
        *,
        length: int,
        horizon: int = 1,
        stride: int = 1,
        split: Split = "train",
        held_out: float = 0.1,
        validation: float = 0.0,
        normalise: Normalise | None = "train",
        missing: Missing = "refuse",
    ) -> None:
        self.length = check_whole("length", length, 1, "rows")
        self.horizon = check_whole("horizon", horizon, 1, "rows")
        stride = check_whole("stride", stride, 1, "rows")
        if self.horizon > self.length:
            raise ValueError(f"horizon must be at most length={length} but got {horizon}")
        if normalise == "window" and self.horizon == self.length:
            raise ValueError("normalise='window' needs rows before the horizon: make it shorter than length")
        if split not in ("train", "validation", "test", "all"):
            raise ValueError(f"split must be 'train', 'validation', 'test' or 'all' but got {split!r}")
        if normalise not in ("train", "window", None):
            raise ValueError(f"normalise must be 'train', 'window' or None but got {normalise!r}")
        check_sequence("series", series, "Series")
        for one in series:
            check_instance("series", one, Series)
        if not 0 < check_number("held_out", held_out) < 1:
            raise ValueError(f"held_out must be a share between 0 and 1 but got {held_out}")
        if not 0 <= validation < 1 - held_out or (split == "validation" and not validation):
            raise ValueError(
                f"validation must be a share between 0 and 1 - held_out={1 - held_out:g}, above 0 for the split of "
                f"that name, but got {validation}"
            )
        if not series:
            raise ValueError("there are no series")
        others = [one.name for one in series if one.columns != series[0].columns]
        if others:
            raise ValueError(
                f"the series {some(others)} have other columns than {series[0].name!r}: {', '.join(series[0].columns)}"
            )
        self.columns = series[0].columns
        self.names = tuple(one.name for one in series)
        self.normalise = normalise
        self._original = tuple(series)
        # Each part is filled without looking beyond it: a line to the first held-out value would give that away.
        self.series: list[Series] = []
        parts, training = [], []
        for one in series:
            size = len(one.values)
            last = size - math.ceil(size * held_out)
            first = last - math.ceil(size * validation)
            known = fill_missing(one.rows(slice(first)), missing)
            training.append(known.values)
            reach = {"train": first, "validation": last}.get(split, size)
            part = one.rows(slice(reach))
            filled, keep = _filled(part, missing)
            self.series.append(known if split == "train" else replace(part, values=filled).rows(keep))
            border = {"train": 0, "all": 0, "validation": first}.get(split, last)
            parts.append(int(keep[:border].sum()) if border else 0)
        self.mean, self.std = _moments(torch.cat(training))
        varies = _varies(torch.cat(training))
        self.constant = tuple(
            name for name, one in zip(self.columns, varies.tolist(), strict=True) if not one
        )
        self._calendars = [
            calendar(one.times)
            if one.dates and one.times is not None
            else torch.zeros(len(one.values), len(CALENDAR), dtype=torch.int64)
            for one in self.series
        ]
        self._starts: list[tuple[int, int]] = []
        short = []
        for number, (one, border) in enumerate(zip(self.series, parts, strict=True)):
            first, last = 0, len(one.values) - self.length
            if split in ("validation", "test"):
                first = max(0, border + self.horizon - self.length)
            if last < first:
                short.append(series[number].name)
            self._starts += [(number, start) for start in range(first, last + 1, stride)]
        self.notes: tuple[str, ...] = ()
        if short:
            self.notes = (
                counted(short, f"{{}} too short for a window of {length} rows", "series is", "series are"),
            )
        if not self._starts:
            longest = max(len(one.values) for one in self.series)
            named = sorted({one.file for one in series if one.file})
            raise ValueError(
                f"no series is long enough for a {split} window of {length} rows: the longest has {longest}"
                f"{' in ' + some(named) if named else ''}; give more rows or a smaller length"
            )

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Window:
        number, start = self._starts[index]
        rows = slice(start, start + self.length)
        values = self.series[number].values[rows]
        observed = ~values.isnan()
        mean, std = self.mean, self.std
        if self.normalise == "window":
            mean, std = _moments(values[: self.length - self.horizon])
        elif self.normalise is None:
            mean, std = torch.zeros_like(mean), torch.ones_like(std)
        scaled = torch.where(observed, (values - mean) / std, 0.0)
        dates = self._calendars[number][rows]
        return Window(scaled.float(), observed, mean.float(), std.float(), number, dates, start)

    def digest(self) -> str:
        """Identifies the content of all series, whatever the split: 16 hexadecimal digits."""
        state = hashlib.blake2b(repr(self.columns).encode(), digest_size=8)
        for one in self._original:
            state.update(f"{one.name}\0{tuple(one.values.shape)}\0".encode())
            for part in (one.values, one.times):
                if part is not None:
                    state.update(part.numpy().tobytes())
        return state.hexdigest()


def _moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel over what is observed; 0 and 1 where nothing is, 1 where nothing varies."""
    mean = values.nanmean(dim=0).nan_to_num()
    std = (values - mean).square().nanmean(dim=0).sqrt().nan_to_num()
    return mean, torch.where(_varies(values), std, 1.0)


def _varies(values: Tensor) -> Tensor:
    """Which channels vary; rounding errors of a mean are no variation."""
    mean = values.nanmean(dim=0).nan_to_num()
    return (values - mean).square().nanmean(dim=0).sqrt().nan_to_num() > 1e-12 * mean.abs()


def _place(lines: Sequence[int] | None, row: int) -> str:
    return f"row {row + 1}" if lines is None else f"line {lines[row]}"


def _lines(path: Path, rows: int) -> list[int] | None:
    """The line of a text file that each row of the table stands on; None where rows and lines do not correspond."""
    if path.suffix.lower() == ".parquet":
        return None
    with path.open("rb") as file:
        found = [number for number, line in enumerate(file, 1) if line.strip()]
    return found[1:] if len(found) == rows + 1 else None


class _BadHeader(ValueError):
    """What a table's first line says cannot be."""


def _check_header(path: Path, separator: str) -> None:
    """Refuse a table whose columns are separated in another way, or of which two have one name."""
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        names = next(csv.reader(file, delimiter=separator), [])
    others = [other for other in ";\t|," if other != separator and len(names) == 1 and other in names[0]]
    if others:
        raise _BadHeader(
            f"its columns seem to be separated by {others[0]!r} but {separator!r} is expected: convert it, with "
            "points in decimal fractions"
        )
    repeated = sorted({name for name in names if name and names.count(name) > 1})
    if repeated:
        raise _BadHeader(f"it has several columns of the name {some(repeated)}")


def _check_lengths(path: Path, separator: str) -> None:
    """Refuse rows that end before the last column, which pandas would fill with missing values."""
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        rows = csv.reader(file, delimiter=separator)
        wanted = len(next(rows, []))
        for row in rows:
            if len(row) < wanted and any(field.strip() for field in row):
                fields = "field" if len(row) == 1 else "fields"
                raise ValueError(
                    f"line {rows.line_num} has {len(row)} {fields} and the header {wanted}: complete the row; a "
                    "missing value is an empty field"
                )


def _read(path: Path) -> Any:
    pandas = require("pandas", extra="series")
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            require("pyarrow", extra="series")
            return pandas.read_parquet(path, engine="pyarrow")
        separator = "\t" if suffix == ".tsv" else ","
        _check_header(path, separator)
        with warnings.catch_warnings():
            # pandas takes the first field for a name of the row where rows have more fields than the header, or with
            # index_col=False warns and drops the last.
            warnings.simplefilter("error", pandas.errors.ParserWarning)
            table = pandas.read_csv(path, sep=separator, index_col=False)
        _check_lengths(path, separator)
        return table
    except (ImportError, _BadHeader):
        raise
    except (pandas.errors.ParserWarning, pandas.errors.ParserError) as warning:
        where = _first_too_long(path, separator)
        if not where and isinstance(warning, pandas.errors.ParserError):
            raise ValueError(f"it cannot be read: {_first_line(warning)}") from warning
        raise ValueError(
            f"rows have more fields than the header has names{where}; give each column a name"
        ) from warning
    # Both libraries raise classes of their own for damaged files.
    except Exception as error:
        raise ValueError(f"it cannot be read: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _first_too_long(path: Path, separator: str) -> str:
    """Where the first row with more fields than the header stands, for a message."""
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        rows = csv.reader(file, delimiter=separator)
        names = len(next(rows, []))
        line = next((rows.line_num for row in rows if len(row) > names), None)
    return "" if line is None else f", the first on line {line}"


def _check_numbers(pandas: Any, table: Any, name: str, lines: Sequence[int] | None) -> None:
    kind = table[name].dtype
    if pandas.api.types.is_numeric_dtype(kind) and not pandas.api.types.is_complex_dtype(kind):
        return
    hint = "leave the column out with --columns (columns=[...]), or name it with --time or --group"
    if pandas.api.types.is_datetime64_any_dtype(kind):
        raise ValueError(f"the column {name!r} holds dates; {hint}")
    # A single cell with a thousands separator or a remark makes a whole column text.
    numbers = pandas.to_numeric(table[name], errors="coerce")
    bad = table[name][numbers.isna() & table[name].notna()]
    shown = f"{bad.iloc[0]!r} on {_place(lines, bad.index[0])}" if len(bad) else str(kind)
    raise ValueError(f"the column {name!r} holds no numbers but for example {shown}; {hint}")


def _day_first(column: Any, name: str, lines: Sequence[int] | None) -> bool:
    """Whether dates that begin with a day or a month begin with the day: all dates of a column are written alike.

    Raises:
        ValueError: either reading is possible, and they differ.
    """
    first = next((text for text in column if isinstance(text, str)), "")
    if not _DAY_AND_MONTH.match(first):
        return False
    found = [(row, _DAY_AND_MONTH.match(text)) for row, text in column.items() if isinstance(text, str)]
    pairs = [(row, match[0].strip(), int(match[1]), int(match[3])) for row, match in found if match]
    # Points stand behind the day in every country that writes them.
    if "." in first.split()[0] or any(one > 12 for _, _, one, _ in pairs):
        return True
    unclear = [(row, text) for row, text, one, two in pairs if one != two]
    if not unclear or any(two > 12 for _, _, _, two in pairs):
        return False
    row, text = unclear[0]
    raise ValueError(
        f"the column {name!r} holds dates whose first number may be the day or the month, such as {text!r} on "
        f"{_place(lines, row)}: write them as year-month-day, such as 2024-01-31"
    )


def _times(pandas: Any, column: Any, name: str, lines: Sequence[int] | None, *, day_first: bool) -> Tensor:
    if column.isna().any():
        row = column.index[int(column.isna().to_numpy().argmax())]
        raise ValueError(
            f"the column {name!r} has empty entries, so that rows have no time: the first is on {_place(lines, row)}"
        )
    if pandas.api.types.is_integer_dtype(column.dtype):
        return torch.tensor(column.to_numpy("int64"))
    if pandas.api.types.is_numeric_dtype(column.dtype):
        numbers = column.to_numpy("float64")
        broken = ~((numbers == numbers.round()) & (abs(numbers) < 2**62))
        if broken.any():
            row = int(broken.argmax())
            raise ValueError(
                f"the column {name!r} has times that are no whole numbers or dates: {numbers[row]} on "
                f"{_place(lines, column.index[row])}"
            )
        return torch.tensor(numbers).long()
    try:
        dates = pandas.to_datetime(column, utc=True, dayfirst=day_first)
    except (ValueError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            bad = pandas.to_datetime(column, utc=True, dayfirst=day_first, errors="coerce").isna()
        # What pandas calls a position is no line of the file.
        shown = reason
        if bad.any():
            row = column.index[int(bad.to_numpy().argmax())]
            shown = f"{column[row]!r} on {_place(lines, row)} is none like those before it"
        raise ValueError(f"the column {name!r} holds no dates: {shown}") from error
    return torch.tensor(dates.dt.tz_localize(None).to_numpy("datetime64[ns]").astype("int64"))
