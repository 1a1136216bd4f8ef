"""Key-value cache of a decoder, allocated once."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values of all layers, with room for `max_length` tokens from the start.

    Appending copies the new tokens into place and hands out views of everything so far; nothing is reallocated or
    copied again, so a pass over N tokens moves O(N) memory. `truncate` forgets tokens by moving the end back, for
    speculative decoding and for sampling a scale anew.

    Guidance needs no second cache: put conditional and unconditional rows into one batch, `[2B]`, conditional first.
    Each row keeps its own keys, all rows have one length.

    Args:
        num_layers: layers that append.
        batch: rows, guidance rows included.
        num_heads: key heads.
        max_length: most tokens per row.
        head_dim: width of a head.
        dtype, device: of the storage; appended tensors are converted.

    Attributes:
        keys, values: the storage, each `[num_layers, B, H, max_length, D]`.
        max_length: as given.
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
    ) -> None:
        shape = (num_layers, batch, num_heads, max_length, head_dim)
        if min(shape) < 0 or num_layers < 1:
            raise ValueError(
                "arcore.nn.KVCache: expected at least one layer and no negative size but got num_layers="
                f"{num_layers}, batch={batch}, num_heads={num_heads}, max_length={max_length}, head_dim={head_dim}"
            )
        self.max_length = max_length
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self._lengths = [0] * num_layers

    @property
    def batch(self) -> int:
        return self.keys.shape[1]

    @property
    def length(self) -> int:
        """Tokens that every layer holds."""
        return min(self._lengths)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add tokens to one layer.

        Args:
            layer: which.
            keys, values: `[B, H, N, D]`, any strides.

        Returns:
            All keys and values of the layer, `[B, H, length + N, D]`, as views of the storage.

        Raises:
            ValueError: the shapes do not fit or the cache is full.
        """
        _, batch, heads, _, dim = self.keys.shape
        new = keys.shape[2] if keys.dim() == 4 else 0
        if keys.shape != (batch, heads, new, dim) or values.shape != keys.shape:
            raise ValueError(
                f"arcore.nn.KVCache: expected keys and values of shape (B={batch}, H={heads}, N, D={dim}) "
                f"but got {tuple(keys.shape)} and {tuple(values.shape)}"
            )
        start = self._lengths[layer]
        stop = start + new
        if stop > self.max_length:
            raise ValueError(
                f"arcore.nn.KVCache: {start} tokens are stored and {new} more do not fit into max_length="
                f"{self.max_length}; make a larger cache, or truncate it"
            )
        self.keys[layer, :, :, start:stop].copy_(keys)
        self.values[layer, :, :, start:stop].copy_(values)
        self._lengths[layer] = stop
        return self.keys[layer, :, :, :stop], self.values[layer, :, :, :stop]

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens of every layer.

        Raises:
            ValueError: some layer holds fewer.
        """
        if not 0 <= length <= self.length:
            raise ValueError(
                f"arcore.nn.KVCache: expected a length from 0 to {self.length}, the tokens stored, but got {length}"
            )
        self._lengths = [length] * len(self._lengths)

    def __repr__(self) -> str:
        layers, batch, heads, _, dim = self.keys.shape
        return (
            f"KVCache(num_layers={layers}, batch={batch}, num_heads={heads}, head_dim={dim}, "
            f"length={self.length}/{self.max_length})"
        )
