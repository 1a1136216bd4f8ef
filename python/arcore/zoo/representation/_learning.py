"""A short training of a network that labels pixels, for claims."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from arcore.catalog.claims import steps as counted
from arcore.data.pixels import CHANGE, InMemoryPixels
from arcore.recipes._pixels import PixelScores
from arcore.training.augment import scaled
from arcore.training.groups import parameter_groups

Network = TypeVar("Network", bound=nn.Module)
AT_ONCE = 50


def squares(*, pairs: bool, count: int = 8, size: int = 24, side: int = 9) -> InMemoryPixels:
    """Noise with a light and a dark square, classes 1 and 2; of pairs, one with the light square and one without."""
    ground = 100 + 50 * torch.rand(count, 1, size, size)
    masks = torch.zeros(count, size, size, dtype=torch.uint8)
    images = [ground.clone(), ground + 10 * torch.rand(count, 1, 1, 1)]
    for label, tone in ((2, 40.0), (1, 210.0)):
        for row in range(count):
            top, left = torch.randint(size - side + 1, (2,)).tolist()
            for image in images[: 1 if pairs and label == 1 else 2]:
                image[row, :, top : top + side, left : left + side] = tone
            masks[row, top : top + side, left : left + side] = label
    if pairs:
        return InMemoryPixels(torch.stack(images, 1).to(torch.uint8), masks * (masks == 1), CHANGE)
    return InMemoryPixels(images[0][:, None].to(torch.uint8), masks, ("ground", "light", "dark"))


def _batch(data: InMemoryPixels, rows: Tensor) -> tuple[Tensor, Tensor]:
    images = scaled(data.images[rows], "half")
    return images[:, 0] if data.pictures == 1 else images, data.masks[rows].to(torch.int64)


def learned(model: Network, data: InMemoryPixels, *, steps: int, batch: int, lr: float) -> Network:
    """The model after so many steps, in evaluation mode."""
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=lr, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in counted(steps, "training"):
        loss, _ = model(*_batch(data, torch.randint(len(data), (batch,))))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def scores_of(model: Any, data: InMemoryPixels) -> dict[str, float]:
    """Figures of `PixelScores` of a model on all pictures; None calls every pixel class 0."""
    scores = PixelScores(data.class_names)
    for rows in torch.arange(len(data)).split(AT_ONCE):
        images, masks = _batch(data, rows)
        classes = torch.zeros_like(masks) if model is None else model(images).argmax(1)
        scores.add(classes.flatten(), masks.flatten())
    return scores.figures()
