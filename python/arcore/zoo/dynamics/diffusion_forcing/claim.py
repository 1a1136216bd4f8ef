"""Diffusion Forcing's claim: times of their own teach a network to go on from clean frames."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from arcore.catalog.claims import Claim, at_most, steps
from arcore.objectives import diffusion_loss
from arcore.schedules import add_noise
from arcore.zoo.dynamics.diffusion_forcing.model import DiffusionForcing, DiffusionForcingConfig


def claim(*, quick: bool) -> Claim:
    """The last frame from nothing but noise, given clean ones before it: where they turn tells where it is."""
    independent: list[float] = []
    together: list[float] = []
    for seed in range(1 if quick else 3):
        generator = torch.Generator().manual_seed(3 + seed)
        clean = _turning(512, generator)
        noisy = clean.clone()
        noisy[:, -1] = torch.randn(512, 2, generator=generator)
        t = torch.tensor([0, 0, 0, 999]).expand(512, -1)
        for errors, own_times in ((independent, True), (together, False)):
            model = _trained(own_times, seed, 160 if quick else 300)
            with torch.no_grad():
                out = model(noisy, t, torch.zeros(512, dtype=torch.int64))
            errors.append((out[:, -1] - clean[:, -1]).square().mean().item())
    return Claim(
        (
            at_most("error of the last frame, trained with a time per frame", max(independent), 0.06),
            at_most("the same, relative to one time for all frames", max(independent) / min(together), 0.3),
        )
    )


def _turning(rows: int, generator: torch.Generator | None = None) -> Tensor:
    """Points on a circle that turn by one radian per frame, of deviation 1."""
    angle = 2 * math.pi * torch.rand(rows, 1, generator=generator) + torch.arange(4)
    return torch.stack([angle.cos(), angle.sin()], dim=2) * 2**0.5


def _trained(own_times: bool, seed: int, count: int) -> DiffusionForcing:
    """On turning points, with a time of its own for every frame or one for all."""
    torch.manual_seed(seed)
    model = DiffusionForcing(
        DiffusionForcingConfig(depth=1, embed_dim=64, num_heads=2, hidden_dim=128, frames=4)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in steps(count, f"training with {'a time per frame' if own_times else 'one time'}, seed {seed}"):
        clean = _turning(64)
        t = model.training_times(64)
        if not own_times:
            t = t[:, :1].expand(-1, 4)
        eps = torch.randn_like(clean)
        output = model(add_noise(model.schedule, clean, eps, t), t, torch.zeros(64, dtype=torch.int64))
        loss = diffusion_loss(output, clean, eps, t, model.schedule, prediction="x0")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()
