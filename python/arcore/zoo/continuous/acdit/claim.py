"""ACDiT's claims: one skip-causal pass trains what cached denoising uses, and clean context is worth having."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from arcore.catalog.claims import Claim, Row, at_least, at_most, shaken, steps
from arcore.schedules import add_noise
from arcore.zoo.continuous.acdit.model import ACDiT, ACDiTConfig, acdit_tiny, acdit_video_tiny


def claim(*, quick: bool) -> Claim:
    """Images and video, several block sizes: one pass against the cache. In full also a training on noisy context."""
    tiny, video = acdit_tiny(), acdit_video_tiny()
    cases = [
        tiny,
        replace(tiny, block_size=1),
        replace(tiny, block_size=16),
        replace(tiny, rope_layout="acdit_v0"),
        video,
        replace(video, block_size=8),
    ]
    worst, size = 0.0, math.inf
    for config in cases:
        model = shaken(ACDiT(config)).eval()
        generator = torch.Generator().manual_seed(2)
        shape = (2, model.num_blocks, *model.block_shape)
        clean, eps = (torch.randn(shape, generator=generator) for _ in range(2))
        t = torch.randint(1000, shape[:2], generator=generator)
        noisy, labels = add_noise(model.schedule, clean, eps, t), torch.arange(2)
        with torch.no_grad():
            whole = model(clean, noisy, t, labels)
            parts = denoised(model, clean, noisy, t, labels)
        size = min(size, whole.std().item())
        worst = max(worst, (whole - parts).abs().max().item())
    rows: list[Row] = [
        at_most(f"one pass against cached denoising, {len(cases)} networks, largest difference", worst, 1e-5),
        at_least("standard deviation of the predictions, smallest", size, 0.1),
    ]
    if not quick:
        ratio = _loss_after_first_block(True) / _loss_after_first_block(False)
        rows.append(at_most("held-out loss with clean context, relative to noisy context", ratio, 0.75))
    return Claim(tuple(rows))


def denoised(model: ACDiT, clean: Tensor, noisy: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """What `model(clean, noisy, t, labels)` computes, block by block with a cache."""
    cache, parts = model.make_cache(len(clean)), []
    for block in range(model.num_blocks):
        out, _ = model.denoise(noisy[:, block, None], t[:, block, None], labels[:, None], cache)
        parts.append(out)
        if block + 1 < model.num_blocks:
            model.commit(clean[:, block], cache)
    return torch.cat(parts, dim=1)


def _circles(rows: int, generator: torch.Generator) -> Tensor:
    """Points that go round from anywhere in either direction, 16 steps as four blocks of four: `[B, 4, 4, 2]`."""
    phase = 2 * math.pi * torch.rand(rows, 1, generator=generator)
    direction = 1 - 2 * torch.randint(2, (rows, 1), generator=generator)
    angle = phase + 0.3 * direction * torch.arange(16)
    return math.sqrt(2) * torch.stack([angle.cos(), angle.sin()], dim=-1).unflatten(1, (4, 4))


def _loss_after_first_block(clean_context: bool, count: int = 150) -> float:
    """Held-out loss of blocks 1 to 3 after a training with the clean blocks, or their noisy versions, as context."""
    torch.manual_seed(0)
    model = ACDiT(
        ACDiTConfig(
            depth=2,
            embed_dim=64,
            num_heads=2,
            num_classes=1,
            image_size=1,
            in_channels=2,
            frames=16,
            block_size=4,
        )
    )
    generator = torch.Generator().manual_seed(1)

    def losses(rows: int) -> Tensor:
        clean = _circles(rows, generator)
        eps = torch.randn(clean.shape, generator=generator)
        t = torch.randint(1000, clean.shape[:2], generator=generator)
        noisy = add_noise(model.schedule, clean, eps, t)
        out = model(clean if clean_context else noisy, noisy, t, torch.zeros(rows, dtype=torch.int64))
        return (out - eps).square().mean(dim=(0, 2, 3))

    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=count, pct_start=0.1)
    for _ in steps(count, f"training with {'clean' if clean_context else 'noisy'} context"):
        optimizer.zero_grad()
        losses(64).mean().backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        return losses(2000)[1:].mean().item()
