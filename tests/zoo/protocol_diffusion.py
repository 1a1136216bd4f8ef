"""How the model contract drives systems of the recipe `diffusion`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import arcore
from arcore.decoding import generate_blocks
from arcore.schedules import add_noise


class Protocol:
    """Models that denoise everything at once."""

    def __init__(self, preset: str) -> None:
        self.config = arcore.models.get_config(preset)
        model: Any = arcore.create_model(preset)
        self.data = torch.randn(3, *model.block_shape)
        self.eps = torch.randn_like(self.data)
        self.t = torch.tensor([20, 500, 900])
        self.noisy = add_noise(model.schedule, self.data, self.eps, self.t)
        self.labels = torch.tensor([0, self.config.num_classes - 1, self.config.num_classes])

    def forward(self, model: Any) -> Tensor:
        return model(self.noisy, self.t, self.labels)

    def expected_shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    def loss(self, model: Any) -> Tensor:
        return F.mse_loss(self.forward(model), self.eps)

    def stepwise(self, model: Any) -> tuple[Tensor, Tensor]:
        cache = model.make_cache(3)
        parts, _ = model.denoise(self.noisy[:, None], self.t[:, None], self.labels[:, None], cache)
        return self.forward(model), parts[:, 0]

    def generate(self, model: Any, rows: list[int]) -> tuple[list[Tensor], Tensor]:
        """Labels and samples; row i always has the same label and seed."""
        labels = self.labels[rows]
        times = model.schedule.grid(3, "linspace")
        out = generate_blocks(model, labels, times=times, seed=[7 + r for r in rows])
        return [labels], (model.to_pixels(out) / 10).clamp(-1, 1)
