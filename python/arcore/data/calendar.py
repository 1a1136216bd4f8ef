"""Times of series: calendars, how far apart rows are, gaps, and the times of rows to come."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor

from arcore._optional import require
from arcore.nn.kinds import Axes, Count, check_kinds

if TYPE_CHECKING:
    from arcore.data.series import Series

CALENDAR = ("minute", "hour", "weekday", "day", "month")
_FIELDS = ("minute", "hour", "day_of_week", "day", "month")
Gaps = Literal["refuse", "keep", "fill"]
# Months and years are not all equally long; a step that exceeds the usual one by this factor is a gap.
GAP = 1.5
DAY = 24 * 3600 * 10**9
# Length of the season of rows that are at most so far apart, in nanoseconds.
_SEASONS = ((3600 * 10**9, DAY), (DAY, 7 * DAY), (366 * DAY, 365 * DAY))


@check_kinds
def calendar(times: Annotated[Tensor, Axes("T", whole=True)]) -> Tensor:
    """Minute, hour, weekday (Monday 0), day of the month and month of dates.

    Args:
        times: int64 `[T]`, nanoseconds since 1970.

    Returns:
        int64 `[T, 5]`, in the order of `CALENDAR`.
    """
    dates = _dates(times)
    return torch.stack([torch.tensor(getattr(dates, name).to_numpy("int64")) for name in _FIELDS], dim=1)


@check_kinds
def shown_time(series: Series, time: int) -> str:
    """A time of a series for people."""
    return str(_dates(torch.tensor([time]))[0]) if series.dates else str(time)


@check_kinds
def usual_step(series: Series) -> int:
    """The median time between rows, in the units of `times`; 1 where a series has no times or one row."""
    if series.times is None or len(series.times) < 2:
        return 1
    return int(series.times.diff().median())


@check_kinds
def is_business_daily(series: Series) -> bool:
    """Whether rows are days and none is a Saturday or Sunday, as of a stock exchange."""
    if not series.dates or series.times is None or len(series.times) < 8 or usual_step(series) != DAY:
        return False
    return bool((calendar(series.times)[:, 2] < 5).all())


@check_kinds
def find_gaps(series: Series) -> Tensor:
    """Rows after which times are missing: int64 `[G]`. Weekends are no gaps in a series that has none."""
    if series.times is None or len(series.times) < 2:
        return torch.zeros(0, dtype=torch.int64)
    steps, usual = series.times.diff(), usual_step(series)
    late = steps > GAP * usual
    if is_business_daily(series):
        # Friday to Monday is three days.
        weekday = calendar(series.times)[:-1, 2]
        late = steps > torch.where(weekday == 4, 3 * DAY, DAY)
    return late.nonzero().flatten()


@check_kinds
def mend_gaps(series: Series, how: Gaps) -> Series:
    """Deal with missing rows.

    Args:
        series: the series, oldest row first.
        how: `"refuse"` raises where rows are missing; `"keep"` takes the rows that there are as equally spaced, as is
            usual for prices; `"fill"` puts in rows without values, at the usual distance, for `fill_missing`.

    Raises:
        ValueError: rows are missing (file and line are named), or there is no such way.
    """
    if how not in ("refuse", "keep", "fill"):
        raise ValueError(f"gaps must be refuse, keep or fill but got {how!r}")
    found = find_gaps(series)
    if how == "keep" or not len(found):
        return series
    assert series.times is not None
    if how == "refuse":
        row = int(found[0])
        before, after = (shown_time(series, int(series.times[at])) for at in (row, row + 1))
        more = f"; there are {len(found)} such gaps" if len(found) > 1 else ""
        raise ValueError(
            f"the series {series.name!r} has a gap in time from {before} to {after} ({series.place(row + 1)}){more}; "
            "say --gaps keep (gaps='keep') to take rows as equally spaced, or --gaps fill to put in rows without "
            "values"
        )
    usual = usual_step(series)
    values, times = [], []
    for row in range(len(series.times)):
        values.append(series.values[row : row + 1])
        times.append(series.times[row : row + 1])
        if row in found:
            step = int(series.times[row + 1] - series.times[row])
            count = round(step / usual) - 1
            share = torch.arange(1, count + 1) * step // (count + 1)
            values.append(series.values.new_full((count, len(series.columns)), torch.nan))
            times.append(series.times[row] + share)
    return replace(series, values=torch.cat(values), times=torch.cat(times), lines=None)


@check_kinds
def times_to_come(series: Series, count: Count) -> Tensor:
    """Times of the rows that follow a series.

    Args:
        series: the series.
        count: rows N.

    Returns:
        int64 `[N]`: working days, or the frequency that pandas finds in the last rows (such as ends of months), or
        multiples of the usual step; 0, 1, ... from the last row on where the series has no times.
    """
    if series.times is None:
        return torch.arange(count) + len(series.values)
    last = int(series.times[-1])
    if series.dates:
        pandas = require("pandas", extra="series")
        tail = _dates(series.times[-64:])
        rule = "B" if is_business_daily(series) else None
        if rule is None and len(tail) > 2:
            with warnings.catch_warnings():
                # Of a coming change of what it returns; both kinds are understood below.
                warnings.simplefilter("ignore")
                rule = pandas.infer_freq(tail)
        if rule is not None:
            dates = pandas.date_range(tail[-1], periods=count + 1, freq=rule)[-count:] if count else tail[:0]
            return torch.tensor(dates.as_unit("ns").asi8)
    return last + usual_step(series) * torch.arange(1, count + 1)


@check_kinds
def season(series: Series) -> int:
    """Rows of the season that series of this kind usually have: a day of hours, a week of days, a year of months.

    Five for working days, 1 (no season) where times are no dates or rows are years.
    """
    if not series.dates or series.times is None:
        return 1
    if is_business_daily(series):
        return 5
    step = usual_step(series)
    for most, whole in _SEASONS:
        if step <= most:
            return max(1, round(whole / step))
    return 1


def _dates(times: Tensor) -> Any:
    pandas = require("pandas", extra="series")
    return pandas.to_datetime(times.numpy(), unit="ns")
