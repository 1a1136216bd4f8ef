"""How the model contract drives systems of the recipe `masked_autoregressive`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import arcore
from arcore.decoding import generate_masked
from arcore.objectives import diffusion_head_loss


class Protocol:
    """Models that draw continuous tokens in random order."""

    def __init__(self, preset: str) -> None:
        self.config = arcore.models.get_config(preset)
        model: Any = arcore.create_model(preset)
        self.tokens = torch.randn(3, *model.token_shape)
        order = torch.rand(3, self.config.tokens).argsort(1)
        self.visible, self.masked = order[:, :5].sort(1).values, order[:, 5:].sort(1).values
        self.labels = torch.tensor([0, self.config.num_classes - 1, self.config.num_classes])

    def forward(self, model: Any) -> Tensor:
        return model(self.tokens, self.visible, self.labels)

    def expected_shape(self) -> tuple[int, ...]:
        return (3, self.config.tokens, self.config.embed_dim)

    def loss(self, model: Any) -> Tensor:
        rows = torch.arange(3)[:, None]
        targets, z = self.tokens[rows, self.masked], self.forward(model)[rows, self.masked]
        loss, bound = diffusion_head_loss(model.head, targets.flatten(0, 1), z.flatten(0, 1))
        return loss if bound is None else loss + bound

    def stepwise(self, model: Any) -> tuple[Tensor, Tensor]:
        """Rows alone, the visible tokens in another order."""
        parts = [
            model(self.tokens[row, None], self.visible[row, None].flip(1), self.labels[row, None])
            for row in range(3)
        ]
        return self.forward(model), torch.cat(parts)

    def generate(self, model: Any, rows: list[int]) -> tuple[list[Tensor], Tensor]:
        """Labels and samples; row i always has the same label and seed."""
        labels = self.labels[rows]
        times = model.head.schedule.grid(3, "linspace")
        tokens = generate_masked(model, labels, iterations=4, times=times, seed=[7 + r for r in rows])
        return [labels], (model.to_pixels(tokens) / 1000).clamp(-1, 1)
