"""Inputs, weights and steps of each scale."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from torch import Tensor

from arcore.nn.protocols import ScaleTokenizer

SIDES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


SIDES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)


SIDES_1024 = (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)


def own_inputs(tokenizer: ScaleTokenizer, k: int, indices: Tensor) -> Tensor:
    """What the codes `[B, n_k]` of scale k >= 1 alone add to the latent, shrunk to its size, `[B, n_k, z]`."""
    return tokenizer.next_input(k - 1, tokenizer.add_scale(k, indices, tokenizer.empty_latent(len(indices))))


def lognorm_weights(patch_nums: Sequence[int]) -> list[float]:
    """Weights of the scales in the first stage (section 3.2); they sum to 1.

    The sides, finest first, are standardised (with n - 1), and a scale's weight is the normal density there.
    """
    sides = [side / patch_nums[-1] for side in reversed(patch_nums)]
    if len(sides) < 2:
        return [1.0]
    law = statistics.NormalDist(statistics.mean(sides), statistics.stdev(sides))
    density = [law.pdf(side) for side in sides]
    return [value / sum(density) for value in density]


def published_schedule(patch_nums: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """How many tokens each pass over a scale settles; the published rows, and one pass for other scales above 3 x 3."""
    rows: dict[int, tuple[int, ...]] = {2: (1, 3), 3: (1, 1, 2, 5)}
    if tuple(patch_nums) == SIDES_512:
        rows[4] = (5, 11)
    return tuple(rows.get(side, (side * side,)) for side in patch_nums)
