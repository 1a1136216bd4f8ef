"""How the model contract drives systems of the recipe `classifier`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import arcore


class Protocol:
    """Images to classes. Nothing is generated step by step: `stepwise` classifies from features."""

    def __init__(self, preset: str) -> None:
        self.config = arcore.models.get_config(preset)
        size = self.config.image_size
        self.images = torch.rand(3, self.config.in_channels, size, size) * 2 - 1
        self.labels = torch.tensor([0, self.config.num_classes - 1, 1])

    def forward(self, model: Any) -> Tensor:
        return model(self.images)

    def expected_shape(self) -> tuple[int, ...]:
        return (3, self.config.num_classes)

    def loss(self, model: Any) -> Tensor:
        return F.cross_entropy(self.forward(model), self.labels)

    def stepwise(self, model: Any) -> tuple[Tensor, Tensor]:
        return self.forward(model), model.head(torch.cat([model.features(row[None]) for row in self.images]))

    @torch.no_grad()
    def generate(self, model: Any, rows: list[int]) -> tuple[list[Tensor], Tensor]:
        """Classes and their probabilities."""
        logits = model(self.images[rows])
        return [logits.argmax(-1)], logits.softmax(-1)
