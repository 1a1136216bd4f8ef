"""Recurrent state of a decoder, allocated once; its size does not grow with the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from arcore.nn.kinds import Count, check_kinds, explain_kinds


@check_kinds
@dataclass(frozen=True)
class StateSnapshot:
    """A copy of what a `StateCache` held.

    Attributes:
        conv, ssm, lengths: as in `StateCache`.
    """

    conv: Tensor
    ssm: Tensor
    lengths: tuple[int, ...]


@check_kinds
class StateCache:
    """What state-space layers remember of the tokens so far: the last inputs of their convolution and their state.

    Layers write their entries in place. There is no way back from a state to an earlier one, so what is to be undone
    needs a `snapshot` first, or, for drafts of a few tokens, `stage`: the states after each of them are kept until
    `commit` picks one per row.

    A cache belongs to the weights that filled it, and `derived` holds what layers computed from those weights alone
    and need again in each step.

    Args:
        num_layers: layers.
        batch: rows.
        conv_shape: of the convolution's inputs of a row and layer, (taps - 1, channels), oldest input first.
        state_shape: of the state of a row and layer, e.g. (channels, d_state).
        dtype: of the convolution's inputs; states are float32 whatever the weights are.
        device: of both.

    Attributes:
        conv: `[num_layers, B, *conv_shape]`.
        ssm: float32 `[num_layers, B, *state_shape]`.
        lengths: tokens that each row has seen, without padding.
        derived: by layer.
        plans: what a model hands to an op that takes one token through a whole layer, by layer; None for layers that
            such an op cannot take. Like `derived` it comes from the weights alone.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        batch: int,
        conv_shape: Sequence[int],
        state_shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if num_layers < 1 or min((batch, *conv_shape, *state_shape)) < 0:
            raise ValueError(
                "arcore.nn.StateCache: expected at least one layer and no negative size but got num_layers="
                f"{num_layers}, batch={batch}, conv_shape={tuple(conv_shape)}, state_shape={tuple(state_shape)}"
            )
        self.conv = torch.zeros(num_layers, batch, *conv_shape, dtype=dtype, device=device)
        self.ssm = torch.zeros(num_layers, batch, *state_shape, dtype=torch.float32, device=device)
        self._lengths = [0] * batch
        self._base = self._lengths
        self.derived: dict[int, Tensor] = {}
        self.plans: dict[int, dict[str, Any] | None] = {}
        self._trail: tuple[Tensor, Tensor] | None = None
        self._split()

    @property
    def batch(self) -> int:
        return self.conv.shape[1]

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(self._lengths)

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return max(self._lengths, default=0)

    @explain_kinds
    def advance(self, counts: int | Tensor | Sequence[int]) -> None:
        """Say that layers have read so many tokens, one number or one per row; what was staged then stands."""
        self._trail = None
        self._lengths = [have + n for have, n in zip(self._lengths, self._per_row(counts), strict=True)]

    @explain_kinds
    def layer(self, layer: Count) -> tuple[Tensor, Tensor]:
        """Views of one layer's entries: the convolution's inputs and the state, to be written in place."""
        return self._layers[layer]

    def snapshot(self) -> StateSnapshot:
        """A copy of everything, to come back to."""
        return StateSnapshot(self.conv.clone(), self.ssm.clone(), self.lengths)

    @explain_kinds
    def restore(self, snapshot: StateSnapshot) -> None:
        """Make the cache what it was at the time of the snapshot.

        Raises:
            ValueError: the snapshot is of another cache, or of other rows.
        """
        if snapshot.conv.shape != self.conv.shape or snapshot.ssm.shape != self.ssm.shape:
            raise ValueError(
                f"arcore.nn.StateCache: expected a snapshot of {self!r} but its states are of shape "
                f"{tuple(snapshot.conv.shape)} and {tuple(snapshot.ssm.shape)}"
            )
        self.conv.copy_(snapshot.conv)
        self.ssm.copy_(snapshot.ssm)
        self._lengths, self._trail = list(snapshot.lengths), None

    @explain_kinds
    def stage(self, tokens: int) -> None:
        """Make room for the states before and after each of `tokens` tokens that layers read next; see `trail`."""
        self._base = self._lengths
        self._trail = (
            self.conv.new_empty(*self.conv.shape[:2], tokens + 1, *self.conv.shape[2:]),
            self.ssm.new_empty(*self.ssm.shape[:2], tokens + 1, *self.ssm.shape[2:]),
        )

    @explain_kinds
    def trail(self, layer: Count) -> tuple[Tensor | None, Tensor | None]:
        """A layer's room for what `stage` announced: `[B, tokens + 1, ...]` for each of its entries.

        (None, None) where nothing is staged.
        """
        return (None, None) if self._trail is None else (self._trail[0][layer], self._trail[1][layer])

    def rewind(self) -> None:
        """Go back to the states before the staged tokens, which stay staged."""
        self._take([0] * self.batch)

    @explain_kinds
    def commit(self, counts: int | Tensor | Sequence[int]) -> None:
        """Count staged tokens in: each row's state becomes that after the first `counts` of them, bit for bit.

        Args:
            counts: one number, or one per row.

        Raises:
            ValueError: nothing is staged, or the counts do not fit.
        """
        numbers, staged = self._per_row(counts), self._staged()
        if any(not 0 <= n <= staged for n in numbers):
            raise ValueError(
                f"arcore.nn.StateCache: expected a count from 0 to {max(staged, 0)}, the tokens staged, for each of "
                f"{self.batch} rows but got {numbers}"
            )
        self._take(numbers)

    @explain_kinds
    def truncate(self, lengths: int | Tensor | Sequence[int]) -> None:
        """Go back to fewer tokens, as far as those staged last reach.

        Args:
            lengths: tokens that stay, one number or one per row.

        Raises:
            ValueError: a state so far back is not kept.
        """
        numbers, staged = self._per_row(lengths), self._staged()
        if numbers == self._lengths:
            return
        back = [n - base for n, base in zip(numbers, self._base, strict=True)]
        if any(not 0 <= n <= staged for n in back):
            raise ValueError(
                f"arcore.nn.StateCache: expected lengths {self._lengths}, or fewer by tokens of the last stage, but "
                f"got {numbers}; a state that was passed is only kept in a snapshot"
            )
        self._take(back)

    @explain_kinds
    def keep(self, path: Tensor | Sequence[Sequence[int]]) -> None:
        """`commit` by the places of accepted tokens: 0, 1, ... of each row, then -1. A state has no branches.

        Raises:
            ValueError: a row's places are not the first ones in order.
        """
        rows = path.tolist() if isinstance(path, Tensor) else [list(row) for row in path]
        rows = [row[: row.index(-1)] if -1 in row else row for row in rows]
        if any(row != list(range(len(row))) for row in rows):
            raise ValueError(
                f"arcore.nn.StateCache: expected the first staged tokens of each row in order but got {rows}; states "
                "follow one chain of drafts, not a tree"
            )
        self.commit([len(row) for row in rows])

    def _staged(self) -> int:
        return -1 if self._trail is None else self._trail[0].shape[2] - 1

    def _per_row(self, numbers: int | Tensor | Sequence[int]) -> list[int]:
        rows = [numbers] * self.batch if isinstance(numbers, int) else torch.as_tensor(numbers).tolist()
        if len(rows) != self.batch:
            raise ValueError(
                f"arcore.nn.StateCache: expected one number or {self.batch}, one per row, but got {rows}"
            )
        return [int(n) for n in rows]

    def _take(self, numbers: Sequence[int]) -> None:
        """The states after so many of the staged tokens."""
        assert self._trail is not None
        self._lengths = [base + n for base, n in zip(self._base, numbers, strict=True)]
        rows, at = torch.arange(self.batch), torch.tensor(numbers, dtype=torch.int64)
        for entries, kept in zip((self.conv, self.ssm), self._trail, strict=True):
            entries.copy_(kept[:, rows.to(kept.device), at.to(kept.device)])

    @explain_kinds
    def select(self, rows: Tensor | Sequence[int]) -> None:
        """Keep these rows in this order; a row may be taken more than once (beams) or not at all (finished rows).

        Args:
            rows: int64 `[B']`, row numbers from 0.
        """
        index = torch.as_tensor(rows, dtype=torch.int64, device=self.conv.device)
        self._lengths, self._trail = [self._lengths[i] for i in index.tolist()], None
        self.conv = self.conv.index_select(1, index)
        self.ssm = self.ssm.index_select(1, index)
        self._split()

    def _split(self) -> None:
        self._layers = list(zip(self.conv.unbind(), self.ssm.unbind(), strict=True))

    def __repr__(self) -> str:
        return (
            f"StateCache(num_layers={self.conv.shape[0]}, batch={self.batch}, "
            f"conv_shape={tuple(self.conv.shape[2:])}, state_shape={tuple(self.ssm.shape[2:])}, length={self.length})"
        )
