"""What several methods need."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMOOTHING = 0.1


def no_heads(config: Any) -> nn.ModuleDict:
    """A method without layers of its own."""
    return nn.ModuleDict()


def masked_loss(logits: Tensor, targets: Tensor, wanted: Tensor) -> Tensor:
    """Smoothed cross entropy of the places that are wanted, bool `[B, N]`; 0 where there is none."""
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none", label_smoothing=SMOOTHING)
    return (losses * wanted).sum() / wanted.sum().clamp(min=1)


def length_loss(memory: Any, lengths: Tensor) -> Tensor:
    """Cross entropy of the lengths of targets, int64 `[B]` from 1."""
    return F.cross_entropy(memory.length_logits, lengths - 1)


def best_lengths(memory: Any, count: int) -> Tensor:
    """The likeliest lengths, int64 `[B, count]`."""
    return memory.length_logits.topk(count).indices + 1


def rows_of(ids: Tensor, lengths: Tensor) -> list[list[int]]:
    """Padded rows as lists."""
    return [row[:n] for row, n in zip(ids.tolist(), lengths.tolist(), strict=True)]


def random_subset(real: Tensor, counts: Tensor) -> Tensor:
    """bool `[B, N]`: of the real places of each row so many, at random."""
    order = torch.rand(real.shape, device=real.device).masked_fill(~real, 2.0).argsort(1).argsort(1)
    return order < counts.unsqueeze(1)
