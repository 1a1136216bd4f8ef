"""What a decoder asks of a model. Decoders are written against these and never against a model.

`docs/architecture.md` plans protocols for token, masked and block-diffusion models; they come with their decoders.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from arcore.nn.cache import KVCache


@runtime_checkable
class ScaleModel(Protocol):
    """Predicts all tokens of a scale at once from the coarser scales.

    Attributes:
        patch_nums: side length of each scale's token map, coarse to fine.
        vocab_size: number of codes V.
        null_class: the label that stands for no class, in guidance.
    """

    @property
    def patch_nums(self) -> tuple[int, ...]: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def null_class(self) -> int: ...

    def make_cache(self, batch: int) -> KVCache:
        """An empty cache with room for all scales of `batch` rows."""
        ...

    def scale_logits(self, k: int, inputs: Tensor | None, labels: Tensor, cache: KVCache) -> Tensor:
        """Logits of scale k; scales 0..k-1 are in the cache, scale k is added to it.

        Args:
            k: scale, from 0; called in order.
            inputs: `[B, patch_nums[k]**2, z]`, what the tokenizer's `next_input` made of the scales so far; None for
                k = 0.
            labels: int64 `[B]`.
            cache: from `make_cache(B)`.

        Returns:
            float32 `[B, patch_nums[k]**2, V]`.
        """
        ...


@runtime_checkable
class ScaleTokenizer(Protocol):
    """Turns codes into images scale by scale. `z` is the width of a code vector, `p` a side length.

    Attributes:
        patch_nums: side length of each scale's token map, coarse to fine.
        vocab_size: number of codes V.
    """

    @property
    def patch_nums(self) -> tuple[int, ...]: ...

    @property
    def vocab_size(self) -> int: ...

    def empty_latent(self, batch: int) -> Tensor:
        """The latent before the first scale, `[B, z, p_last, p_last]`."""
        ...

    def add_scale(self, k: int, indices: Tensor, latent: Tensor) -> Tensor:
        """The latent after scale k with codes `[B, patch_nums[k]**2]`; leaves the argument as it is."""
        ...

    def next_input(self, k: int, latent: Tensor) -> Tensor:
        """What the model reads for scale k + 1, `[B, patch_nums[k + 1]**2, z]`."""
        ...

    def decode_latent(self, latent: Tensor) -> Tensor:
        """Images `[B, C, H, W]` in [-1, 1]."""
        ...

    def scale_inputs(self, indices: Sequence[Tensor]) -> Tensor:
        """`next_input` of all scales but the last in one sequence, for training."""
        ...
