from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from arcore.data import Series, SeriesWindows, fill_missing, open_series, read_tables
from arcore.data.calendar import (
    calendar,
    find_gaps,
    is_business_daily,
    mend_gaps,
    season,
    shown_time,
    times_to_come,
)
from arcore.data.series import _time_column

pandas = pytest.importorskip("pandas")
NAN = math.nan


def series(values, name: str = "a", columns=("x",)) -> Series:
    table = torch.tensor(values, dtype=torch.float64)
    return Series(name, columns, table.unsqueeze(1) if table.dim() == 1 else table)


def test_a_table_in_order_of_time(tmp_path: Path):
    path = tmp_path / "t.csv"
    path.write_text("when,x,y\n2020-01-03,3,30\n2020-01-01,1,10\n2020-01-02,2,\n")
    (one,) = read_tables(path, time="when")
    assert one.name == "t"
    assert one.columns == ("x", "y")
    assert one.values[:, 0].tolist() == [1, 2, 3]
    assert one.values[1, 1].isnan()
    day = 24 * 3600 * 10**9
    assert one.times.diff().tolist() == [day, day]
    (chosen,) = read_tables(path, time="when", columns=["y"])
    assert chosen.columns == ("y",)


DAY = 24 * 3600 * 10**9


@pytest.mark.parametrize(
    ("dates", "days"),
    [
        (("01.02.2020", "02.02.2020", "01.03.2020"), (1, 28)),
        (("31/01/2020", "01/02/2020", "02/02/2020"), (1, 1)),
        (("01/31/2020", "02/01/2020", "02/02/2020"), (1, 1)),
        (("01/01/2020", "02/02/2020", "03/03/2020"), (32, 30)),
        (("2020-02-01", "2020-02-02", "2020-03-01"), (1, 28)),
        (("01.02.2020 10:00", "01.02.2020 22:00", "02.02.2020 22:00"), (0.5, 1)),
    ],
)
def test_days_and_months(tmp_path: Path, dates, days):
    path = tmp_path / "t.csv"
    path.write_text("date,x\n" + "".join(f"{date},{i}\n" for i, date in enumerate(dates)))
    (one,) = read_tables(path, time="date", unsorted="refuse")
    assert (one.times.diff().double() / DAY).tolist() == list(days)
    opened = open_series(path)
    assert opened.inferred_time == "date"


def test_a_text_is_no_table(tmp_path: Path):
    path = tmp_path / "book.txt"
    path.write_text("date,x\n2024-01-01,1\n")
    for read in (read_tables, open_series):
        with pytest.raises(
            ValueError, match=r"book.txt is no table \(known endings: .csv, .parquet, .tsv\); if"
        ):
            read(path)
    assert len(read_tables(path.rename(tmp_path / "book.CSV"), time="date")) == 1


def test_days_that_may_be_months_are_refused(tmp_path: Path):
    path = tmp_path / "t.csv"
    path.write_text("date,x\n01/01/2020,0\n01/02/2020,1\n01/03/2020,2\n")
    with pytest.raises(
        ValueError, match=r"may be the day or the month, such as '01/02/2020' on line 3: write"
    ):
        read_tables(path, time="date")
    # The whole column decides, not the rows of one series.
    path.write_text("date,who,x\n01/02/2020,a,0\n02/02/2020,a,1\n01/02/2020,b,2\n25/02/2020,b,3\n")
    a, b = read_tables(path, time="date", group="who")
    assert (a.times.diff().double() / DAY).tolist() == [1]
    assert (b.times.diff().double() / DAY).tolist() == [24]


