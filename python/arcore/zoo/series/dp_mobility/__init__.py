"""Private forecasts of how many people are where (Arcolezi et al., Neural Comput. Appl. 2022, arXiv:2205.00436).

A recurrent network reads the counts of some regions over a few rows, and the time of day and week, and predicts the
next row of all regions. Two ways to privacy are compared: noise on the gradient of every sample, clipped before
(DP-SGD), and noise on the counts before anything is learned. Each is private per sample; `arcore train` says what
that means for a person who is in many.

Counts are divided by a constant of the config, not by their own deviation, which would tell something about them.

As in the released code, candidates of the state go through a ReLU; the week has seven days here (the released code
divides by thirty).

Left out: the search for sizes and rates.

Legend: B windows, T rows, C regions, U units.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from arcore.catalog import System, preset
from arcore.nn.kinds import check_kinds

SYSTEM = System(
    name="dp_mobility",
    title="DP mobility forecasting",
    paper="arXiv:2205.00436",
    paper_title="Differentially Private Multivariate Time Series Forecasting of Aggregated Human Mobility "
    "With Deep Learning: Input or Gradient Perturbation?",
    topic="series",
    kind="model",
    model="MobilityForecaster",
    recipe="own",
    summary="Recurrent forecasts of counts with differential privacy by noise on gradients or on the counts.",
    claim="Clipped gradients, noise and budget follow their laws; private forecasts are nearly as good.",
    checked_on="real data",
    reported="0.57 % to 2.8 % lost against training without privacy",
)

WEEK = 7 * 24 * 60


@check_kinds
@dataclass(frozen=True, kw_only=True)
class MobilityConfig:
    """Settings of `MobilityForecaster`.

    Attributes:
        channels: regions C.
        context: rows T that are read.
        units: width U of the state, per direction.
        cell: the recurrent cell.
        bidirectional: rows are read in both directions.
        scale: what counts are divided by.

    Raises:
        ValueError: a value is out of range.
    """

    channels: int = 6
    context: int = 6
    units: int = 32
    cell: Literal["gru", "lstm"] = "gru"
    bidirectional: bool = True
    scale: float = 10.0

    def __post_init__(self) -> None:
        if self.cell not in ("gru", "lstm"):
            raise ValueError(f"expected cell to be 'gru' or 'lstm' but got {self.cell!r}")
        if min(self.channels, self.context, self.units) < 1 or not 0 < self.scale < math.inf:
            raise ValueError("expected channels, context and units to be at least 1 and scale to be above 0")

    @property
    def horizon(self) -> int:
        """One row."""
        return 1

    @property
    def normalise(self) -> None:
        """Values are read as they are."""
        return


class Recurrence(nn.Module):
    """The last state of a GRU or LSTM whose candidates go through a ReLU, from plain products.

    `torch.nn.GRU` has no rule for gradients per sample.

    Args:
        inputs: width of a row.
        units: width of the state.
        cell: `"gru"` or `"lstm"`.
    """

    def __init__(self, inputs: int, units: int, cell: str) -> None:
        super().__init__()
        self.units, self.cell = units, cell
        gates = 3 if cell == "gru" else 4
        self.input = nn.Linear(inputs, gates * units)
        self.state = nn.Linear(units, gates * units)

    def forward(self, rows: Tensor) -> Tensor:
        """`[B, T, inputs]` to `[B, U]`."""
        given = self.input(rows)
        state = memory = rows.new_zeros(len(rows), self.units)
        for t in range(rows.shape[1]):
            parts, own = given[:, t].chunk(3 if self.cell == "gru" else 4, -1), self.state(state)
            if self.cell == "gru":
                update, reset, new = own.chunk(3, -1)
                z, r = torch.sigmoid(parts[0] + update), torch.sigmoid(parts[1] + reset)
                state = z * state + (1 - z) * torch.relu(parts[2] + r * new)
            else:
                sums = [a + b for a, b in zip(parts, own.chunk(4, -1), strict=True)]
                memory = torch.sigmoid(sums[1]) * memory + torch.sigmoid(sums[0]) * torch.relu(sums[2])
                state = torch.sigmoid(sums[3]) * torch.relu(memory)
        return state


@check_kinds
class MobilityForecaster(nn.Module):
    """The forecaster. A `ForecastModel` (`arcore.recipes.forecasting`).

    Args:
        config: settings.
    """

    def __init__(self, config: MobilityConfig) -> None:
        super().__init__()
        self.config = config
        self.context, self.horizon, self.normalise = config.context, config.horizon, config.normalise
        directions = 2 if config.bidirectional else 1
        self.recurrences = nn.ModuleList(
            Recurrence(config.channels + 4, config.units, config.cell) for _ in range(directions)
        )
        self.head = nn.Linear(directions * config.units, config.channels)

    @check_kinds
    def forward(self, values: Tensor, calendar: Tensor) -> Tensor:
        """The next row of counts.

        Args:
            values: counts `[B, context, C]`.
            calendar: int64 `[B, context, 5]` of these rows.

        Returns:
            `[B, C]`.

        Raises:
            ValueError: a shape is wrong.
        """
        shape = (self.config.context, self.config.channels)
        if values.shape[1:] != shape or calendar.shape != (*values.shape[:2], 5):
            raise ValueError(
                f"expected counts [B, {shape[0]}, {shape[1]}] and their calendar [B, {shape[0]}, 5] but got "
                f"{tuple(values.shape)} and {tuple(calendar.shape)}"
            )
        minutes = (calendar[..., 1] * 60 + calendar[..., 0]).to(values.dtype)
        week = (calendar[..., 2] * 1440).to(values.dtype) + minutes
        angles = torch.stack([minutes / 1440, week / WEEK], -1) * (2 * math.pi)
        rows = torch.cat([values / self.config.scale, angles.sin(), angles.cos()], -1)
        states = [one(rows.flip(1) if i else rows) for i, one in enumerate(self.recurrences)]
        out: Tensor = self.head(torch.cat(states, -1)) * self.config.scale
        return out

    def objective(self, values: Tensor, calendar: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean absolute error of the next row, in units of the scale, of windows `[B, context + 1, C]`."""
        out = self(values[:, :-1], calendar[:, :-1])
        error = (out - values[:, -1]) / self.config.scale
        rmse = self.config.scale * error.detach().square().mean().sqrt()
        return error.abs().mean(), {"rmse": rmse}

    @check_kinds
    def forecast(self, values: Tensor, calendar: Tensor, horizon: int) -> Tensor:
        """The next rows of counts, none below 0, one after the other: `[B, context, C]` to `[B, horizon, C]`."""
        window, made = values, []
        for step in range(horizon):
            made.append(self(window, calendar[:, step : step + self.context]).clamp(min=0))
            window = torch.cat([window[:, 1:], made[-1].unsqueeze(1)], 1)
        return torch.stack(made, 1) if made else values[:, :0]


@preset
def dp_mobility_tiny() -> MobilityConfig:
    """A bidirectional GRU of 32 units over six rows; trains on a CPU in a minute."""
    return MobilityConfig()


def __getattr__(name: str) -> Any:
    if name == "RECIPE":
        from arcore.zoo.series.dp_mobility.recipe import RECIPE

        return RECIPE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
