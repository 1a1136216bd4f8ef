"""Several continuations of one prompt in one row: the prompt is read once, and the branches do not see each other.

A branch's token sees the prompt and the branch's tokens up to itself, which are two ranges of keys and so one row of an
`IntervalMask`; its rotary position counts from the prompt's end, as if it stood in a row of its own.

Legend: B rows, T tokens of a row, N packed tokens, G branches of a prompt.
"""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from arcore.masks import IntervalMask
from arcore.nn.causal import CausalDecoder
from arcore.nn.kinds import Axes, check_kinds


class PackedBranches(NamedTuple):
    """Rows that share prompts, packed one behind the other.

    Attributes:
        ids: int64 `[1, N]`: each prompt once, and behind it its branches.
        positions: int64 `[1, N]`, place of each token in its own row.
        mask: who sees whom.
        place: int64 `[B, T]`, where each token of the rows stands in `ids`; -1 at padding.
    """

    ids: Tensor
    positions: Tensor
    mask: IntervalMask
    place: Tensor


# One whole number per row, and rows of tokens.
Whole = Annotated[Tensor, Axes("B", whole=True)]
Ids = Annotated[Tensor, Axes("B T", whole=True)]


@check_kinds
def pack_branches(tokens: Ids, lengths: Whole, prompts: Whole, groups: Whole) -> PackedBranches:
    """Pack right-padded rows whose groups share their first tokens.

    Args:
        tokens: int64 `[B, T]`.
        lengths: int64 `[B]`, tokens of each row without padding.
        prompts: int64 `[B]`, how many of them are the prompt, the same in a group.
        groups: int64 `[B]`; rows of a group stand together.

    Raises:
        ValueError: shapes do not fit, or rows of a group have different prompts.
    """
    batch, width = tokens.shape
    for name, found in (("lengths", lengths), ("prompts", prompts), ("groups", groups)):
        if found.shape != (batch,):
            raise ValueError(
                f"arcore.pack_branches: expected {name} ({batch},) but got {tuple(found.shape)}; give one per row"
            )
    if (prompts > lengths).any() or (lengths > width).any() or (prompts < 1).any():
        raise ValueError(
            "arcore.pack_branches: expected 1 <= prompts <= lengths <= T in every row but got prompts "
            f"{prompts.tolist()} and lengths {lengths.tolist()} with T = {width}"
        )
    place = torch.full((batch, width), -1, dtype=torch.int64)
    ids, positions, bounds = [], [], []
    total, row = 0, 0
    known = list(zip(groups.tolist(), prompts.tolist(), lengths.tolist(), strict=True))
    while row < batch:
        group, prompt, _ = known[row]
        start = total
        ids.append(tokens[row, :prompt])
        positions.append(torch.arange(prompt))
        steps = torch.arange(start, start + prompt)
        zeros = torch.zeros_like(steps)
        bounds.append(torch.stack([zeros + start, steps + 1, zeros, zeros], -1))
        total += prompt
        first = row
        while row < batch and known[row][0] == group:
            _, own, length = known[row]
            if own != prompt or not torch.equal(tokens[row, :prompt], tokens[first, :prompt]):
                raise ValueError(
                    f"arcore.pack_branches: expected the rows of group {group} to share their prompt but row {row} has "
                    f"another one than row {first}; give them groups of their own"
                )
            count = length - prompt
            place[row, :prompt] = torch.arange(start, start + prompt)
            place[row, prompt:length] = torch.arange(total, total + count)
            ids.append(tokens[row, prompt:length])
            positions.append(torch.arange(prompt, length))
            steps = torch.arange(total, total + count)
            ones = torch.ones_like(steps)
            if total == start + prompt:  # the first branch follows its prompt: one range
                ranges = [ones * start, steps + 1, 0 * ones, 0 * ones]
            else:
                ranges = [ones * start, ones * (start + prompt), ones * total, steps + 1]
            bounds.append(torch.stack(ranges, -1))
            total += count
            row += 1
    device = tokens.device
    if not batch:
        empty = torch.zeros(1, 0, dtype=torch.int64, device=device)
        return PackedBranches(empty, empty, IntervalMask(torch.zeros(0, 2, dtype=torch.int64), 0), place)
    mask = IntervalMask(torch.cat(bounds), total).to(device)
    return PackedBranches(torch.cat(ids)[None], torch.cat(positions)[None].to(device), mask, place.to(device))


@check_kinds
def branch_hidden(model: Any, packed: PackedBranches) -> Tensor:
    """What the model's head reads of packed rows, `[1, N, C]`.

    Raises:
        TypeError: the model is no `arcore.nn.CausalDecoder`.
        ValueError: it has a sliding window, under which a branch's range would have to move with its position.
    """
    if not isinstance(model, CausalDecoder):
        raise TypeError(
            "arcore.branch_hidden: expected a CausalDecoder, whose attention takes any mask, but got "
            f"{type(model).__name__}; score its rows one by one, or use the mixer's own branches"
        )
    if model.window is not None:
        raise ValueError(
            f"arcore.branch_hidden: expected a model without a sliding window but got window={model.window}; score "
            "its rows one by one"
        )
    if packed.positions.numel() and int(packed.positions.max()) >= model.max_length:
        raise ValueError(
            f"arcore.branch_hidden: expected rows of at most {model.max_length} tokens, which the model is made for"
        )
    return model.run(model.embed(packed.ids), model.rotary.at(packed.positions), packed.mask)
