"""Key-value cache of bounded size for streams: the last tokens in a ring, and the first ones."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from arcore.masks import IntervalMask
from arcore.nn.kinds import check_kinds, explain_kinds

Within = Literal["causal", "full"]


@check_kinds
class RingCache:
    """Keys and values of the last `window` tokens, and of the first `sinks`, however long the stream is.

    For long text and streaming video under a sliding window. A new token takes the slot of one that no later token may
    see, so memory never grows and nothing is moved. What a query may see is then at most two ranges of slots, which
    `mask` gives in the form that `arcore.ops.block_sparse_attention` reads; softmax does not depend on the order of
    keys, so the result is that of the whole sequence under `arcore.masks.sliding_window`, up to the order of sums.
    Positions (rotary ones, for instance) belong into the keys before they are staged: they count from the beginning of
    the stream, `length` onwards.

    Reading goes as with `TokenCache`: `stage` in each layer, then `commit`. All rows of the batch advance together.

    Args:
        num_layers: layers of the model.
        batch: rows.
        num_heads: key heads.
        window: tokens that a token sees, itself included.
        head_dim: width of a head.
        room: most tokens staged at once: a frame, a prompt's chunk, a draft.
        sinks: first tokens of the stream that every later one sees (attention sinks, arXiv:2309.17453).
        dtype, device: of the storage; staged tensors are converted.

    Attributes:
        keys, values: the storage, each ``[A, B, H, sinks + window - 1 + room, D]`` for A layers.
        window, room, sinks: as given.

    Raises:
        ValueError: a size is too small.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        batch: int,
        num_heads: int,
        window: int,
        head_dim: int,
        room: int = 1,
        sinks: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if min(num_layers, num_heads, head_dim, window, room) < 1 or min(batch, sinks) < 0:
            raise ValueError(
                "arcore.nn.RingCache: expected num_layers, num_heads, head_dim, window and room of at least 1 and no "
                f"negative batch or sinks but got {num_layers}, {num_heads}, {head_dim}, {window}, {room}, {batch} and "
                f"{sinks}"
            )
        self.window, self.room, self.sinks = window, room, sinks
        self._ring = window - 1 + room
        shape = (num_layers, batch, num_heads, sinks + self._ring, head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self._length = self._written = self._staged = 0

    @property
    def length(self) -> int:
        """Tokens of the stream that were counted in, those that have left the cache included."""
        return self._length

    @property
    def nbytes(self) -> int:
        """Memory of the storage."""
        return self.keys.nbytes + self.values.nbytes

    @explain_kinds
    def slots(self, new: int = 0) -> int:
        """Slots that are in use once `new` more tokens are staged: the Nk of `mask` and of what `stage` returns."""
        return min(self._length + new, self.sinks + self._ring)

    @explain_kinds
    def mask(self, new: int, within: Within = "causal") -> IntervalMask:
        """What `new` tokens behind the end may see, for all layers.

        Args:
            new: tokens that will be staged, N.
            within: "causal": each sees the last `window` tokens, itself the last of them; "full": each sees all new
                tokens, as those of a frame do, and so many before them that it sees `window` in all.

        Returns:
            A mask of N queries and `slots(N)` keys.

        Raises:
            ValueError: more tokens than `room`, fewer than none, or more than `window` with "full".
        """
        self._check_new(new)
        if within not in ("causal", "full"):
            raise ValueError(f"arcore.nn.RingCache: expected within 'causal' or 'full' but got {within!r}")
        if within == "full" and new > self.window:
            raise ValueError(
                f"arcore.nn.RingCache: expected at most window={self.window} tokens that all see each other but got "
                f"{new}"
            )
        rows = []
        for i in range(new):
            stop = self._length + (i + 1 if within == "causal" else new)
            rows.append(self._ranges(max(stop - self.window, 0), stop))
        bounds = torch.tensor(rows, dtype=torch.int32, device=self.keys.device).reshape(new, 4)
        return IntervalMask(bounds, self.slots(new))

    def _ranges(self, start: int, stop: int) -> tuple[int, int, int, int]:
        """Slots of the positions [start, stop), and of the sinks before them."""
        sinks, ring = self.sinks, self._ring
        first, last = max(start, sinks) - sinks, max(stop, sinks) - sinks  # places in an endless ring
        low, count = first % ring, last - first
        head = min(stop, sinks)  # sinks fill the slots from 0 on
        if count == 0:
            return 0, head, 0, 0
        if low + count <= ring:
            return 0, head, sinks + low, sinks + low + count
        return 0, sinks + low + count - ring, sinks + low, sinks + ring

    @explain_kinds
    def stage(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write new tokens of one layer over those that nobody will see again, without counting them in.

        Args:
            layer: which.
            keys, values: ``[B, H, N, D]``, any strides; N at most `room`.

        Returns:
            Keys and values of the layer, ``[B, H, slots(N), D]``, as views of the storage, in the order of slots.

        Raises:
            ValueError: the shapes do not fit, or there are more tokens than `room`.
        """
        layers, batch, heads, _, dim = self.keys.shape
        new = keys.shape[2] if keys.dim() == 4 else 0
        if keys.shape != (batch, heads, new, dim) or values.shape != keys.shape:
            raise ValueError(
                f"arcore.nn.RingCache: expected keys and values of shape (B={batch}, H={heads}, N, D={dim}) "
                f"but got {tuple(keys.shape)} and {tuple(values.shape)}"
            )
        if not 0 <= layer < layers:
            raise ValueError(f"arcore.nn.RingCache: expected a layer from 0 to {layers - 1} but got {layer}")
        self._check_new(new)
        done = 0
        while done < new:
            place = self._length + done
            slot = place if place < self.sinks else self.sinks + (place - self.sinks) % self._ring
            count = min(new - done, self.keys.shape[3] - slot)
            self.keys[layer, :, :, slot : slot + count].copy_(keys[:, :, done : done + count])
            self.values[layer, :, :, slot : slot + count].copy_(values[:, :, done : done + count])
            done += count
        self._staged = new
        self._written = max(self._written, self._length + new)
        slots = self.slots(new)
        return self.keys[layer, :, :, :slots], self.values[layer, :, :, :slots]

    @explain_kinds
    def commit(self, count: int) -> None:
        """Count the first `count` staged tokens in; the others are forgotten.

        Raises:
            ValueError: more than were staged, or fewer than none.
        """
        if not 0 <= count <= self._staged:
            raise ValueError(
                f"arcore.nn.RingCache: expected a count from 0 to {self._staged}, the tokens staged, but got {count}"
            )
        self._length += count
        self._staged = 0

    @explain_kinds
    def truncate(self, length: int) -> None:
        """Go back to the first `length` tokens of the stream, as decoders do that take drafts back.

        Raises:
            ValueError: more tokens than there are, or the slots of tokens that would be seen again hold newer ones:
                the way back is `room` tokens long, counted from the last one ever staged.
        """
        least = max(self._written - self.room, 0)
        if not least <= length <= self._length:
            raise ValueError(
                f"arcore.nn.RingCache: expected a length from {least} to {self._length} but got {length}; what came "
                "before has been written over, so make a cache with more room"
            )
        self._length = length
        self._staged = 0

    def _check_new(self, new: int) -> None:
        if not 0 <= new <= self.room:
            raise ValueError(
                f"arcore.nn.RingCache: expected up to room={self.room} new tokens but got {new}; stage them in parts"
            )

    def __repr__(self) -> str:
        layers, batch, heads, slots, dim = self.keys.shape
        return (
            f"RingCache(num_layers={layers}, batch={batch}, num_heads={heads}, head_dim={dim}, window={self.window}, "
            f"room={self.room}, sinks={self.sinks}, length={self._length}, slots={slots})"
        )
