"""The best CTC path among those whose symbols weigh what they must."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from arcore.nn.checks import check_number
from arcore.nn.kinds import check_kinds

# How many end points are traced back in search of one whose exact mass fits.
_TRIED = 200


class MassPath(NamedTuple):
    """What was found.

    Attributes:
        labels: symbols after repetitions are merged and blanks dropped, from 1.
        score: log-probability of the best path that gives them.
        mass: their sum.
    """

    labels: list[int]
    score: float
    mass: float


@check_kinds
def mass_ctc(
    logprobs: Tensor, masses: Sequence[float], target: float, *, tolerance: float = 0.1, grid: float = 0.01
) -> MassPath | None:
    """The likeliest path of slots whose merged symbols have a given total mass (PrimeNovo, arXiv:2406.13022).

    A knapsack over a grid of masses: for each slot, last symbol and mass the best path is kept. On masses that are
    multiples of the grid the result is that of trying all paths. On others, two masses of one bin compete, and the
    result may be a path that is nearly the best; its exact mass always fits.

    Args:
        logprobs: `[T, 1 + V]`, of each slot; 0 is the blank.
        masses: of the V symbols, above 0.
        target: total mass.
        tolerance: by which the total may differ.
        grid: width of a bin.

    Returns:
        The path, or None where none has this mass.

    Raises:
        ValueError: shapes do not fit, or a number is out of range.
    """
    if logprobs.dim() != 2 or logprobs.shape[1] != 1 + len(masses):
        raise ValueError(
            f"expected logprobs [T, {1 + len(masses)}], of a blank and {len(masses)} symbols, but got "
            f"{tuple(logprobs.shape)}"
        )
    for name, value in (("tolerance", tolerance), ("grid", grid)):
        if not check_number(name, value) > 0:
            raise ValueError(f"expected {name} > 0 but got {value}")
    if not masses or not min(masses) > grid:
        raise ValueError(f"expected masses above the grid of {grid} but got {list(masses)}")
    if not check_number("target", target) >= 0 or target == float("inf"):
        raise ValueError(f"expected target >= 0 but got {target}")
    logprobs = logprobs.detach().to("cpu", torch.float64)
    slots, size = logprobs.shape
    shifts = [0, *(round(mass / grid) for mass in masses)]
    # Rounding may move a total by half a bin per symbol.
    slack = tolerance + slots * grid / 2
    bins = int((target + slack) / grid) + 2
    score = torch.full((size, bins), -torch.inf, dtype=torch.float64)
    score[0, 0] = 0.0
    back = torch.zeros(slots, size, bins, dtype=torch.int8 if size < 128 else torch.int16)
    for t in range(slots):
        (first, second), (best, other) = score.topk(2, dim=0)
        new = torch.full_like(score, -torch.inf)
        new[0] = first + logprobs[t, 0]
        back[t, 0] = best.to(back.dtype)
        for v in range(1, size):
            new[v], back[t, v] = score[v], v
            shift = shifts[v]
            if shift < bins:
                mine = best[: bins - shift] == v
                entered = torch.where(mine, second[: bins - shift], first[: bins - shift])
                origin = torch.where(mine, other[: bins - shift], best[: bins - shift])
                better = entered > new[v, shift:]
                new[v, shift:] = torch.where(better, entered, new[v, shift:])
                back[t, v, shift:] = torch.where(better, origin.to(back.dtype), back[t, v, shift:])
            new[v] += logprobs[t, v]
        score = new
    low = max(0, int((target - slack) / grid))
    ends = score[:, low:].flatten()
    for place in ends.topk(min(_TRIED, len(ends))).indices.tolist():
        value = float(ends[place])
        if value == -float("inf"):
            break
        labels = _traced(back, place // (bins - low), low + place % (bins - low), shifts)
        mass = sum(masses[v - 1] for v in labels)
        if abs(mass - target) <= tolerance:
            return MassPath(labels, value, mass)
    return None


def _traced(back: Tensor, last: int, at: int, shifts: list[int]) -> list[int]:
    """The symbols of the path that ends in a state."""
    labels = []
    for t in range(len(back) - 1, -1, -1):
        before = int(back[t, last, at])
        if last and before != last:
            labels.append(last)
            at -= shifts[last]
        last = before
    return labels[::-1]
