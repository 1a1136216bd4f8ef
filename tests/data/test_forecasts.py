"""Baselines, scores, tables and pictures of forecasts."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from arcore.data import Series
from arcore.data.forecast_baselines import SIMPLE, baselines, drift, ets, last_value, seasonal_naive
from arcore.data.forecast_scores import crps, mase, rank_ic, scores
from arcore.data.forecasts import Forecast, Forecasts

pandas = pytest.importorskip("pandas")


def rows(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).unsqueeze(1)


def test_simple_baselines():
    history = rows(1, 2, 3, 4, 5, 7)
    assert last_value(history, 2).flatten().tolist() == [7, 7]
    assert seasonal_naive(history, 5, 3).flatten().tolist() == [4, 5, 7, 4, 5]
    assert drift(history, 2).flatten().tolist() == pytest.approx([7 + 6 / 5, 7 + 12 / 5])
    assert drift(rows(3), 2).flatten().tolist() == [3, 3]
    assert set(baselines(history, 2, 1)) == {"last value", "drift"}
    assert set(baselines(history, 2, 3)) == set(SIMPLE)
    with pytest.raises(ValueError, match="a season of 9 rows needs as many rows but got 6"):
        seasonal_naive(history, 2, 9)
    with pytest.raises(ValueError, match="without missing values"):
        baselines(rows(1, math.nan), 2)
    with pytest.raises(ValueError, match="got 'mean'"):
        baselines(history, 2, which=["mean"])
    with pytest.raises(ValueError, match="horizon to be at least 1"):
        baselines(history, 0)


def test_exponential_smoothing_finds_a_season():
    pytest.importorskip("statsmodels")
    time = torch.arange(72)
    wave = torch.sin(2 * math.pi * time / 12) + 0.02 * time
    history = torch.stack([wave, torch.full_like(wave, 5.0)], 1)[:60].double()
    found = ets(history, 12, 12)
    assert (found[:, 0] - wave[60:]).abs().max() < 0.1
    assert found[:, 1].tolist() == [5.0] * 12
    assert ets(history[:4], 3).tolist() == history[3:4].expand(3, 2).tolist()


def test_scores_are_their_formulas():
    pytest.importorskip("torchmetrics")
    generator = torch.Generator().manual_seed(0)
    paths = torch.randn(9, 4, 2, generator=generator, dtype=torch.float64)
    actual = torch.randn(4, 2, generator=generator, dtype=torch.float64)
    spread = (paths.unsqueeze(0) - paths.unsqueeze(1)).abs().mean((0, 1))
    expected = ((paths - actual).abs().mean(0) - spread / 2).mean()
    assert float(crps(paths, actual)) == pytest.approx(float(expected))
    assert float(crps(paths[:1], actual)) == pytest.approx(float((paths[0] - actual).abs().mean()))
    history = torch.tensor([[1.0, 0], [3, 0], [2, 0], [5, 0]], dtype=torch.float64)
    scale = (abs(2 - 1) + abs(5 - 3)) / 2
    found = mase(paths[0], actual, history, 2)
    assert float(found[0]) == pytest.approx(float((paths[0] - actual)[:, 0].abs().mean() / scale))
    assert found[1].isnan()
    with pytest.raises(ValueError, match="MASE at a season of 4 rows needs more rows"):
        mase(paths[0], actual, history, 4)
    table = scores(paths, actual, history, 9, torch.tensor([2.0, 4.0], dtype=torch.float64))
    error = (paths.mean(0) - actual) / torch.tensor([2.0, 4.0])
    assert table["mse"] == pytest.approx(float(error.square().mean()))
    assert table["mae"] == pytest.approx(float(error.abs().mean()))
    order = torch.tensor([0.1, 5, -3, 7])
    assert float(rank_ic(order, order.exp())) == pytest.approx(1)
    assert float(rank_ic(order, -order)) == pytest.approx(-1)
    with pytest.raises(ValueError, match="N >= 2"):
        rank_ic(order[:1], order[:1])


def forecast(paths: int = 5) -> Forecast:
    ns = torch.tensor(pandas.date_range("2024-01-01", periods=30, freq="D").as_unit("ns").asi8)
    history = Series("a", ("x", "y"), torch.randn(27, 2, dtype=torch.float64), ns[:27], dates=True)
    drawn = torch.randn(paths, 3, 2, dtype=torch.float64)
    return Forecast(
        history, ns[27:], drawn, baselines={"last value": last_value(history.values, 3)}, actual=drawn[0] + 1
    )


def test_a_table_with_quantiles_and_a_picture(tmp_path: Path):
    pytest.importorskip("matplotlib")
    one = forecast()
    made = Forecasts([one], (0.1, 0.5, 0.9), "title", ("a note",))
    said = made.save(tmp_path / "out.png")
    assert said[0] == "a note"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.csv", "out.png", "out_paths.csv"]
    table = pandas.read_csv(tmp_path / "out.csv")
    assert list(table.columns) == [
        *("series", "column", "time", "mean", "q0.1", "q0.5", "q0.9", "last value", "actual")
    ]
    assert len(table) == 6
    assert table["time"][0] == "2024-01-28 00:00:00"
    assert table["q0.5"][0] == pytest.approx(float(one.paths[:, 0, 0].median()))
    assert table["mean"][3] == pytest.approx(float(one.paths[:, 0, 1].mean()))
    paths = pandas.read_csv(tmp_path / "out_paths.csv")
    assert len(paths) == 15
    assert paths["y"][4] == pytest.approx(float(one.paths[1, 1, 1]))
    assert (tmp_path / "out.png").stat().st_size > 5000
    assert made.save(None) == ["a note"]


def test_quantiles_of_one_path_are_those_of_earlier_errors():
    one = forecast(1)
    assert one.quantile(0.5) is None
    assert "q0.5" not in Forecasts([one]).table()
    errors = torch.arange(11.0).double().view(11, 1, 1).expand(11, 3, 2)
    told = Forecast(one.history, one.times, one.paths, errors=errors)
    torch.testing.assert_close(told.quantile(0.9), one.paths[0] + 9)


def test_rank_correlation_over_series():
    pytest.importorskip("torchmetrics")
    several = []
    for growth, came in ((1.1, 1.2), (1.3, 1.5), (0.9, 0.8), (1.0, 1.1)):
        history = Series("a", ("x", "zero"), torch.tensor([[5.0, 1], [10, 0]], dtype=torch.float64))
        paths, actual = (torch.full((3, 2, 2), 10 * one, dtype=torch.float64) for one in (growth, came))
        several.append(Forecast(history, torch.arange(2), paths, actual=actual[0]))
    assert Forecasts(several).rank_ics() == {"x": pytest.approx(1.0)}
    assert Forecasts(several).score_lines() == ["RankIC over 4 series: x 1"]
    assert Forecasts(several[:2]).rank_ics() == {}
