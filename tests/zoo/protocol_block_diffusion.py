"""How the model contract drives systems of the recipe `block_diffusion`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import arcore
from arcore.schedules import add_noise

from . import protocol_diffusion


class Protocol(protocol_diffusion.Protocol):
    """Models that denoise block after block."""

    def __init__(self, preset: str) -> None:
        super().__init__(preset)
        model: Any = arcore.create_model(preset)
        self.data = torch.randn(3, model.num_blocks, *model.block_shape)
        self.eps = torch.randn_like(self.data)
        self.t = torch.randint(1000, (3, model.num_blocks))
        self.noisy = add_noise(model.schedule, self.data, self.eps, self.t)

    def forward(self, model: Any) -> Tensor:
        return model(self.data, self.noisy, self.t, self.labels)

    def stepwise(self, model: Any) -> tuple[Tensor, Tensor]:
        cache, parts = model.make_cache(3), []
        for block in range(model.num_blocks):
            out, _ = model.denoise(
                self.noisy[:, block, None], self.t[:, block, None], self.labels[:, None], cache
            )
            parts.append(out)
            model.commit(self.data[:, block], cache)
        return self.forward(model), torch.cat(parts, dim=1)
