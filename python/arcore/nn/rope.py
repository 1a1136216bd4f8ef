"""Rotary positions of tokens with several coordinates, such as frame, row and column (RoPE, arXiv:2104.09864).

The head's channels are divided among the axes. A channel pair of an axis turns by `position * rate`, so that scores
depend on differences of positions. Three arrangements of the pairs are in use:

`blockdiag`: each axis has a run of channels, and pairs channel i of the first half of the run with i of the second.
`cosmos`: all axes' first halves, then all second halves; pairs i with i + D / 2. The same up to an order of channels.
`acdit_v0`: angles as in `blockdiag`, pairs as in `cosmos`. Where the axes' runs meet, the two channels of a pair turn
by angles of different axes, which is no rotation: norms change, and scores depend on more than differences. The
released weights of ACDiT need it; nothing else should use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Tensor

from arcore.nn.kinds import Axes, check_kinds, explain_kinds

RopeLayout = Literal["blockdiag", "cosmos", "acdit_v0"]


class Rope(NamedTuple):
    """Angles of N tokens, from `rope_table`.

    Attributes:
        cos, sin: float32 `[N, D]`.
        runs: widths of the runs of channels in each of which the halves are paired; they add up to D.
    """

    cos: Tensor
    sin: Tensor
    runs: tuple[int, ...]

    @explain_kinds
    def rows(self, index: Tensor | slice) -> Rope:
        """The angles of some tokens."""
        return Rope(self.cos[index], self.sin[index], self.runs)

    @explain_kinds
    def to(self, device: torch.device) -> Rope:
        """The same on another device."""
        return Rope(self.cos.to(device), self.sin.to(device), self.runs)

    @explain_kinds
    def apply(self, x: Annotated[Tensor, Axes("... N D")]) -> Tensor:
        """Turn queries or keys `[..., N, D]`; computed in float32, returned in the dtype of x."""
        turned = []
        for part in x.split(self.runs, dim=-1):
            first, second = part.chunk(2, dim=-1)
            turned += [-second, first]
        return (x * self.cos + torch.cat(turned, dim=-1) * self.sin).to(x.dtype)


@check_kinds
def axis_base(length: int) -> float:
    """The rotary base that ACDiT takes for an axis of that many positions: about 8 / pi of it, in whole hundreds."""
    return float((int(8 * length / torch.pi) // 100 + 1) * 100)


@check_kinds
def rope_table(
    positions: Tensor,
    head_dim: int,
    *,
    split: Sequence[int],
    bases: Sequence[float],
    layout: RopeLayout = "blockdiag",
    inclusive: bool = False,
) -> Rope:
    """Angles of tokens on several axes, computed in float64 on the CPU.

    Args:
        positions: `[A, N]`, coordinate of each token on each of A axes.
        head_dim: channels D of a head.
        split: shares of the channels that the axes get; axis a has `split[a] / sum(split)` of them.
        bases: ratio of the largest to the smallest rate of each axis.
        layout: arrangement of the pairs, see the module.
        inclusive: rates are `base ** -e` with e from 0 to 1, 1 included (ACDiT); else up to the step before 1.

    Raises:
        ValueError: numbers of axes differ, channels do not divide, or the layout is unknown.
    """
    if layout not in ("blockdiag", "cosmos", "acdit_v0"):
        raise ValueError(f"expected layout to be blockdiag, cosmos or acdit_v0 but got {layout!r}")
    if positions.dim() != 2 or not len(positions) == len(split) == len(bases):
        raise ValueError(
            f"expected positions [A, N] with a split and a base for each of A axes but got {tuple(positions.shape)}, "
            f"split={tuple(split)} and bases={tuple(bases)}"
        )
    total = sum(split)
    if min(split) < 1 or any(head_dim * share % (2 * total) for share in split):
        raise ValueError(
            f"expected split={tuple(split)} to divide head_dim={head_dim} into even numbers of channels"
        )
    halves = []
    for coordinate, share, base in zip(positions.to("cpu", torch.float64), split, bases, strict=True):
        rates = head_dim * share // (2 * total)
        steps = torch.arange(rates, dtype=torch.float64, device="cpu")
        steps = steps / (max(rates - 1, 1) if inclusive else rates)
        halves.append(coordinate[:, None] * base**-steps)  # [N, D_a / 2]
    runs = (head_dim,) if layout != "blockdiag" else tuple(2 * half.shape[1] for half in halves)
    parts = halves * 2 if layout == "cosmos" else [half for half in halves for _ in range(2)]
    angles = torch.cat(parts, dim=1)
    return Rope(angles.cos().float(), angles.sin().float(), runs)