def test_several_series(tmp_path: Path):
    table = pandas.DataFrame({"who": ["b", "a", "b", "a"], "t": [2, 1, 1, 2], "v": [20.0, 1.0, 10.0, 2.0]})
    table.to_csv(tmp_path / "t.csv", index=False)
    for suffix in ("csv", "parquet", "tsv"):
        path = tmp_path / f"t.{suffix}"
        if suffix == "parquet":
            pytest.importorskip("pyarrow")
            table.to_parquet(path)
        else:
            table.to_csv(path, index=False, sep="\t" if suffix == "tsv" else ",")
        found = read_tables(path, time="t", group="who")
        assert [one.name for one in found] == ["t/a", "t/b"]
        assert [one.values.flatten().tolist() for one in found] == [[1, 2], [10, 20]]
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("two", "one"):
        table[["v"]].to_csv(folder / f"{name}.CSV", index=False)
    assert [one.name for one in read_tables(folder)] == ["one", "two"]


@pytest.mark.parametrize(
    ("text", "options", "says"),
    [
        ("x\n1\nn/a?\n", {}, r"column 'x' holds no numbers but for example 'n/a\?' on line 3"),
        ('x\n1\n"1,234"\n', {}, r"'1,234' on line 3"),
        ("t,x\n2020-01-01,1\n", {}, "column 't' holds no numbers"),
        (
            "t,x\n1,1\n1,2\n",
            {"time": "t"},
            r"the time 1 comes twice in the column 't' \(line 2 and line 3\); if it holds several series",
        ),
        ("t,x\nsoon,1\n", {"time": "t"}, "'t' holds no dates: 'soon' on line 2"),
        ("t,x\n2020-01-01,1\n\n2020-99-01,2\n", {"time": "t"}, "'t' holds no dates: '2020-99-01' on line 4"),
        ("t,x\n2020-01-01,2\n,1\n", {"time": "t"}, "'t' has empty entries.*the first is on line 3"),
        ("t,x\n1,1\n2.5,1\n", {"time": "t"}, "no whole numbers or dates: 2.5 on line 3"),
        ("t,x\n1,1\ninf,1\n", {"time": "t"}, "no whole numbers or dates: inf on line 3"),
        ("g,x\na,1\n,2\n", {"group": "g"}, "'g' has empty entries.*the first is on line 3"),
        ("x\n1\n", {"time": "t"}, "no column 't': it has x"),
        ("x\n1\n", {"columns": ["y"]}, "no column 'y'"),
        ("t\n1\n", {"time": "t"}, "no columns of values"),
        ("x\n1\ninf\n", {}, "'x' has an infinite value on line 3"),
        ("x\n1\n-1e39\n", {}, r"'x' has the value -1e\+39, beyond float32's range, on line 3"),
        ("x\n", {}, "it has no rows"),
        ("", {}, "cannot be read"),
    ],
)
def test_tables_that_cannot_be_understood(tmp_path: Path, text: str, options: dict, says: str):
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"the table .*t\.csv: .*{says}"):
        read_tables(path, **options)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        # pandas alone reads a single column of the numbers 5 here.
        ("date;a\n2020-01-01;1,5\n2020-01-02;2,5\n", "separated by ';' but ',' is expected"),
        ("date\ta\n2020-01-01\t1\n", r"separated by '\\t'"),
        # ... and here a of the values of b.
        ("a,b\n7,1,2\n8,2,3\n", "more fields than the header has names, the first on line 2"),
        ("a,b\n7,1\n8,2,3\n", "more fields than the header has names, the first on line 3"),
        ("a,b,c\n7,1,2\n8,2\n", "line 3 has 2 fields and the header 3: complete the row"),
        ("a,b\n7,1\n\n8", "line 4 has 1 field and the header 2"),
        ("date,a,a\n2020-01-01,1,2\n2020-01-02,2,3\n", "several columns of the name a"),
    ],
)
def test_no_column_is_taken_for_another(tmp_path: Path, text: str, says: str):
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(ValueError, match=says):
        read_tables(tmp_path / "table.csv")


def test_places_without_tables(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"does not exist: expected a \.csv or \.parquet"):
        read_tables(tmp_path / "gone.csv")
    with pytest.raises(ValueError, match="holds no tables"):
        read_tables(tmp_path)
    (tmp_path / "a.xlsx").write_bytes(b"")
    with pytest.raises(ValueError, match=r"1 file is of .* no tables .*a\.xlsx"):
        read_tables(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"a\.parquet: it cannot be read"):
        read_tables(tmp_path / "a.parquet")


