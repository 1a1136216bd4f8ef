"""Mask-predict (Ghazvininejad et al., arXiv:1904.09324): masked places are filled, the least sure ones masked again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from arcore.zoo.language.nar.methods._shared import (
    best_lengths,
    length_loss,
    masked_loss,
    no_heads,
    random_subset,
    rows_of,
)
from arcore.zoo.language.nar.network import MASK, Batch, own_tokens

heads = no_heads
# Lengths that are tried; the text of the best mean log-probability is taken.
CANDIDATES = 5


def loss(model: Any, source: Batch, target: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross entropy of masked tokens, from one to all of them, and of the length."""
    counts = 1 + (torch.rand(len(target.ids), device=target.ids.device) * target.lengths).long()
    hidden = random_subset(target.real, torch.minimum(counts, target.lengths))
    memory = model.encode(source)
    states = model.decode(model.embed(target.ids.masked_fill(hidden, MASK)), target.lengths, memory)
    tokens, length = (
        masked_loss(model.output(states), target.ids, hidden),
        length_loss(memory, target.lengths),
    )
    return tokens + 0.1 * length, {"tokens": tokens.detach(), "length": length.detach()}


def masked_count(length: int, step: int, total: int) -> int:
    """Places to mask again before call `step` = 1, 2, ... of `total`, of a target of `length`."""
    return length * (total - step) // total


def write(model: Any, source: Batch, iterations: int) -> tuple[list[list[int]], int]:
    """Targets by `iterations` calls, over the likeliest lengths."""
    count = min(CANDIDATES, model.config.max_length)
    memory = model.encode(source)
    lengths = best_lengths(memory, count).flatten()
    ids, score = fill(model, memory.repeat(count), lengths, iterations)
    best = score.view(-1, count).argmax(1) + torch.arange(len(source.ids), device=score.device) * count
    return rows_of(ids[best], lengths[best]), iterations


def fill(model: Any, memory: Any, lengths: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Tokens `[R, N]` of targets of known lengths, and their mean log-probability `[R]`.

    Raises:
        ValueError: a length is below 1 or above the model's `max_length`.
    """
    most = model.config.max_length
    if lengths.numel() and not 1 <= int(lengths.min()) <= int(lengths.max()) <= most:
        raise ValueError(
            f"expected lengths from 1 to the model's max_length {most} but got "
            f"{int(lengths.min())} to {int(lengths.max())}"
        )
    real = torch.arange(int(lengths.max()), device=lengths.device) < lengths.unsqueeze(1)
    ids = torch.full(real.shape, MASK, device=lengths.device)
    sure = torch.zeros(real.shape, device=lengths.device)
    hidden = real
    for step in range(iterations):
        if step:
            counts = lengths * (iterations - step) // iterations
            order = sure.masked_fill(~real, torch.inf).sort(dim=1, stable=True).indices.argsort(1)
            hidden = order < counts.unsqueeze(1)
            ids = ids.masked_fill(hidden, MASK)
        states = model.decode(model.embed(ids), lengths, memory)
        logs, tokens = own_tokens(model.output(states)).log_softmax(-1).max(-1)
        # What is not masked keeps the probability with which it was written.
        ids, sure = torch.where(hidden, tokens, ids), torch.where(hidden, logs, sure)
    return ids, (sure * real).sum(1) / lengths
