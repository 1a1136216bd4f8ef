"""Directed acyclic transformer (Huang et al., arXiv:2205.07459): a target is a path through more vertices than tokens.

Each vertex has a law of its token and a law of the next vertex, which lies further on. The probability of a target is
the sum over all paths from the first vertex to the last, by dynamic programming. The last vertex leads nowhere, which
is said before the softmax and after it: a softmax over nothing would be uniform.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from arcore.zoo.language.nar.network import Batch, own_tokens


def heads(config: Any) -> nn.ModuleDict:
    """What says how vertices follow one another."""
    return nn.ModuleDict(
        {"leave": nn.Linear(config.dim, config.dim), "reach": nn.Linear(config.dim, config.dim, bias=False)}
    )


def graph(model: Any, source: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of tokens `[B, L, V]` and of transitions `[B, L, L]`, and the vertices L of each row."""
    memory = model.encode(source)
    x, lengths = model.copied(memory, model.config.factor)
    states = model.decode(x, lengths, memory)
    tokens = own_tokens(model.output(states)).log_softmax(-1)
    scores = (
        model.heads["leave"](states) @ model.heads["reach"](states).transpose(1, 2) / states.shape[2] ** 0.5
    )
    return tokens, transitions(scores, lengths), lengths


def transitions(scores: Tensor, lengths: Tensor) -> Tensor:
    """Log-probabilities of the next vertex, `[B, L, L]`; -inf for those that are not later, and from the last one."""
    size = scores.shape[1]
    place = torch.arange(size, device=scores.device)
    later = (place > place.unsqueeze(1)) & (place < lengths.view(-1, 1, 1))
    masked = scores.masked_fill(~later, -torch.inf)
    # A row without any later vertex: the softmax of equal numbers, whose values are taken out again.
    nowhere = ~later.any(-1, keepdim=True)
    return masked.masked_fill(nowhere, 0.0).log_softmax(-1).masked_fill(~later, -torch.inf)


def target_logprobs(tokens: Tensor, moves: Tensor, lengths: Tensor, target: Batch) -> Tensor:
    """log p of targets `[B]`, over all paths from the first vertex to the last.

    Args:
        tokens: `[B, L, V]`, log-probabilities at vertices.
        moves: `[B, L, L]`, of transitions.
        lengths: vertices of each row.
        target: no longer than the vertices; others have -inf.
    """
    # [B, L, N]: of each target token at each vertex.
    said = tokens.gather(2, target.ids.unsqueeze(1).expand(-1, tokens.shape[1], -1))
    start = torch.full_like(said[:, :, 0], -torch.inf)
    at = torch.cat([said[:, :1, 0], start[:, 1:]], dim=1)
    courses = [at]
    for i in range(1, target.ids.shape[1]):
        # -inf less -inf is no number: places that no path reaches stay so without a gradient.
        reached = (at.unsqueeze(2) + moves).clamp(min=-1e9).logsumexp(1)
        at = torch.where(reached > -1e8, reached + said[:, :, i], -torch.inf)
        courses.append(at)
    # Where each target and each row of vertices ends.
    every = torch.stack(courses, dim=2)
    last = every.gather(2, (target.lengths - 1).view(-1, 1, 1).expand(-1, every.shape[1], 1)).squeeze(2)
    return last.gather(1, (lengths - 1).unsqueeze(1)).squeeze(1)


def loss(model: Any, source: Batch, target: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Minus the log-probability of the target over all paths, per token; targets that do not fit count nothing."""
    tokens, moves, lengths = graph(model, source)
    log = target_logprobs(tokens, moves, lengths, target)
    fits = log > -1e8
    total = -torch.where(fits, log, 0.0) / target.lengths
    return total.sum() / fits.sum().clamp(min=1), {"unfit": (~fits).float().mean()}


def write(model: Any, source: Batch, iterations: int) -> tuple[list[list[int]], int]:
    """Lookahead: from the first vertex to the one whose transition and best token are likeliest; one call."""
    tokens, moves, lengths = graph(model, source)
    best = tokens.max(-1)
    ahead = (moves + best.values.unsqueeze(1)).argmax(-1).tolist()
    rows = []
    for said, follows, n in zip(best.indices.tolist(), ahead, lengths.tolist(), strict=True):
        place, row = 0, [said[0]]
        while place < n - 1:
            place = follows[place]
            row.append(said[place])
        rows.append(row)
    return rows, 1
