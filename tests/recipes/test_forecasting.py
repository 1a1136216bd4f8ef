"""Training forecasters on tables, going on, and forecasts from the command line."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from arcore.catalog import load_checkpoint
from arcore.cli import main
from arcore.data.load_series import load_series
from arcore.recipes import forecasting, train
from arcore.recipes.forecasting import ForecastSampling, TableOptions
from arcore.training import checkpoint

pandas = pytest.importorskip("pandas")

SETTINGS = {"steps": 4, "batch_size": 4, "checkpoint_every": 2, "accelerator": "cpu"}
SMALL = {
    "context": 16,
    "patch": 8,
    "pools": (2, 1),
    "dim": 16,
    "num_layers": 1,
    "num_heads": 2,
    "hidden_dim": 16,
}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "t.csv"
    times = pandas.date_range("2024-01-01", periods=160, freq="h")
    phase = torch.arange(160) * (2 * torch.pi / 24)
    pandas.DataFrame({"Time": times, "a": phase.sin().numpy(), "b": 5 + phase.cos().numpy()}).to_csv(
        path, index=False
    )
    return path


def run(out: Path, **options: Any) -> Any:
    return train("gpht_tiny", out=out, show_progress=False, **{"settings": SETTINGS, **options})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, table: Path) -> Path:
    out = tmp_path_factory.mktemp("run")
    run(out, data=str(table), model_settings=SMALL)
    return out


def test_a_resumed_run_ends_with_the_same_weights(trained: Path, table: Path, tmp_path: Path):
    run(
        tmp_path,
        data=str(table),
        model_settings=SMALL,
        settings={**SETTINGS, "steps": 2, "schedule": "constant"},
    )
    whole = run(
        tmp_path / "w", data=str(table), model_settings=SMALL, settings={**SETTINGS, "schedule": "constant"}
    )
    run(tmp_path, resume=tmp_path, settings={"steps": 4})
    one, other = (
        load_file(folder / "step-00000004" / "model.safetensors") for folder in (tmp_path, tmp_path / "w")
    )
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert {row["split"] for row in whole.history} == {"train", "test"}


def test_what_orders_the_rows_is_said(table: Path, tmp_path: Path, capsys: Any):
    train("gpht_tiny", out=tmp_path, data=str(table), model_settings=SMALL, settings={**SETTINGS, "steps": 1})
    said = capsys.readouterr().err
    assert "the column 'Time' orders the rows" in said
    assert "1 series of a, b, 160 rows in all" in said


def test_exponential_smoothing_stands_beside_a_forecast_or_is_told_to_be_missing(
    trained: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("statsmodels")
    words = ["sample", str(trained), "--horizon", "4", "--backtest", "--out", str(tmp_path / "f.png")]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "ETS              mse" in said
    assert "not among the baselines" not in said
    assert {"ETS", "drift"} <= set(pandas.read_csv(tmp_path / "f.csv").columns)
    monkeypatch.setattr(forecasting, "ETS_FITS", 1)
    assert main(words) == 0
    assert "ETS is not among the baselines: 1 forecasts of 2 columns are 2 fits" in capsys.readouterr().out
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "statsmodels" else find(name, *rest)
    )
    assert main(words) == 0
    assert "it needs the package statsmodels; run `pip install statsmodels`" in capsys.readouterr().out
    assert "ETS" not in pandas.read_csv(tmp_path / "f.csv").columns


def test_a_model_that_reads_dates_refuses_a_table_without(trained: Path, table: Path, tmp_path: Path):
    bare = tmp_path / "bare.csv"
    pandas.read_csv(table).drop(columns=["Time"]).to_csv(bare, index=False)
    networks, facts = load_checkpoint(checkpoint.find(trained))
    assert facts["dates"]
    recipe, series = forecasting.RECIPE, load_series(str(bare))
    recipe.check_columns(networks["model"], facts, series)  # GPHT reads none
    networks["model"].reads_calendar = True
    with pytest.raises(ValueError, match=r"bare\.csv: the model was trained on rows with dates"):
        recipe.check_columns(networks["model"], facts, series)


def test_a_forecast_from_the_command_line(trained: Path, table: Path, tmp_path: Path, capsys: Any):
    out = tmp_path / "f.png"
    words = ["sample", "gpht_tiny", "--checkpoint", str(trained), "--horizon", "20", "--out", str(out)]
    assert main(words) == 0
    found = pandas.read_csv(tmp_path / "f.csv")
    assert len(found) == 40
    assert found["time"][0] == "2024-01-07 16:00:00"
    assert {"mean", "q0.1", "q0.9", "last value", "seasonal naive", "drift"} <= set(found.columns)
    assert (found["q0.1"] <= found["q0.9"]).all()
    assert main([*words, "--backtest"]) == 0
    said = capsys.readouterr().out
    assert "earlier forecasts of rows that were held out" in said
    assert "seasonal naive   mse" in said
    other = tmp_path / "short.csv"
    pandas.DataFrame({"v": range(12)}).to_csv(other, index=False)
    assert main(["sample", str(trained), "--data", str(other), "--out", str(out)]) == 2
    assert "has 12 rows" in capsys.readouterr().err
    assert main(["sample", "var_tiny", "--checkpoint", str(trained)]) == 2
    assert "holds a gpht, not a var_tiny" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "options", "says"),
    [
        ("time,v\n2024-01-02,1\n2024-01-01,2\n", {}, r"t\.csv: .*not in order: 2024-01-01 on line 3"),
        ("time,v\n2024-01-01,1\n2024-01-01,2\n", {}, r"t\.csv: .*comes twice .*line 2 and line 3"),
        ("time,v\n2024-01-01,1\n2024-01-02,\n", {}, r"lacks values: 1 in 'v' .*t\.csv, line 3"),
        ("time,v\n1,1\n2,1\n3,2\n9,3\n10,4\n", {}, r"gap in time from 3 to 9 \(.*t\.csv, line 5\)"),
        ("time,v\n1,1\n2,3\n3,2\n", {}, r"no series is long enough for a train window of 24 rows: .*t\.csv"),
        ("v\n1\n2\n", {"columns": ("w",)}, r"t\.csv: .*no column 'w': it has v"),
        ("v\n1\nx\n", {}, r"t\.csv: .*holds no numbers but for example 'x' on line 3"),
        (
            "v,w\n" + "".join(f"{i % 5},7\n" for i in range(80)),
            {},
            r"'w' of .*t\.csv does not vary",
        ),
    ],
)
def test_tables_that_cannot_be_learned_from(tmp_path: Path, content: str, options: dict[str, Any], says: str):
    path = tmp_path / "t.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=says):
        run(tmp_path / "run", data=str(path), model_settings=SMALL, **options)


def test_options_out_of_range():
    for fields in ({"horizon": 0}, {"num": 0}, {"season": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            ForecastSampling(**fields)
    with pytest.raises(ValueError, match="between 0 and 1"):
        ForecastSampling(quantiles=(0.5, 1.0))
    with pytest.raises(ValueError, match="held_out_share"):
        TableOptions(held_out_share=0.0)


def test_another_table_is_no_continuation(trained: Path, tmp_path: Path):
    other = tmp_path / "other.csv"
    pandas.DataFrame({"v": torch.arange(160).sin().numpy()}).to_csv(other, index=False)
    with pytest.raises(ValueError, match="is no longer that of the run"):
        run(trained, resume=trained, data=str(other), settings={"steps": 6})