def test_missing_values():
    holes = series([NAN, 1.0, NAN, NAN, 4.0, NAN])
    ways = {
        "drop": [1, 4],
        "forward": [1, 1, 1, 4, 4],
        "linear": [1, 2, 3, 4, 4],
    }
    for how, expected in ways.items():
        assert fill_missing(holes, how).values.flatten().tolist() == expected
    assert fill_missing(holes, "keep") is holes
    with pytest.raises(
        ValueError,
        match="'a' lacks values: 4 in 'x' of 6 rows, the first on row 1; say --missing drop, forward",
    ):
        fill_missing(holes, "refuse")
    with pytest.raises(ValueError, match="missing must be"):
        fill_missing(holes, "guess")
    with pytest.raises(ValueError, match="no row of the series 'a' has all its values"):
        fill_missing(series([[NAN, 1], [1, NAN]], columns=("x", "y")), "drop")
    both = Series("b", ("x",), holes.values, torch.arange(6))
    assert fill_missing(both, "drop").times.tolist() == [1, 4]


def test_windows_are_split_in_time():
    one = series(list(range(20)))
    train = SeriesWindows([one], length=4, horizon=1, held_out=0.2, normalise=None)
    test = SeriesWindows([one], length=4, horizon=1, held_out=0.2, normalise=None, split="test")
    whole = SeriesWindows([one], length=4, horizon=4, held_out=0.2, normalise=None, split="test")
    assert [int(w.values[0, 0]) for w in (train[i] for i in range(len(train)))] == list(range(13))
    assert [int(w.values[-1, 0]) for w in (test[i] for i in range(len(test)))] == [16, 17, 18, 19]
    assert [int(w.values[0, 0]) for w in (whole[i] for i in range(len(whole)))] == [16]
    strided = SeriesWindows([one], length=4, stride=5, split="all", normalise=None)
    assert [int(strided[i].values[0, 0]) for i in range(len(strided))] == [0, 5, 10, 15]


def test_windows_never_cross_series():
    both = [series(range(10)), series(range(100, 103), "short"), series(range(200, 210), "b")]
    windows = SeriesWindows(both, length=4, split="all", normalise=None)
    assert len(windows) == 14
    assert {w.series for w in (windows[i] for i in range(14))} == {0, 2}
    for i in range(14):
        assert windows[i].values.diff(dim=0).unique().tolist() == [1]
    assert windows.notes == ("1 series is too short for a window of 4 rows: short",)


def test_what_is_held_out_is_not_looked_at():
    """Neither the mean nor a line that fills a hole at the border knows the held-out values."""
    values = [0.0, 1, 2, 3, 4, 5, 6, NAN, 1000, 2000]
    for how in ("forward", "linear"):
        train = SeriesWindows([series(values)], length=2, held_out=0.2, missing=how)
        rows = [0.0, 1, 2, 3, 4, 5, 6, 6]
        assert train.mean.item() == pytest.approx(sum(rows) / 8)
        last = train[len(train) - 1]
        assert (last.values * last.std + last.mean).flatten().tolist() == pytest.approx([6, 6])
        test = SeriesWindows([series(values)], length=2, held_out=0.2, missing=how, split="test")
        shown = [(w.values * w.std + w.mean)[-1].item() for w in (test[i] for i in range(len(test)))]
        assert shown == pytest.approx([1000, 2000])
    dropped = SeriesWindows(
        [series(values)], length=2, held_out=0.2, missing="drop", split="test", normalise=None
    )
    assert dropped[0].values.flatten().tolist() == [6, 1000]


