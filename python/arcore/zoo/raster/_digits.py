"""What claims of raster models share: digits as four grey levels, a model of them, and an independent classifier."""

from __future__ import annotations

from math import cos, pi
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore.catalog import create_model
from arcore.catalog.claims import steps


def digit_codes(split: str) -> tuple[Tensor, Tensor]:
    """scikit-learn's digits as four grey levels, int64 `[N, 64]`, and their classes `[N]`."""
    from arcore.data import load_digits

    data = load_digits(split)
    images, labels = zip(*(data[i] for i in range(len(data))), strict=True)
    levels = ((torch.stack(images).flatten(1) + 1) * 1.5).round().long()
    return levels, torch.tensor([int(label) for label in labels])


def train_raster(count: int) -> Any:
    """`llamagen_tiny` on the digits' codes, trained for `count` steps with labels dropped one time in ten.

    The learning rate rises for 50 steps and falls along half a cosine; constant, 600 steps draw digits of which a
    classifier takes 64 % for their class, and so 83 %; 1,200 draw 97 %.
    """
    model = create_model("llamagen_tiny", dim=64)
    codes, labels = digit_codes("train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.05)
    for step in steps(count, "training the image model"):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, (step + 1) / 50) * (1 + cos(pi * step / count)) / 2
        rows = torch.randint(len(codes), (32,))
        kept = torch.where(torch.rand(32) < 0.1, 10, labels[rows])
        loss = F.cross_entropy(model(codes[rows], kept).flatten(0, 1), codes[rows].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


def level_images(codes: Tensor) -> Tensor:
    """Digits of four grey levels, int64 `[N, 64]`, as images `[N, 1, 8, 8]` in [-1, 1]."""
    return (codes.view(-1, 1, 8, 8) / 1.5) - 1


def train_classifier(
    images: Tensor, labels: Tensor, *, classes: int, count: int = 300, seed: int = 0, width: int = 16
) -> nn.Module:
    """A small convolutional network that tells images apart; it shares nothing with what it judges.

    Args:
        images: `[N, C, H, W]` in [-1, 1].
        labels: int64 `[N]`.
        classes: how many.
        count: training steps of 64 images.
        seed: of weights and batches.
        width: channels of the first layer.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        small = images.shape[-1] < 16
        model = nn.Sequential(
            nn.Conv2d(images.shape[1], width, 3, padding=1, stride=1 if small else 2),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(32 * width, classes),
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in steps(count, "training the classifier"):
        rows = torch.randint(len(images), (64,), generator=generator)
        loss = F.cross_entropy(model(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


def accuracy(classifier: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images that the classifier takes for their label."""
    return float((classifier(images).argmax(-1) == labels).float().mean())
