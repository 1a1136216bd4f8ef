"""Glancing (Qian et al., arXiv:2008.07905): training shows as many target tokens as a first guess has wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from arcore.zoo.language.nar.methods import cmlm
from arcore.zoo.language.nar.methods._shared import length_loss, masked_loss, no_heads, random_subset
from arcore.zoo.language.nar.network import MASK, Batch, own_tokens

heads = no_heads
# Share of the wrong tokens that is shown, from the first to the last step.
SHOWN = (0.5, 0.3)


def loss(model: Any, source: Batch, target: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross entropy of what is not shown, and of the length."""
    memory = model.encode(source)
    nothing = torch.full_like(target.ids, MASK)
    with torch.no_grad():
        guess = own_tokens(model.output(model.decode(model.embed(nothing), target.lengths, memory))).argmax(
            -1
        )
    wrong = ((guess != target.ids) & target.real).sum(1)
    share = SHOWN[0] + (SHOWN[1] - SHOWN[0]) * progress
    shown = random_subset(target.real, (share * wrong).round().long())
    states = model.decode(model.embed(torch.where(shown, target.ids, nothing)), target.lengths, memory)
    tokens = masked_loss(model.output(states), target.ids, target.real & ~shown)
    length = length_loss(memory, target.lengths)
    return tokens + 0.1 * length, {"tokens": tokens.detach(), "shown": shown.sum() / target.lengths.sum()}


def write(model: Any, source: Batch, iterations: int) -> tuple[list[list[int]], int]:
    """Targets by one call, as mask-predict's first; more calls are possible, though it was not trained for them."""
    return cmlm.write(model, source, iterations)