def test_normalisation_can_be_undone():
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(50, 3, generator=generator, dtype=torch.float64) * torch.tensor([1, 100, 0]) + 7
    one = Series("a", ("x", "y", "constant"), table)
    for how in ("train", "window", None):
        windows = SeriesWindows([one], length=10, horizon=3, normalise=how)
        window = windows[5]
        torch.testing.assert_close(
            (window.values * window.std + window.mean).double(), table[5:15], rtol=1e-5, atol=1e-4
        )
        assert window.values.isfinite().all()
        assert (window.values[:, 2] == (7 if how is None else 0)).all()
    window = SeriesWindows([one], length=10, horizon=3, normalise="window")[5]
    assert window.values[:7, :2].mean(0).abs().max() < 1e-5
    assert window.values[:7, 1].std(correction=0).item() == pytest.approx(1, abs=1e-5)
    train = SeriesWindows([one], length=10)
    torch.testing.assert_close(train.mean[0], table[:45, 0].mean())


def test_holes_may_stay():
    windows = SeriesWindows([series([1.0, NAN, 3, 4, 5, 6, 7, 8, 9, 10])], length=3, missing="keep")
    window = windows[0]
    assert window.observed.flatten().tolist() == [True, False, True]
    assert window.values[1, 0] == 0
    assert windows.mean.item() == pytest.approx((1 + sum(range(3, 10))) / 8)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"length": 0}, ValueError, "length must be at least 1 row"),
        ({"length": 2.5}, TypeError, "length must be a whole number of rows"),
        ({"length": 4, "stride": 0}, ValueError, "stride must be at least 1"),
        ({"length": 4, "horizon": 5}, ValueError, "horizon must be at most length=4"),
        ({"length": 4, "horizon": 4, "normalise": "window"}, ValueError, "needs rows before the horizon"),
        ({"length": 4, "split": "val"}, ValueError, "split must be"),
        ({"length": 4, "normalise": "min"}, ValueError, "normalise must be"),
        ({"length": 4, "held_out": 1}, ValueError, "held_out must be a share"),
        ({"length": 40}, ValueError, "no series is long enough for a train window of 40 rows"),
    ],
)
def test_bad_windows(options: dict, error: type, says: str):
    with pytest.raises(error, match=says):
        SeriesWindows([series(range(10))], **options)


def test_series_of_other_columns():
    with pytest.raises(ValueError, match="the series b have other columns than 'a': x"):
        SeriesWindows([series(range(10)), series(range(10), "b", ("y",))], length=2)
    with pytest.raises(ValueError, match="there are no series"):
        SeriesWindows([], length=2)


def test_digest_of_series():
    first = SeriesWindows([series(range(10))], length=2).digest()
    assert SeriesWindows([series(range(10))], length=3, split="test").digest() == first
    assert SeriesWindows([series([*range(9), 10])], length=2).digest() != first
    assert SeriesWindows([series(range(10), "b")], length=2).digest() != first


def test_windows_collate():
    windows = SeriesWindows([series(range(20))], length=4)
    batch = next(iter(torch.utils.data.DataLoader(windows, batch_size=3)))
    assert batch.values.shape == (3, 4, 1)
    assert batch.series.tolist() == [0, 0, 0]


def test_lines_are_named_behind_blank_ones_and_without_an_order(tmp_path: Path):
    path = tmp_path / "t.csv"
    path.write_text("t,x\n\n2020-01-01,1\n2020-01-03,2\n2020-01-02,\n")
    with pytest.raises(ValueError, match=r"not in order: 2020-01-02 on line 5 follows 2020-01-03"):
        read_tables(path, time="t", unsorted="refuse")
    (one,) = read_tables(path, time="t")
    assert one.lines.tolist() == [3, 5, 4]
    assert one.dates
    with pytest.raises(ValueError, match=r"1 in 'x' of 3 rows, the first on .*t\.csv, line 5"):
        fill_missing(one, "refuse")
    with pytest.raises(ValueError, match=r"no series is long enough .* the longest has 2 in .*t\.csv"):
        SeriesWindows([one], length=9, missing="forward")


