"""How the model contract drives systems of the recipe `tokenizer`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import arcore


class Protocol:
    """Images to codes and back."""

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
        return (out.reconstruction - self.images).square().mean() + out.vq_loss

    def stepwise(self, model: Any) -> tuple[Tensor, Tensor]:
        indices = model.encode(self.images)
        if isinstance(indices, Tensor):
            # A single map: its codes one by one.
            vectors = torch.stack([model.codebook()[codes] for codes in indices.unbind(1)], 1)
            return model.decode(indices), model.decode_vectors(vectors)
        latent, inputs = model.empty_latent(3), []
        for k, codes in enumerate(indices):
            latent = model.add_scale(k, codes, latent)
            if k + 1 < len(indices):
                inputs.append(model.next_input(k, latent))
        whole = [model.decode(indices).flatten(), model.scale_inputs(indices).flatten()]
        steps = [model.decode_latent(latent).flatten(), torch.cat(inputs, dim=1).flatten()]
        return torch.cat(whole), torch.cat(steps)

    def generate(self, model: Any, rows: list[int]) -> tuple[list[Tensor], Tensor]:
        with torch.no_grad():
            indices = model.encode(self.images[rows])
            maps = [indices] if isinstance(indices, Tensor) else indices
            return maps, model.decode(indices)
