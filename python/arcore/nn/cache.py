"""Key-value cache of a decoder, allocated once."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from arcore._offers import Offers
from arcore.nn.kinds import check_kinds, explain_kinds
from arcore.ops._checks import autocasts


@runtime_checkable
class Cache(Protocol, metaclass=Offers):
    """What all caches offer, whether they hold keys and values or a recurrent state."""

    @property
    def length(self) -> int:
        """Tokens seen so far."""
        ...

    @property
    def batch(self) -> int:
        """Rows."""
        ...

    def snapshot(self) -> Any:
        """What `restore` takes to come back to this point."""
        ...

    def restore(self, snapshot: Any) -> None:
        """Make the cache what it was at the time of the snapshot."""
        ...

    def select(self, rows: Tensor | Sequence[int]) -> None:
        """Keep these rows in this order."""
        ...


@check_kinds
class KVSnapshot:
    """A point in the life of a `KVCache`: lengths only, for what lies before the end is never written again.

    Attributes:
        lengths: tokens of each layer.
        cuts: how often the cache had been cut when the snapshot was taken.
    """

    def __init__(self, owner: KVCache, lengths: tuple[int, ...], cuts: int) -> None:
        self.owner, self.lengths, self.cuts = owner, lengths, cuts


@check_kinds
def storage_dtype(like: Tensor) -> torch.dtype:
    """Type in which a cache keeps keys and values: that of autocast on a device that casts, else its own.

    Attention would cast them anyway, all earlier ones at every call.
    """
    if like.dtype is torch.float32 and autocasts(like):
        return torch.get_autocast_dtype(like.device.type)
    return like.dtype


@check_kinds
class KVCache:
    """Keys and values of all layers, with room for `max_length` tokens from the start.

    Appending copies the new tokens into place and hands out views of everything so far; nothing is reallocated or
    copied again, so a pass over N tokens moves O(N) memory. `stage` does the same without counting the tokens in, so
    the next call writes over them: block diffusion denoises a block many times before it is kept. `truncate` forgets
    tokens by moving the end back, for speculative decoding and for sampling a scale anew; `snapshot` and `restore` do
    so layer by layer and cost nothing.

    Guidance needs no second cache. Where context depends on the condition, put conditional and unconditional rows into
    one batch, `[2B]`, conditional first: each row keeps its own keys, all rows have one length. Where it does not, let
    the two copies of a row stand one after the other in the *sequence*, staged behind the context that both see, under
    a mask that hides each from the other: then the context is stored once.

    Args:
        num_layers: layers of the model.
        batch: rows, guidance rows included.
        num_heads: key heads.
        max_length: most tokens per row.
        head_dim: width of a head.
        dtype, device: of the storage; appended tensors are converted.
        absent: layers without keys and values, as models have that mix attention with other layers; they take no
            memory and cannot append.

    Attributes:
        keys, values: the storage, each `[A, B, H, max_length, D]`, where A counts the layers that are not absent.
        max_length: as given.
        notes: what a model wants to keep for these rows beside keys and values; empty after `select`.

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
                "arcore.nn.KVCache: expected at least one layer and no negative size but got num_layers="
                f"{num_layers}, batch={batch}, num_heads={num_heads}, max_length={max_length}, head_dim={head_dim}"
            )
        present = [layer for layer in range(num_layers) if layer not in absent]
        if not present or not set(absent) <= set(range(num_layers)):
            raise ValueError(
                f"arcore.nn.KVCache: expected absent to name some of the layers 0 to {num_layers - 1}, not all, but "
                f"got {sorted(absent)}"
            )
        self._slots = {layer: slot for slot, layer in enumerate(present)}
        shape = (len(present), batch, num_heads, max_length, head_dim)
        self.max_length = max_length
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.notes: dict[str, Any] = {}
        self._lengths = [0] * len(present)
        # The lengths that the cache was ever cut to: a snapshot is void once a later cut went below its length.
        self._cuts: list[int] = []

    @property
    def batch(self) -> int:
        return self.keys.shape[1]

    @property
    def length(self) -> int:
        """Tokens that every layer holds."""
        return min(self._lengths)

    @property
    def nbytes(self) -> int:
        """Memory of the storage."""
        return self.keys.nbytes + self.values.nbytes

    @explain_kinds
    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add tokens to one layer.

        Args:
            layer: which.
            keys, values: `[B, H, N, D]`, any strides.

        Returns:
            All keys and values of the layer, `[B, H, length + N, D]`, as views of the storage.

        Raises:
            ValueError: the shapes do not fit, the cache is full, or the layer is absent.
        """
        views = self.stage(layer, keys, values)
        self._lengths[self._slots[layer]] += keys.shape[2]
        return views

    @explain_kinds
    def stage(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Like `append`, but the next `append` or `stage` of the layer writes over the tokens."""
        _, batch, heads, _, dim = self.keys.shape
        new = keys.shape[2] if keys.dim() == 4 else 0
        if keys.shape != (batch, heads, new, dim) or values.shape != keys.shape:
            raise ValueError(
                f"arcore.nn.KVCache: expected keys and values of shape (B={batch}, H={heads}, N, D={dim}) "
                f"but got {tuple(keys.shape)} and {tuple(values.shape)}"
            )
        slot = self._slots.get(layer)
        if slot is None:
            raise ValueError(
                f"arcore.nn.KVCache: layer {layer} has no keys and values; those that have are {sorted(self._slots)}"
            )
        start = self._lengths[slot]
        stop = start + new
        if stop > self.max_length:
            raise ValueError(
                f"arcore.nn.KVCache: {start} tokens are stored and {new} more do not fit into max_length="
                f"{self.max_length}; make a larger cache, or truncate it"
            )
        self.keys[slot, :, :, start:stop].copy_(keys)
        self.values[slot, :, :, start:stop].copy_(values)
        return self.keys[slot, :, :, :stop], self.values[slot, :, :, :stop]

    @explain_kinds
    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens of every layer.

        Raises:
            ValueError: some layer holds fewer.
        """
        if not 0 <= length <= self.length:
            raise ValueError(
                f"arcore.nn.KVCache: expected a length from 0 to {self.length}, the tokens stored, but got {length}"
            )
        self._cut([length] * len(self._lengths))

    def snapshot(self) -> KVSnapshot:
        """The present lengths, to come back to; nothing is copied."""
        return KVSnapshot(self, tuple(self._lengths), len(self._cuts))

    @explain_kinds
    def restore(self, snapshot: KVSnapshot) -> None:
        """Forget what was appended since the snapshot.

        Raises:
            ValueError: the snapshot is of another cache, or tokens it counts on were cut off since.
        """
        if snapshot.owner is not self or any(
            kept < length for kept in self._cuts[snapshot.cuts :] for length in snapshot.lengths
        ):
            raise ValueError(
                f"arcore.nn.KVCache: the snapshot of lengths {snapshot.lengths} is of another cache or older than a "
                "cut below them; take snapshots of the cache that is restored, and restore before cutting deeper"
            )
        self._cut(list(snapshot.lengths))

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
        self.notes.clear()
        self._cuts.append(-1)

    def _cut(self, lengths: list[int]) -> None:
        if lengths != self._lengths:
            self._cuts.append(min(lengths))
        self._lengths = lengths

    def __repr__(self) -> str:
        layers, batch, heads, _, dim = self.keys.shape
        return (
            f"KVCache(num_layers={layers}, batch={batch}, num_heads={heads}, head_dim={dim}, "
            f"length={self.length}/{self.max_length})"
        )
