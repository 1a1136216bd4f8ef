"""What `open_series` takes by name, and which column it takes for times."""

from __future__ import annotations

from pathlib import Path

import pytest

from arcore.data import open_series

pytest.importorskip("pandas")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Time,x\n1,2\n2,3\n", "Time"),
        ("ds,when,x\n5,2020-01-01,2\n6,2020-01-02,3\n", "when"),
        ("a,b\n1,2\n2,3\n", None),
        ("from,until,date,x\n2020-01-01,2020-02-01,1,5\n2020-03-01,2020-04-01,2,6\n", "date"),
    ],
)
def test_which_column_orders_the_rows(tmp_path: Path, text: str, expected: str | None):
    from arcore.data.series import _time_column

    (tmp_path / "t.csv").write_text(text)
    assert _time_column(tmp_path / "t.csv", {None}) == expected
    assert _time_column(tmp_path, {None}) == expected


def test_names_of_data_sets():
    pytest.importorskip("statsmodels")
    (sunspots,) = open_series("sunspots").series
    assert sunspots.columns == ("sunspots",)
    assert sunspots.values.shape == (309, 1)
    (co2,) = open_series("co2", columns=["co2"]).series
    assert co2.dates
    with pytest.raises(ValueError, match=r"no column 'x': it has co2"):
        open_series("co2", columns=["x"])
    with pytest.raises(ValueError, match="time is for tables of your own"):
        open_series("co2", time="date")
    with pytest.raises(FileNotFoundError, match="did you mean 'sunspots'"):
        open_series("sunspot")
    with pytest.raises(TypeError, match="or the path of a table but got 3"):
        open_series(3)  # type: ignore[arg-type]
