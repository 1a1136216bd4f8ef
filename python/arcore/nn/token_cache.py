"""Key-value cache of token models, in which every row has a length of its own."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from arcore.nn.kinds import check_kinds, explain_kinds

Counts = int | Sequence[int] | Tensor


@check_kinds
class TokenSnapshot:
    """A point in the life of a `TokenCache`: lengths only, for what lies before the end is never written again.

    Attributes:
        lengths: tokens of each row.
        cuts: how often the cache had been cut when the snapshot was taken.
    """

    def __init__(self, owner: TokenCache, lengths: tuple[int, ...], cuts: int) -> None:
        self.owner, self.lengths, self.cuts = owner, lengths, cuts


@check_kinds
class TokenCache:
    """Keys and values of all layers, each row with its own number of tokens, with room from the start.

    Rows begin at the first slot, so a token's slot is its position and padding takes none. Reading goes in two steps:
    `stage` writes the keys and values of new tokens behind each row's end in one layer after the other, then `commit`
    counts them in, all or some of them, or `keep` those on a path through a tree of drafts. What is staged and not
    counted in is written over by what comes next. So speculative decoders need no copy to come back to, and rows of a
    batch may accept different numbers of drafts.

    Args:
        num_layers: layers of the model.
        batch: rows.
        num_heads: key heads.
        max_length: most tokens per row, staged ones included.
        head_dim: width of a head.
        dtype, device: of the storage; staged tensors are converted.
        absent: layers without keys and values, such as skipped ones; they take no memory and cannot stage.

    Attributes:
        keys, values: the storage, each `[A, B, H, max_length, D]`, where A counts the layers that are not absent.
        max_length: as given.
        derived: what a decoder looked up about its weights for this cache, by layer; a cache belongs to the weights
            that fill it.

    Raises:
        ValueError: a size is negative, or `absent` names all layers or one that does not exist.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        batch: int,
        num_heads: int,
        max_length: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        absent: Collection[int] = (),
    ) -> None:
        if min(num_layers - 1, batch, num_heads, max_length, head_dim) < 0:
            raise ValueError(
                "arcore.nn.TokenCache: expected at least one layer and no negative size but got num_layers="
                f"{num_layers}, batch={batch}, num_heads={num_heads}, max_length={max_length}, head_dim={head_dim}"
            )
        present = [layer for layer in range(num_layers) if layer not in absent]
        if not present or not set(absent) <= set(range(num_layers)):
            raise ValueError(
                f"arcore.nn.TokenCache: expected absent to name some of the layers 0 to {num_layers - 1}, not all, but "
                f"got {sorted(absent)}"
            )
        self._slots = {layer: slot for slot, layer in enumerate(present)}
        self.max_length = max_length
        shape = (len(present), batch, num_heads, max_length, head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self._lengths: tuple[int, ...] = (0,) * batch
        self._staged = 0
        self.derived: dict[int, Any] = {}
        # The lengths that each cut left: a snapshot is void once a later cut went below its lengths.
        self._cuts: list[tuple[int, ...]] = []

    @property
    def batch(self) -> int:
        return self.keys.shape[1]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens that each row holds."""
        return self._lengths

    @property
    def length(self) -> int:
        """Tokens that the longest row holds."""
        return max(self._lengths, default=0)

    @property
    def ragged(self) -> bool:
        """Whether rows differ in length."""
        return len(set(self._lengths)) > 1

    @property
    def nbytes(self) -> int:
        """Memory of the storage."""
        return self.keys.nbytes + self.values.nbytes

    @explain_kinds
    def stage(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write new tokens of one layer behind each row's end, without counting them in.

        Args:
            layer: which.
            keys, values: `[B, H, N, D]`, any strides.

        Returns:
            Keys and values of the layer, `[B, H, length + N, D]`, as views of the storage. In a row that is shorter
            than the longest one, what lies behind its N new tokens is undefined and must be masked.

        Raises:
            ValueError: the shapes do not fit, the cache is full, or the layer is absent.
        """
        _, batch, heads, _, dim = self.keys.shape
        new = keys.shape[2] if keys.dim() == 4 else 0
        if keys.shape != (batch, heads, new, dim) or values.shape != keys.shape:
            raise ValueError(
                f"arcore.nn.TokenCache: expected keys and values of shape (B={batch}, H={heads}, N, D={dim}) "
                f"but got {tuple(keys.shape)} and {tuple(values.shape)}"
            )
        slot = self._slot(layer)
        self._check_room(new)
        self._staged = new
        stop = self.length + new
        if not self.ragged:
            start = stop - new
            self.keys[slot, :, :, start:stop].copy_(keys)
            self.values[slot, :, :, start:stop].copy_(values)
        else:
            for row, start in enumerate(self._lengths):
                self.keys[slot, row, :, start : start + new].copy_(keys[row])
                self.values[slot, row, :, start : start + new].copy_(values[row])
                # A masked value still meets a weight of 0, and 0 * NaN is NaN in a dense product.
                self.keys[slot, row, :, start + new : stop].zero_()
                self.values[slot, row, :, start + new : stop].zero_()
        return self.keys[slot, :, :, :stop], self.values[slot, :, :, :stop]

    @explain_kinds
    def open(self, new: int) -> None:
        """Make `new` tokens count as staged, for ops that write them into the views of `layer` themselves.

        Raises:
            ValueError: the cache is full.
        """
        self._check_room(new)
        self._staged = new

    @explain_kinds
    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer with all their room, `[B, H, max_length, D]`, as views of the storage.

        Raises:
            ValueError: the layer is absent.
        """
        slot = self._slot(layer)
        return self.keys[slot], self.values[slot]

    @explain_kinds
    def commit(self, counts: Counts) -> None:
        """Count staged tokens in: the first `counts` of each row.

        Args:
            counts: one number, or one per row.

        Raises:
            ValueError: more than were staged, or fewer than none.
        """
        numbers = self._per_row("counts", counts)
        if any(not 0 <= n <= self._staged for n in numbers):
            raise ValueError(
                f"arcore.nn.TokenCache: expected counts from 0 to {self._staged}, the tokens staged, but got "
                f"{list(numbers)}"
            )
        self._lengths = tuple(have + n for have, n in zip(self._lengths, numbers, strict=True))
        self._staged = 0

    @explain_kinds
    def keep(self, path: Tensor | Sequence[Sequence[int]]) -> None:
        """Count in the staged tokens on a path, moved together; the others are forgotten.

        Args:
            path: int64 `[B, P]`, places among the staged tokens, growing, then -1; or one list per row. The `path` of
                `arcore.ops.Verified`, if the drafts were staged alone.

        Raises:
            ValueError: the number of rows does not fit, or a place does not exist or is out of order.
        """
        rows = path.tolist() if isinstance(path, Tensor) else [list(row) for row in path]
        rows = [row[: row.index(-1)] if -1 in row else row for row in rows]
        if len(rows) != self.batch:
            raise ValueError(
                f"arcore.nn.TokenCache: expected a path for each of {self.batch} rows but got {len(rows)}"
            )
        for row, places in enumerate(rows):
            ends = [-1, *places, self._staged]
            if any(a >= b for a, b in pairwise(ends)):
                raise ValueError(
                    f"arcore.nn.TokenCache: expected growing places from 0 to {self._staged - 1} but row {row} has "
                    f"{places}"
                )
            if places == list(range(len(places))):
                continue
            start = self._lengths[row]
            index = torch.tensor(places, device=self.keys.device) + start
            for store in (self.keys, self.values):
                of_row = store[:, row]
                of_row[:, :, start : start + len(places)] = of_row.index_select(2, index)
        self._lengths = tuple(have + len(p) for have, p in zip(self._lengths, rows, strict=True))
        self._staged = 0

    @explain_kinds
    def truncate(self, length: Counts) -> None:
        """Keep the first `length` tokens of each row.

        Args:
            length: one number, or one per row.

        Raises:
            ValueError: some row holds fewer.
        """
        numbers = self._per_row("length", length)
        if any(not 0 <= n <= have for n, have in zip(numbers, self._lengths, strict=True)):
            raise ValueError(
                f"arcore.nn.TokenCache: expected lengths from 0 to {list(self._lengths)}, the tokens stored, but got "
                f"{list(numbers)}"
            )
        self._cut(numbers)

    def snapshot(self) -> TokenSnapshot:
        """The present lengths, to come back to; nothing is copied."""
        return TokenSnapshot(self, self._lengths, len(self._cuts))

    @explain_kinds
    def restore(self, snapshot: TokenSnapshot) -> None:
        """Forget what was counted in since the snapshot.

        Raises:
            ValueError: the snapshot is of another cache, or tokens it counts on were cut off since.
        """
        void = snapshot.owner is not self or any(
            len(cut) != len(snapshot.lengths)
            or any(kept < length for kept, length in zip(cut, snapshot.lengths, strict=True))
            for cut in self._cuts[snapshot.cuts :]
        )
        if void:
            raise ValueError(
                f"arcore.nn.TokenCache: the snapshot of lengths {snapshot.lengths} is of another cache or older than a "
                "cut below them; take snapshots of the cache that is restored, and restore before cutting deeper"
            )
        self._cut(snapshot.lengths)

    @explain_kinds
    def select(self, rows: Tensor | Sequence[int]) -> None:
        """Keep these rows in this order; a row may be taken more than once (beams) or not at all (finished rows).

        Snapshots taken before are void.

        Args:
            rows: int64 `[B']`, row numbers from 0.
        """
        index = torch.as_tensor(rows, dtype=torch.int64, device=self.keys.device)
        self.keys = self.keys.index_select(1, index)
        self.values = self.values.index_select(1, index)
        self._lengths = tuple(self._lengths[row] for row in index.tolist())
        self._cuts.append(())
        self._staged = 0

    @explain_kinds
    def fork(self, rows: Tensor | Sequence[int] | None = None) -> TokenCache:
        """A cache of its own with copies of these rows, all by default; this one stays as it is.

        Args:
            rows: int64 `[B']`, row numbers from 0, any of them several times.
        """
        other = object.__new__(TokenCache)
        other.__dict__ |= self.__dict__
        other._cuts = []
        other.select(range(self.batch) if rows is None else rows)
        return other

    def _slot(self, layer: int) -> int:
        slot = self._slots.get(layer)
        if slot is None:
            raise ValueError(
                f"arcore.nn.TokenCache: layer {layer} has no keys and values; those that have are {sorted(self._slots)}"
            )
        return slot

    def _check_room(self, new: int) -> None:
        if self.length + new > self.max_length:
            raise ValueError(
                f"arcore.nn.TokenCache: {self.length} tokens are stored and {new} more do not fit into max_length="
                f"{self.max_length}; make a larger cache, or truncate it"
            )

    def _per_row(self, name: str, numbers: Counts) -> tuple[int, ...]:
        if isinstance(numbers, int):
            return (numbers,) * self.batch
        listed = tuple(numbers.tolist() if isinstance(numbers, Tensor) else numbers)
        if len(listed) != self.batch:
            raise ValueError(
                f"arcore.nn.TokenCache: expected {name} for each of {self.batch} rows but got {len(listed)}"
            )
        return listed

    def _cut(self, lengths: tuple[int, ...]) -> None:
        if lengths != self._lengths:
            self._cuts.append(lengths)
        self._lengths = lengths
        self._staged = 0

    def __repr__(self) -> str:
        layers, batch, heads, _, dim = self.keys.shape
        held = str(self.length) if not self.ragged else str(list(self._lengths))
        return (
            f"TokenCache(num_layers={layers}, batch={batch}, num_heads={heads}, head_dim={dim}, "
            f"length={held}/{self.max_length})"
        )
