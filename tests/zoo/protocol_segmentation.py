"""How the model contract drives systems of the recipe `segmentation`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import arcore


class Protocol:
    """Pictures, or pairs, to the classes of their pixels. Nothing goes step by step: rows alone equal a batch."""

    def __init__(self, preset: str) -> None:
        self.config = arcore.models.get_config(preset)
        size = self.config.image_size
        pictures = arcore.create_model(preset).pictures
        shape = (3, *([pictures] if pictures > 1 else []), self.config.in_channels, size, size)
        self.images = torch.rand(shape) * 2 - 1
        self.masks = torch.randint(0, self.config.num_classes, (3, size, size))
        self.masks[:, : size // 3] = 255

    def forward(self, model: Any) -> Tensor:
        return model(self.images)

    def expected_shape(self) -> tuple[int, ...]:
        return (3, self.config.num_classes, self.config.image_size, self.config.image_size)

    def loss(self, model: Any) -> Tensor:
        return model(self.images, self.masks)[0]

    def stepwise(self, model: Any) -> tuple[Tensor, Tensor]:
        # The encoder alone: behind it shaken weights make logits of dozens, whose last digits go by the batch.
        encoder, images = model.backbone, self.images.flatten(0, -4)
        return encoder.feature_map(images), torch.cat([encoder.feature_map(row[None]) for row in images])

    @torch.no_grad()
    def generate(self, model: Any, rows: list[int]) -> tuple[list[Tensor], Tensor]:
        """The class that a picture has most of, and softened probabilities of its pixels."""
        logits = model(self.images[rows])
        return [logits.mean((2, 3)).argmax(1)], (logits / 10).softmax(1)
