"""How the model contract drives systems of the recipe `forecasting`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import arcore


class Protocol:
    """Windows to the rows that follow. `stepwise` forecasts window by window."""

    def __init__(self, preset: str) -> None:
        config = arcore.models.get_config(preset)
        self.context, self.horizon = config.context, config.horizon
        self.channels = getattr(config, "channels", 2)
        length = self.context + 2 * self.horizon
        rows = torch.arange(length).unsqueeze(1)
        self.values = torch.sin(rows / 5 + torch.arange(self.channels)) + 0.3 * torch.randn(
            3, length, self.channels
        )
        # Hours from a Monday on.
        hours = torch.stack([0 * rows, rows % 24, rows // 24 % 7, 1 + rows // 24 % 28, 1 + 0 * rows], -1)
        self.dates = hours.squeeze(1).expand(3, -1, -1)

    def past(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        return self.values[rows, : self.context], self.dates[rows, : self.context + self.horizon]

    def forward(self, model: Any) -> Tensor:
        return model.forecast(*self.past([0, 1, 2]), self.horizon)

    def expected_shape(self) -> tuple[int, ...]:
        return (3, self.horizon, self.channels)

    def loss(self, model: Any) -> Tensor:
        length = self.context + self.horizon
        return model.objective(self.values[:, :length], self.dates[:, :length])[0]

    def stepwise(self, model: Any) -> tuple[Tensor, Tensor]:
        whole = self.forward(model)
        return whole, torch.cat([model.forecast(*self.past([row]), self.horizon) for row in range(3)])

    @torch.no_grad()
    def generate(self, model: Any, rows: list[int]) -> tuple[list[Tensor], Tensor]:
        """Whether each value is expected to rise, and the forecast."""
        found = model.forecast(*self.past(rows), self.horizon)
        return [(found.diff(dim=1) > 0).long()], found.tanh()
