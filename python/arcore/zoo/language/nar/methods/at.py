"""The autoregressive teacher: the decoder is causal and writes one token per call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from arcore.zoo.language.nar.methods._shared import masked_loss, no_heads
from arcore.zoo.language.nar.network import BOS, EOS, PAD, SPECIAL, Batch

heads = no_heads


def loss(model: Any, source: Batch, target: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross entropy of each token, and of the end, given those before it."""
    inputs = torch.cat([torch.full_like(target.ids[:, :1], BOS), target.ids], dim=1)
    wanted = torch.cat([target.ids, torch.full_like(target.ids[:, :1], PAD)], dim=1)
    wanted = wanted.scatter(1, target.lengths.unsqueeze(1), EOS)
    lengths = target.lengths + 1
    states = model.decode(model.embed(inputs), lengths, model.encode(source), causal=True)
    real = torch.arange(inputs.shape[1], device=inputs.device) < lengths.unsqueeze(1)
    return masked_loss(model.output(states), wanted, real), {}


def write(model: Any, source: Batch, iterations: int) -> tuple[list[list[int]], int]:
    """Greedy targets; `iterations` is not looked at."""
    memory, most = model.encode(source), model.config.max_length
    ids = torch.full((len(source.ids), 1), BOS, device=source.ids.device)
    done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    calls = 0
    while calls < most and not bool(done.all()):
        lengths = torch.full((len(ids),), ids.shape[1], device=ids.device)
        states = model.decode(model.embed(ids), lengths, memory, causal=True)
        logits = model.output(states[:, -1]).clone()
        logits[:, :EOS] = -torch.inf
        token = logits.argmax(-1).masked_fill(done, EOS)
        done = done | (token == EOS)
        ids = torch.cat([ids, token.unsqueeze(1)], dim=1)
        calls += 1
    return [[token for token in row if token >= SPECIAL] for row in ids.tolist()], calls
