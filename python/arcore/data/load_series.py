"""Series as forecasting reads them: a table of one's own or of a package, with gaps and missing values dealt with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from arcore.data.calendar import Gaps, mend_gaps
from arcore.data.series import Missing, Series, Unsorted, fill_missing, open_series
from arcore.nn.kinds import check_kinds


@check_kinds
def load_series(
    source: str | Path,
    *,
    time: str | None = None,
    group: str | None = None,
    columns: Sequence[str] | None = None,
    unsorted: Unsorted = "refuse",
    gaps: Gaps = "refuse",
    missing: Missing = "refuse",
    say: Callable[[str], None] = lambda _: None,
) -> list[Series]:
    """Series for forecasting.

    Args:
        source, time, group, columns: see `arcore.data.open_series`.
        unsorted: see `arcore.data.read_tables`.
        gaps: see `arcore.data.calendar.mend_gaps`.
        missing: see `arcore.data.fill_missing`; for `"keep"` nothing is filled.
        say: receives sentences on what was taken without having been named.

    Raises:
        TypeError, FileNotFoundError, ImportError, ValueError: see the functions named above; file and line are named.
    """
    found, inferred = open_series(source, time=time, group=group, columns=columns, unsorted=unsorted)
    if inferred is not None:
        say(f"{source}: the column {inferred!r} orders the rows")
    count = sum(len(one.values) for one in found)
    say(f"{source}: {len(found)} series of {', '.join(found[0].columns)}, {count} rows in all")
    return [fill_missing(mend_gaps(one, gaps), missing) for one in found]
