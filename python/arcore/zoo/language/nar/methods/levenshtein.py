"""Levenshtein Transformer (Gu et al., arXiv:1905.11006): delete tokens, make room, fill it, until nothing changes.

Three policies on the same decoder imitate the optimal edits: whether each token goes, how many placeholders come into
each gap, and what stands at a placeholder. Insertions are learned from targets with tokens dropped; deletions from what
the model's own insertions make of these, or from targets with random tokens put in.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore.zoo.language.nar.network import BOS, EOS, MASK, SPECIAL, Batch, own_tokens

# Most placeholders that come into a gap at once.
MOST = 15
OWN_SHARE = 0.5


def heads(config: Any) -> nn.ModuleDict:
    """Of the two policies that say no tokens."""
    return nn.ModuleDict({"delete": nn.Linear(config.dim, 2), "room": nn.Linear(2 * config.dim, MOST + 1)})


def edits(row: list[int], wanted: list[int]) -> tuple[list[bool], list[int]]:
    """The fewest edits from one row to another, by a longest common subsequence.

    Returns:
        Which tokens of `row` stay, and how many of `wanted` are missing before, between and behind those.
    """
    n, m = len(row), len(wanted)
    common = [[0] * (m + 1) for _ in range(n + 1)]
    for i in reversed(range(n)):
        for j in reversed(range(m)):
            same = common[i + 1][j + 1] + 1 if row[i] == wanted[j] else 0
            common[i][j] = max(same, common[i + 1][j], common[i][j + 1])
    stay, room, i, j = [False] * n, [0], 0, 0
    while i < n or j < m:
        if i < n and j < m and row[i] == wanted[j] and common[i][j] == common[i + 1][j + 1] + 1:
            stay[i] = True
            room.append(0)
            i, j = i + 1, j + 1
        elif i < n and (j == m or common[i + 1][j] == common[i][j]):
            i += 1
        else:
            room[-1] += 1
            j += 1
    return stay, room


def _states(model: Any, memory: Any, rows: list[list[int]]) -> tuple[Tensor, Batch]:
    """States of rows between their ends."""
    part = Batch(*(one.to(memory.states.device) for one in Batch.of([[BOS, *row, EOS] for row in rows])))
    return model.decode(model.embed(part.ids), part.lengths, memory), part


def _room_logits(model: Any, states: Tensor) -> Tensor:
    out: Tensor = model.heads["room"](torch.cat([states[:, :-1], states[:, 1:]], dim=-1))
    return out


def _table(rows: list[list[int]], like: Tensor, count: int) -> Tensor:
    """Labels `[B, count]` with -100, which losses ignore, behind each row's."""
    return torch.tensor([row + [-100] * (count - len(row)) for row in rows], device=like.device)


def loss(model: Any, source: Batch, target: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross entropies of the three policies with the optimal edits."""
    memory = model.encode(source)
    wanted = [row[:n] for row, n in zip(target.ids.tolist(), target.lengths.tolist(), strict=True)]
    shares = torch.rand(len(wanted)).tolist()
    dropped = [
        [token for token, u in zip(row, torch.rand(len(row)).tolist(), strict=True) if u >= share]
        for row, share in zip(wanted, shares, strict=True)
    ]
    states, part = _states(model, memory, dropped)
    rooms = [[min(n, MOST) for n in edits(row, full)[1]] for row, full in zip(dropped, wanted, strict=True)]
    room = F.cross_entropy(
        _room_logits(model, states).transpose(1, 2), _table(rooms, states, part.ids.shape[1] - 1)
    )
    holes = [_holes(row, count) for row, count in zip(dropped, rooms, strict=True)]
    states, part = _states(model, memory, holes)
    fills = [
        [-100, *(token if hole == MASK else -100 for hole, token in _matched(row, full)), -100]
        for row, full in zip(holes, wanted, strict=True)
    ]
    logits = model.output(states)
    fill = F.cross_entropy(
        logits.transpose(1, 2), _table(fills, states, part.ids.shape[1]), label_smoothing=0.1
    )
    fill = fill if bool((part.ids == MASK).any()) else logits.sum() * 0
    with torch.no_grad():
        guessed = own_tokens(logits).argmax(-1)[:, 1:].tolist()
    written = []
    for hole, guess, full in zip(holes, guessed, wanted, strict=True):
        own = _filled(hole, guess)
        written.append(own if torch.rand(()) < OWN_SHARE else _noisy(full, model.config.target_vocab))
    states, part = _states(model, memory, written)
    goes = [
        [-100, *(0 if stay else 1 for stay in edits(row, full)[0]), -100]
        for row, full in zip(written, wanted, strict=True)
    ]
    delete = F.cross_entropy(
        model.heads["delete"](states).transpose(1, 2), _table(goes, states, part.ids.shape[1])
    )
    return room + fill + delete, {"room": room.detach(), "fill": fill.detach(), "delete": delete.detach()}


def _holes(row: list[int], room: list[int]) -> list[int]:
    """A row with so many masks before, between and behind its tokens."""
    out = [MASK] * room[0]
    for token, count in zip(row, room[1:], strict=True):
        out += [token, *[MASK] * count]
    return out


def _filled(holes: list[int], tokens: list[int]) -> list[int]:
    """A row with tokens at its masks; those beyond its end are left."""
    return [token if hole == MASK else hole for hole, token in zip(holes, tokens, strict=False)]


def _matched(holes: list[int], wanted: list[int]) -> list[tuple[int, int]]:
    """Each token of a row with holes beside what is wanted there; the row is as long unless a gap was cut short."""
    return list(zip(holes, [*wanted, *[EOS] * len(holes)], strict=False))


def _noisy(row: list[int], vocab: int) -> list[int]:
    """A row with random tokens put in."""
    out: list[int] = []
    for token in row:
        if torch.rand(()) < 0.15:
            out.append(int(torch.randint(SPECIAL, vocab, ())))
        out.append(token)
    return out


def write(model: Any, source: Batch, iterations: int) -> tuple[list[list[int]], int]:
    """Edit an empty target in up to `iterations` rounds; a round takes up to three calls."""
    memory, most = model.encode(source), model.config.max_length
    rows: list[list[int]] = [[] for _ in source.ids]
    calls = 0
    for _ in range(iterations):
        before = rows
        if any(rows):
            states, _ = _states(model, memory, rows)
            goes = model.heads["delete"](states).argmax(-1)[:, 1:].tolist()
            rows = [
                [t for t, go in zip(row, g, strict=False) if not go]
                for row, g in zip(rows, goes, strict=True)
            ]
            calls += 1
        states, _ = _states(model, memory, rows)
        counts = _room_logits(model, states).argmax(-1).tolist()
        holes = [_holes(row, c[: len(row) + 1])[:most] for row, c in zip(rows, counts, strict=True)]
        calls += 1
        if any(MASK in row for row in holes):
            states, _ = _states(model, memory, holes)
            tokens = own_tokens(model.output(states)).argmax(-1)[:, 1:].tolist()
            holes = [
                [t if h == MASK else h for h, t in zip(row, g, strict=False)]
                for row, g in zip(holes, tokens, strict=True)
            ]
            calls += 1
        rows = holes
        if rows == before:
            break
    return rows, calls
