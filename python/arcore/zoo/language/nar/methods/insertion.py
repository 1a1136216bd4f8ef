"""Insertion Transformer (Stern et al., arXiv:1902.03249): tokens are inserted into all gaps of a target at once.

Training draws a part of the target; in each gap the tokens that are missing there are wanted, those near its middle
most, so that decoding halves what is missing with each call: floor(log2 n) + 1 calls write n tokens.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from arcore.zoo.language.nar.methods._shared import random_subset
from arcore.zoo.language.nar.network import BOS, EOS, SPECIAL, Batch

# Of the weights exp(-|i - middle| / TEMPERATURE) of the tokens that are missing in a gap.
TEMPERATURE = 1.0


def heads(config: Any) -> nn.ModuleDict:
    """A gap is read from the states on its two sides."""
    return nn.ModuleDict({"gap": nn.Linear(2 * config.dim, config.dim)})


def gap_logits(model: Any, memory: Any, ids: Tensor, lengths: Tensor) -> Tensor:
    """Logits `[B, N - 1, V]` of what to insert behind each of N tokens, begin and end included; `EOS` is nothing."""
    states = model.decode(model.embed(ids), lengths, memory)
    between = model.heads["gap"](torch.cat([states[:, :-1], states[:, 1:]], dim=-1)).relu()
    logits: Tensor = model.output(between)
    forbidden = torch.arange(logits.shape[-1], device=logits.device) < EOS
    return logits.masked_fill(forbidden, -1e4)


def gap_weights(kept: list[int], length: int) -> list[list[tuple[int, float]]]:
    """For each gap the places of the target that are missing there, with weights that sum to one.

    Args:
        kept: places that are there, in order.
        length: of the target.
    """
    bounds, gaps = [-1, *kept, length], []
    for left, right in pairwise(bounds):
        missing = list(range(left + 1, right))
        middle = (left + right) / 2
        weights = torch.tensor([-abs(i - middle) / TEMPERATURE for i in missing]).softmax(0).tolist()
        gaps.append(list(zip(missing, weights, strict=True)))
    return gaps


def loss(model: Any, source: Batch, target: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross entropy of what is missing in each gap of a random part of the target."""
    counts = (torch.rand(len(target.ids), device=target.ids.device) * (target.lengths + 1)).long()
    kept = random_subset(target.real, counts)
    rows, weights = [], []
    longest = int(counts.max()) + 1
    for tokens, there, length in zip(
        target.ids.tolist(), kept.tolist(), target.lengths.tolist(), strict=True
    ):
        places = [i for i in range(length) if there[i]]
        rows.append([BOS, *(tokens[i] for i in places), EOS])
        table = torch.zeros(longest, model.config.target_vocab)
        for gap, missing in enumerate(gap_weights(places, length)):
            for i, weight in missing:
                table[gap, tokens[i]] += weight
            if not missing:
                table[gap, EOS] = 1.0
        weights.append(table)
    part = Batch(*(one.to(target.ids.device) for one in Batch.of(rows)))
    wanted = torch.stack(weights).to(target.ids.device)
    logits = gap_logits(model, model.encode(source), part.ids, part.lengths)
    gaps = wanted.sum(-1)
    return -(wanted * logits.log_softmax(-1)).sum() / gaps.sum(), {}


def write(model: Any, source: Batch, iterations: int) -> tuple[list[list[int]], int]:
    """Insert into all gaps until none asks for more, or `iterations` calls are done."""
    memory, most = model.encode(source), model.config.max_length
    rows = [[BOS, EOS] for _ in source.ids]
    calls = 0
    while calls < iterations:
        part = Batch(*(one.to(source.ids.device) for one in Batch.of(rows)))
        best = gap_logits(model, memory, part.ids, part.lengths).argmax(-1).tolist()
        calls += 1
        new = [insert(row, tokens[: len(row) - 1], most) for row, tokens in zip(rows, best, strict=True)]
        if new == rows:
            break
        rows = new
    return [[token for token in row if token >= SPECIAL] for row in rows], calls


def insert(row: list[int], tokens: list[int], most: int) -> list[int]:
    """A row with a token behind each of its own but the last, unless it is `EOS`; up to `most` tokens and its ends."""
    out, room = [], most + 2 - len(row)
    for own, token in zip(row, [*tokens, EOS], strict=True):
        out.append(own)
        if token >= SPECIAL and room > 0:
            out.append(token)
            room -= 1
    return out
