"""How the model contract drives systems of the recipe `autoencoder`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import arcore


class Protocol:
    """Images to continuous latents and back."""

    def __init__(self, preset: str) -> None:
        self.config = arcore.models.get_config(preset)
        size = self.config.image_size
        self.images = torch.rand(3, self.config.in_channels, size, size) * 2 - 1

    def forward(self, model: Any) -> Tensor:
        return model(self.images).reconstruction

    def expected_shape(self) -> tuple[int, ...]:
        return tuple(self.images.shape)

    def loss(self, model: Any) -> Tensor:
        out = model(self.images)
        return (out.reconstruction - self.images).square().mean() + 1e-3 * out.kl

    def stepwise(self, model: Any) -> tuple[Tensor, Tensor]:
        """Encoding, then decoding, against one pass."""
        return self.forward(model).clamp(-1, 1), model.decode(model.encode(self.images))

    def generate(self, model: Any, rows: list[int]) -> tuple[list[Tensor], Tensor]:
        with torch.no_grad():
            latents = model.encode(self.images[rows])
            # Sums of other batch sizes may round otherwise, and latents are no codes: the pictures are compared.
            return [], model.decode(latents)
