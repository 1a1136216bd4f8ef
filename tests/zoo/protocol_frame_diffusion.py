"""How the model contract drives systems of the recipe `frame_diffusion`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import arcore
from arcore.decoding import generate_frames
from arcore.schedules import add_noise, target

from . import protocol_diffusion


class Protocol(protocol_diffusion.Protocol):
    """Models that denoise each frame of a video at a time of its own."""

    def __init__(self, preset: str) -> None:
        self.config = arcore.models.get_config(preset)
        model: Any = arcore.create_model(preset)
        self.data = torch.randn(3, model.num_frames, *model.frame_shape)
        self.eps = torch.randn_like(self.data)
        self.t = torch.randint(1000, (3, model.num_frames)).sort(dim=1).values
        self.noisy = add_noise(model.schedule, self.data, self.eps, self.t)
        self.labels = torch.tensor([0, self.config.num_classes - 1, self.config.num_classes])

    def loss(self, model: Any) -> Tensor:
        wanted = target(model.prediction, self.data, self.eps, self.t, model.schedule)
        return F.mse_loss(self.forward(model), wanted)

    def stepwise(self, model: Any) -> tuple[Tensor, Tensor]:
        """One frame, then pairs of frames that stay, behind a cache."""
        cache, parts, done = model.make_cache(3), [], 0
        model.start(self.labels, cache)
        for size in (1, *[2] * (model.num_frames // 2)):
            step = slice(done, min(done + size, model.num_frames))
            part = model.denoise(self.noisy[:, step], self.t[:, step], cache, keep=step.stop - done)
            parts.append(part)
            done = step.stop
        return self.forward(model), torch.cat(parts, dim=1)

    def generate(self, model: Any, rows: list[int]) -> tuple[list[Tensor], Tensor]:
        """Labels and samples; row i always has the same label and seed."""
        labels = self.labels[rows]
        times = model.schedule.grid(3, "linspace")
        out = generate_frames(model, labels, times=times, lag=1, cfg_scale=1.5, seed=[7 + r for r in rows])
        return [labels], (model.to_pixels(out) / 10).clamp(-1, 1)
