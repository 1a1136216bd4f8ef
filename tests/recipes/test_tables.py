"""What the recipes for series share, driven by a small recipe of a linear model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from arcore.data import open_series
from arcore.recipes._recipe import Start, ZooTask
from arcore.recipes._tables import ForecastOptions, Forecasts, TableOptions, TableRecipe
from arcore.training import TrainConfig

pandas = pytest.importorskip("pandas")


class Linear(nn.Module):
    """The next two rows from the last four, channel by channel."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 2))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.einsum("blc,lh->bhc", rows, self.weight)


class LinearTask(ZooTask):
    def loss(self, values, observed, mean, std, series, *rest):
        error = self.model(values[:, :4]) - values[:, 4:]
        return error.square().mean(), {}


class LinearRecipe(TableRecipe):
    task: ClassVar[type[ZooTask]] = LinearTask

    def window(self, config: Any, options: Any) -> tuple[int, int]:
        return 6, 2

    def build(self, start: Start, options: Any, series: Any) -> nn.Module:
        return Linear()

    def forecast(self, networks, rows, horizon, facts, options):
        mean, std = (torch.tensor(facts[name], dtype=torch.float64) for name in ("mean", "std"))
        known = (rows - mean) / std
        assert known.shape[0] == 4
        return (known[-1:].expand(horizon, -1) * std + mean).expand(options.num, -1, -1)


def start(tmp_path: Path) -> Start:
    return Start(preset="linear", config=TrainConfig(steps=1), out=tmp_path, show_progress=False)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rows = [
        f"2024-01-{day:02},{name},{day * k}" for name, k in (("A", 1), ("B", 100)) for day in range(1, 31)
    ]
    path = tmp_path / "prices.csv"
    path.write_text("\n".join(["Day,ticker,close", *rows]))
    return path


def test_a_table_becomes_windows_and_a_loss(tmp_path: Path, table: Path):
    recipe = LinearRecipe()
    work = recipe.prepare(start(tmp_path), TableOptions(data=str(table), group="ticker"))
    facts = work.task.facts
    assert facts["columns"] == ["close"]
    assert facts["window"] == [6, 2]
    assert len(work.train) == 2 * (27 - 5)
    assert len(work.test) == 2  # its last two rows are the 28th and 29th; the next pair would need a 31st
    batch = next(iter(torch.utils.data.DataLoader(work.train, batch_size=3)))
    loss, _ = work.task.loss(*batch)
    assert float(loss.detach()) == pytest.approx(float(batch[0][:, 4:].square().mean()))


def test_what_orders_the_rows_is_inferred_and_said(tmp_path: Path, table: Path, capsys):
    opened = open_series(table, group="ticker")
    assert opened.inferred_time == "Day"
    assert [one.name for one in opened.series] == ["prices/A", "prices/B"]
    assert opened.series[0].dates
    begin = Start(preset="linear", config=TrainConfig(steps=1), out=tmp_path)
    LinearRecipe().prepare(begin, TableOptions(data=str(table), group="ticker"))
    said = capsys.readouterr().err
    assert "the column 'Day' orders the rows" in said
    assert "2 series of close, 60 rows in all" in said


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


def test_a_forecast_is_a_table_in_the_units_of_the_data(tmp_path: Path, table: Path):
    recipe = LinearRecipe()
    options = TableOptions(data=str(table), group="ticker")
    work = recipe.prepare(start(tmp_path), options)
    facts = {**work.task.facts, "options": vars(options), "folder": str(tmp_path)}
    drawn = recipe.sample({"model": work.task.model}, facts, ForecastOptions(num=2), print)
    assert isinstance(drawn, Forecasts)
    for suffix in ("csv", "tsv", "parquet"):
        if suffix == "parquet":
            pytest.importorskip("pyarrow")
        (said,) = drawn.save(tmp_path / f"out.{suffix}")
        assert "2 rows after each of 2 series, 2 paths" in said
    written = pandas.read_csv(tmp_path / "out.csv")
    assert list(written.columns) == ["series", "path", "time", "close"]
    assert written["time"].tolist()[:2] == ["2024-01-31", "2024-02-01"]
    assert written["close"].tolist() == pytest.approx([30.0] * 4 + [3000.0] * 4)
    longer = recipe.sample({"model": work.task.model}, facts, ForecastOptions(horizon=5), print)
    assert longer.paths[0].shape == (1, 5, 1)
    with pytest.raises(ValueError, match="a forecast is a table"):
        recipe.check_sampling(ForecastOptions(out=Path("x.png")))


def test_times_go_on_in_their_rhythm(tmp_path: Path):
    days = pandas.date_range("2024-01-01", periods=20, freq="B").astype(str)
    (tmp_path / "t.csv").write_text("\n".join(["date,x", *(f"{day},1" for day in days)]))
    (one,) = open_series(tmp_path / "t.csv").series
    assert [str(day.date()) for day in one.times_after(2)] == ["2024-01-29", "2024-01-30"]  # after a Friday
    (tmp_path / "t.csv").write_text("year,x\n2000,1\n2002,1\n2004,2\n")
    (two,) = open_series(tmp_path / "t.csv", time="year").series
    assert two.times_after(2) == [2006, 2008]
    (three,) = open_series(tmp_path / "t.csv", columns=["x"]).series
    assert three.times_after(2) == [3, 4]


def test_other_data_are_refused_on_resume(tmp_path: Path, table: Path):
    recipe, options = LinearRecipe(), TableOptions(data=str(table), group="ticker")
    work = recipe.prepare(start(tmp_path), options)
    again = Start(
        preset="linear",
        config=TrainConfig(steps=1),
        out=tmp_path,
        networks={"model": work.task.model},
        facts=work.task.facts,
        source=tmp_path / "step-1",
        show_progress=False,
    )
    recipe.prepare(again, options)
    table.write_text(table.read_text().replace("3000", "3001"))
    with pytest.raises(ValueError, match="are no longer those of the run"):
        recipe.prepare(again, options)


@pytest.mark.parametrize("wrong", [{"held_out": 0}, {"held_out": 1.0}, {"stride": 0}])
def test_settings_out_of_range(wrong):
    with pytest.raises(ValueError, match="must be"):
        TableOptions(**wrong)
