"""Private forecasting against PyTorch's own cells, gradients sample by sample, and the laws of the noise."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from arcore.data import Series, SeriesWindows
from arcore.zoo.series.dp_mobility import MobilityConfig, MobilityForecaster, Recurrence, dp_mobility_tiny
from arcore.zoo.series.dp_mobility.privacy import clipped_gradients, gaussian_sigma, private_gradients
from tests.zoo.protocol_forecasting import Protocol as Forecasts

pytest.importorskip("pytorch_lightning")
from arcore.zoo.series.dp_mobility.recipe import (
    NoisyCounts,
    PrivateForecasting,
    PrivateOptions,
    privacy_lines,
)


class Protocol(Forecasts):
    """Counts of regions, which are not negative."""

    def __init__(self, preset: str) -> None:
        super().__init__(preset)
        self.values = 10 + 10 * self.values.abs()


def plain(module: Recurrence, rows: Tensor) -> Tensor:
    """The cell written gate by gate for one window `[T, inputs]`."""
    units = module.units
    w, u = (one.weight.double().split(units) for one in (module.input, module.state))
    b, c = (one.bias.double().split(units) for one in (module.input, module.state))
    h = m = torch.zeros(units).double()
    for x in rows.double():
        own = [matrix @ h + bias for matrix, bias in zip(u, c, strict=True)]
        new = [matrix @ x + bias for matrix, bias in zip(w, b, strict=True)]
        if module.cell == "gru":
            z, r = (new[0] + own[0]).sigmoid(), (new[1] + own[1]).sigmoid()
            h = z * h + (1 - z) * (new[2] + r * own[2]).clamp(min=0)
        else:
            i, f, o = ((new[k] + own[k]).sigmoid() for k in (0, 1, 3))
            m = f * m + i * (new[2] + own[2]).clamp(min=0)
            h = o * m.clamp(min=0)
    return h


@torch.no_grad()
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_cells_are_their_formulas(cell: str):
    torch.manual_seed(0)
    module = Recurrence(5, 7, cell)
    rows = torch.randn(3, 6, 5)
    expected = torch.stack([plain(module, one) for one in rows])
    torch.testing.assert_close(module(rows).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_gradients_are_clipped_sample_by_sample(cell: Any):
    torch.manual_seed(0)
    model = MobilityForecaster(replace(dp_mobility_tiny(), units=5, cell=cell))
    rows, dates = 30 * torch.rand(6, 7, 6), torch.randint(1, 6, (6, 7, 5))
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    sizes = []
    for b in range(6):
        model.zero_grad()
        model.objective(rows[b : b + 1], dates[b : b + 1])[0].backward()
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        sizes.append(float(norm))
        for name, p in model.named_parameters():
            expected[name] += p.grad * min(1.0, 0.3 / float(norm))
    found, norms = clipped_gradients(model, rows, dates, 0.3)
    assert max(sizes) > 0.3
    for name, one in expected.items():
        torch.testing.assert_close(found[name], one, rtol=1e-4, atol=1e-6, msg=name)
    torch.testing.assert_close(norms, torch.tensor(sizes).clamp(max=0.3), rtol=1e-4, atol=1e-6)
    none, norms = clipped_gradients(model, rows[:0], dates[:0], 0.3)
    assert all(not one.any() for one in none.values())
    assert norms.shape == (0,)


def test_noise_has_its_deviation():
    model = MobilityForecaster(MobilityConfig(units=48))
    rows, dates = torch.rand(0, 7, 6), torch.ones(0, 7, 5, dtype=torch.int64)
    torch.manual_seed(1)
    drawn, _ = private_gradients(model, rows, dates, limit=0.5, noise=3.0, expected=40)
    whole = torch.cat([one.flatten() for one in drawn.values()])
    assert len(whole) > 10_000
    assert whole.std().item() == pytest.approx(3.0 * 0.5 / 40, rel=0.03)


def test_the_gaussian_mechanism_is_as_private_as_it_says():
    """The hockey-stick divergence of two normal laws, integrated numerically, is delta."""
    for epsilon, delta in ((0.5, 1e-5), (1.0, 1e-2), (8.0, 1e-5)):
        sigma = gaussian_sigma(epsilon, delta)
        x = torch.linspace(-12 * sigma - 2, 12 * sigma + 2, 400_001, dtype=torch.float64)
        p, q = (
            torch.exp(-((x - m) ** 2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi)) for m in (1.0, 0.0)
        )
        found = torch.trapezoid((p - math.exp(epsilon) * q).clamp(min=0), x)
        assert float(found) == pytest.approx(delta, rel=1e-3)
    assert gaussian_sigma(1.0, 1e-5, 3.0) == pytest.approx(3 * gaussian_sigma(1.0, 1e-5))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"epsilon": 0.0}, "epsilon must be a number above 0 but got 0"),
        ({"epsilon": -1.0}, "epsilon must be a number above 0 but got -1"),
        ({"epsilon": math.nan}, "epsilon to be a number but got nan"),
        ({"delta": 0.0}, "delta must lie between 0 and 1"),
        ({"delta": 1.0}, "delta must lie between 0 and 1"),
        ({"clip_norm": 0.0}, "clip_norm must be above 0"),
        ({"privacy": "both"}, "privacy must be gradient, input or none"),
    ],
)
def test_budgets_that_mean_nothing(fields: dict[str, Any], says: str):
    with pytest.raises(ValueError, match=says):
        PrivateOptions(**fields)


def test_noise_on_counts_is_drawn_once():
    values = torch.full((40, 2), 100.0, dtype=torch.float64)
    values[:, 0] = 0
    windows = SeriesWindows([Series("a", ("x", "y"), values)], length=3, normalise=None)
    noisy = NoisyCounts(windows, 5.0, 0)
    assert torch.equal(noisy[4].values[1], noisy[5].values[0])
    rows = noisy.noisy[0]
    assert torch.equal(rows, rows.round())
    assert rows.min() == 0
    assert 2 < (rows[:, 1] - 100).std() < 8


def test_what_is_no_count_is_refused_with_its_line(tmp_path: Path):
    pytest.importorskip("pandas")
    table = tmp_path / "t.csv"
    table.write_text("hour,a,b\n" + "".join(f"{i},{i % 5},{i % 3 - (i == 9)}\n" for i in range(30)))
    options = PrivateOptions(data=str(table), time="hour", privacy="none")
    with pytest.raises(ValueError, match=r"t\.csv, line 11: -1 in the column 'b' is no count"):
        PrivateForecasting().read(options)
    assert PrivateForecasting().read(options, columns=("a",))[0].columns == ("a",)


def test_what_a_budget_means_is_said():
    told = {"way": "gradient", "samples": 100, "delta": 1e-5, "noise": 1.0, "epsilon": 2.0}
    said = " ".join(privacy_lines(told))
    assert "epsilon 2, delta 1e-05 per window" in said
    assert "100 x epsilon = 200" in said
    assert privacy_lines({"way": "none"})[0].startswith("no privacy")


def test_shapes_and_configs():
    model = MobilityForecaster(dp_mobility_tiny())
    with pytest.raises(ValueError, match=r"expected counts \[B, 6, 6\]"):
        model(torch.zeros(1, 5, 6), torch.zeros(1, 5, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match="cell to be"):
        MobilityConfig(cell="rnn")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scale to be above 0"):
        MobilityConfig(scale=0.0)
    values, dates = torch.rand(2, 6, 6) * 9, torch.ones(2, 9, 5, dtype=torch.int64)
    out = model.forecast(values, dates, 3)
    assert out.shape == (2, 3, 6)
    assert out.min() >= 0
    assert model.forecast(values[:0], dates[:0], 3).shape == (0, 3, 6)
