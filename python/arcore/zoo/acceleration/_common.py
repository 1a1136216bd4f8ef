"""What claims of this topic share: images made of few codes and a model of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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
    """`llamagen_tiny` on the digits' codes, trained for `count` steps with labels dropped one time in ten."""
    model = create_model("llamagen_tiny")
    codes, labels = digit_codes("train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.05)
    for _ in steps(count, "training the image model"):
        rows = torch.randint(len(codes), (32,))
        kept = torch.where(torch.rand(32) < 0.1, 10, labels[rows])
        loss = F.cross_entropy(model(codes[rows], kept).flatten(0, 1), codes[rows].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False)
