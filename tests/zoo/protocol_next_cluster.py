"""How the model contract drives systems of the recipe `next_cluster`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import arcore
from arcore.data import adaptive_rotation
from arcore.objectives import next_cluster_loss


class Protocol:
    """Encoders that are pretrained by predicting the next cluster of patches."""

    def __init__(self, preset: str) -> None:
        self.config = arcore.models.get_config(preset)
        size = self.config.image_size
        self.images = torch.rand(3, self.config.in_channels, size, size) * 2 - 1
        self.angles = torch.tensor([-40.0, 10.0, 25.0])
        self.seen, self.windows = self.rotated([0, 1, 2])

    def rotated(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        return adaptive_rotation(self.images[rows], self.config.patch_size, angles=self.angles[rows])

    def forward(self, model: Any) -> Tensor:
        return model(self.seen, self.windows)

    def expected_shape(self) -> tuple[int, ...]:
        return (3, self.config.side**2 - self.config.cluster**2, self.config.patch_values)

    def loss(self, model: Any) -> Tensor:
        predictions = self.forward(model)
        return next_cluster_loss(predictions, self.images, patch_size=self.config.patch_size).loss

    def stepwise(self, model: Any) -> tuple[Tensor, Tensor]:
        """Clusters are squares of the image in raster order; the last one is not read."""
        side = self.config.cluster * self.config.patch_size
        squares = self.seen.unfold(2, side, side).unfold(3, side, side).flatten(2, 3).unbind(2)
        cache = model.make_cache(3)
        parts = [model.predict_next(square, cache, self.windows) for square in squares[:-1]]
        return self.forward(model), torch.cat(parts, dim=1)

    @torch.no_grad()
    def generate(self, model: Any, rows: list[int]) -> tuple[list[Tensor], Tensor]:
        """The windows that are rotated, and the predictions as pictures; row i always has the same angle."""
        seen, windows = self.rotated(rows)
        return [windows], model.reconstruct(self.images[rows], model(seen, windows)).clamp(-1, 1)