def test_validation_lies_between_training_and_tests():
    one = series(list(range(20)))
    settings = {"length": 4, "held_out": 0.2, "validation": 0.2, "normalise": None}
    last = {
        split: [
            int(w.values[-1, 0])
            for w in map(SeriesWindows([one], split=split, **settings).__getitem__, range(4))
        ]
        for split in ("validation", "test")
    }
    assert last == {"validation": [12, 13, 14, 15], "test": [16, 17, 18, 19]}
    train = SeriesWindows([one], split="train", **settings)
    assert max(int(train[i].values[-1, 0]) for i in range(len(train))) == 11
    assert train.mean.item() == pytest.approx(sum(range(12)) / 12)
    with pytest.raises(ValueError, match="validation must be a share"):
        SeriesWindows([one], length=4, split="validation")
    with pytest.raises(ValueError, match="validation must be a share"):
        SeriesWindows([one], length=4, held_out=0.5, validation=0.5)


def test_a_channel_that_does_not_vary_is_named():
    assert SeriesWindows([series([[1.0, 2], [1, 3], [1, 4]], columns=("a", "b"))], length=1).constant == (
        "a",
    )


def test_calendar_gaps_and_times_to_come():
    days = pandas.bdate_range("2024-01-01", periods=30)
    ns = torch.tensor(days.as_unit("ns").asi8)
    one = Series("a", ("x",), torch.arange(30.0).double().unsqueeze(1), ns, dates=True)
    assert calendar(ns)[0].tolist() == [0, 0, 0, 1, 1]
    assert is_business_daily(one)
    assert season(one) == 5
    assert len(find_gaps(one)) == 0
    following = torch.tensor(pandas.bdate_range("2024-02-12", periods=3).as_unit("ns").asi8)
    assert times_to_come(one, 3).tolist() == following.tolist()
    holes = one.rows(torch.tensor([i for i in range(30) if i not in (8, 17, 18)]))
    assert find_gaps(holes).tolist() == [7, 15]
    with pytest.raises(
        ValueError, match=r"gap in time from 2024-01-10 .* to 2024-01-12 .* \(row 9\); there are 2"
    ):
        mend_gaps(holes, "refuse")
    assert mend_gaps(holes, "keep") is holes
    with pytest.raises(ValueError, match="how to be one of 'refuse', 'keep', 'fill'"):
        mend_gaps(holes, "guess")
    hours = torch.tensor(pandas.date_range("2024-01-01", periods=9, freq="h").as_unit("ns").asi8)
    table = torch.arange(9.0).double().unsqueeze(1)
    hourly = Series("h", ("x",), table, hours, dates=True).rows(torch.tensor([0, 1, 2, 5, 6, 7, 8]))
    filled = mend_gaps(hourly, "fill")
    assert filled.times.tolist() == hours.tolist()
    assert fill_missing(filled, "linear").values.flatten().tolist() == list(range(9))
    assert season(hourly) == 24
    months = torch.tensor(pandas.date_range("2023-01-31", periods=9, freq="ME").as_unit("ns").asi8)
    monthly = Series("m", ("x",), table, months, dates=True)
    assert len(find_gaps(monthly)) == 0
    assert season(monthly) == 12
    assert shown_time(monthly, int(times_to_come(monthly, 1))) == "2023-10-31 00:00:00"
    plain = Series("p", ("x",), table, torch.arange(9) + 1700)
    assert times_to_come(plain, 2).tolist() == [1709, 1710]
    assert times_to_come(Series("q", ("x",), table), 2).tolist() == [9, 10]
    assert season(plain) == 1
    with pytest.raises(ValueError, match="gap in time from 1703 to 1709"):
        mend_gaps(Series("p", ("x",), table[:5], torch.tensor([1700, 1701, 1702, 1703, 1709])), "refuse")


def test_windows_carry_their_calendar():
    ns = torch.tensor(pandas.date_range("2024-01-01", periods=10, freq="h").as_unit("ns").asi8)
    one = Series("a", ("x",), torch.arange(10.0).double().unsqueeze(1), ns, dates=True)
    window = SeriesWindows([one], length=4)[3]
    assert window.calendar[:, 1].tolist() == [3, 4, 5, 6]
    assert window.start == 3
    assert (SeriesWindows([series(range(10))], length=4)[0].calendar == 0).all()


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
