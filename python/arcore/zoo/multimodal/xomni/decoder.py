"""X-Omni's decoder: pixels from the vectors of codes, by flow matching."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore.nn.dit import TimestepEmbedding
from arcore.schedules import FlowSchedule
from arcore.schedules.noise import add_noise
from arcore.schedules.prediction import Prediction, target

SCHEDULE = FlowSchedule()
KIND: Prediction = "velocity"


class _Block(nn.Module):
    """Two convolutions, shifted and scaled by the time."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4 if channels % 4 == 0 else 1, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.time = nn.Linear(channels, 2 * channels)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.time(time)[:, :, None, None].chunk(2, 1)
        h = self.conv1(F.silu(self.norm(x) * (1 + scale) + shift))
        out: Tensor = x + self.conv2(F.silu(h))
        return out


class FlowDecoder(nn.Module):
    """Predicts the velocity from data to noise of a picture, given the vectors of its codes.

    Args:
        in_channels: of the pictures.
        code_channels: width c of a vector.
        channels: width of the network.
        factor: pixels per code along a side.
        depth: blocks.
    """

    def __init__(
        self, in_channels: int, code_channels: int, channels: int, factor: int, depth: int = 3
    ) -> None:
        super().__init__()
        self.in_channels, self.factor = in_channels, factor
        self.time = TimestepEmbedding(channels, frequencies=64)
        self.enter = nn.Conv2d(in_channels + code_channels, channels, 3, padding=1)
        self.blocks = nn.ModuleList(_Block(channels) for _ in range(depth))
        self.leave = nn.Conv2d(channels, in_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, vectors: Tensor) -> Tensor:
        """The velocity.

        Args:
            x: noised pictures `[B, C, H, W]`.
            t: `[B]`, 0 clean to 1 noise.
            vectors: `[B, S * S, c]`.
        """
        side = round(vectors.shape[1] ** 0.5)
        expected = (len(vectors), self.in_channels, side * self.factor, side * self.factor)
        if tuple(x.shape) != expected:
            raise ValueError(f"expected pictures of shape {expected} but got {tuple(x.shape)}")
        known = vectors.transpose(1, 2).unflatten(2, (side, side)).to(x.dtype)
        known = F.interpolate(known, scale_factor=self.factor, mode="nearest")
        time = self.time(t * SCHEDULE.time_scale)
        h = self.enter(torch.cat([x, known], 1))
        for block in self.blocks:
            h = block(h, time)
        out: Tensor = self.leave(F.silu(h))
        return out

    def loss(self, images: Tensor, vectors: Tensor) -> Tensor:
        """Flow matching loss (arXiv:2210.02747) at random times.

        Args:
            images: `[B, C, H, W]` in [-1, 1].
            vectors: `[B, S * S, c]`.
        """
        t = SCHEDULE.sample_times(len(images), device=images.device)
        noise = torch.randn_like(images)
        wanted = target(KIND, images, noise, t, SCHEDULE).to(images.dtype)
        return F.mse_loss(self(add_noise(SCHEDULE, images, noise, t).to(images.dtype), t, vectors), wanted)

    @torch.no_grad()
    def draw(self, vectors: Tensor, *, steps: int = 8, noise: Tensor | None = None, seed: int = 0) -> Tensor:
        """Pictures of codes.

        Args:
            vectors: `[B, S * S, c]`.
            steps: of Euler's method.
            noise: `[B, C, H, W]` or `[1, C, H, W]` to start from; None draws it from `seed`.
            seed: of that noise.

        Returns:
            `[B, C, H, W]` in [-1, 1].
        """
        size = round(vectors.shape[1] ** 0.5) * self.factor
        if noise is None:
            generator = torch.Generator().manual_seed(seed)
            noise = torch.randn(len(vectors), self.in_channels, size, size, generator=generator)
        x = noise.to(vectors.device, self.enter.weight.dtype).expand(len(vectors), -1, -1, -1)
        times = SCHEDULE.grid(steps)
        for start, stop in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
            t = torch.full((len(x),), start, device=x.device, dtype=x.dtype)
            x = x + (stop - start) * self(x, t, vectors)
        return x.clamp(-1, 1)
