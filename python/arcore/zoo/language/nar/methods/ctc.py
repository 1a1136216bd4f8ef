"""Connectionist temporal classification (Libovicky and Helcl, arXiv:1811.04719): a sum over alignments.

The decoder has `factor` places per source token, each of which says a token or nothing; equal neighbours count once.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from arcore.zoo.language.nar.methods._shared import no_heads
from arcore.zoo.language.nar.network import BOS, EOS, MASK, PAD, SPECIAL, Batch

heads = no_heads
BLANK = MASK


def place_logits(model: Any, source: Batch) -> tuple[Tensor, Tensor]:
    """Logits `[B, factor S, V]` in which only tokens and the blank are possible, and the places of each row."""
    x, lengths = model.copied(memory := model.encode(source), model.config.factor)
    logits = model.output(model.decode(x, lengths, memory)).clone()
    for other in (PAD, BOS, EOS):
        logits[..., other] = -1e4
    return logits, lengths


def loss(model: Any, source: Batch, target: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Minus the log-probability of all alignments that collapse to the target, per token.

    Targets that do not fit into the places count nothing.
    """
    logits, lengths = place_logits(model, source)
    total = F.ctc_loss(
        logits.log_softmax(-1).transpose(0, 1),
        target.ids,
        lengths,
        target.lengths,
        blank=BLANK,
        reduction="none",
        zero_infinity=True,
    )
    return (total / target.lengths).mean(), {"unfit": (total == 0).float().mean()}


def write(model: Any, source: Batch, iterations: int) -> tuple[list[list[int]], int]:
    """The likeliest token of each place, collapsed; one call, whatever `iterations` says."""
    logits, lengths = place_logits(model, source)
    best = logits.argmax(-1).tolist()
    return [collapse(row[:n]) for row, n in zip(best, lengths.tolist(), strict=True)], 1


def collapse(path: list[int]) -> list[int]:
    """A path without repeats and blanks."""
    kept = [token for i, token in enumerate(path) if i == 0 or token != path[i - 1]]
    return [token for token in kept if token >= SPECIAL]
