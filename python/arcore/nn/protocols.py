"""What a decoder asks of a model. Decoders are written against these and never against a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from arcore._offers import Offers
from arcore.nn.cache import KVCache
from arcore.nn.diffusion_head import DiffusionHead


@runtime_checkable
class ScaleModel(Protocol, metaclass=Offers):
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
class ScaleTokenizer(Protocol, metaclass=Offers):
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


@runtime_checkable
class VectorTokenizer(ScaleTokenizer, Protocol):
    """A `ScaleTokenizer` that also takes vectors where codes are meant, for mixtures of codes.

    Attributes:
        codebook: the vector of each code, `[V, z]`.
    """

    @property
    def codebook(self) -> Tensor: ...

    def add_vectors(self, k: int, vectors: Tensor, latent: Tensor) -> Tensor:
        """`add_scale` for vectors `[B, patch_nums[k]**2, z]`."""
        ...


@runtime_checkable
class BlockModel(Protocol, metaclass=Offers):
    """Denoises a sequence block by block, each given the clean blocks before it.

    Attributes:
        num_blocks: blocks T of a full sequence; 1 for a model that denoises everything at once.
        block_shape: shape S of a block's values, e.g. (tokens, channels).
        null_class: the label that stands for no class, in guidance.
        schedule: of the noise.
        prediction: what `denoise` returns, see `arcore.schedules`.
    """

    @property
    def num_blocks(self) -> int: ...

    @property
    def block_shape(self) -> tuple[int, ...]: ...

    @property
    def null_class(self) -> int: ...

    @property
    def schedule(self) -> Any: ...

    @property
    def prediction(self) -> Any: ...

    def make_cache(self, batch: int, copies: int = 1) -> KVCache:
        """An empty cache for `batch` rows, with room for `copies` versions of the block that is denoised."""
        ...

    def denoise(self, x: Tensor, t: Tensor, labels: Tensor, cache: KVCache) -> tuple[Tensor, Tensor | None]:
        """What the network predicts of the block after those in the cache, which is read and not changed.

        Args:
            x: `[B, G, *S]`, G versions of the block that do not see each other.
            t: times `[B, G]`.
            labels: int64 `[B, G]`.
            cache: from `make_cache(B, G)`.

        Returns:
            The prediction, float32 `[B, G, *S]`, and the predicted variance, like it, or None.
        """
        ...

    def commit(self, block: Tensor, cache: KVCache) -> None:
        """Add the next clean block `[B, *S]` to the cache."""
        ...


@runtime_checkable
class FrameModel(Protocol, metaclass=Offers):
    """Denoises the frames of a video, each at a time of its own.

    Attributes:
        num_frames: frames F that it takes at once.
        frame_shape: shape S of a frame's values, e.g. (tokens, channels).
        null_class: the label that stands for no class, in guidance.
        schedule: of the noise.
        prediction: what it returns, see `arcore.schedules`.
        context_time: at which it reads finished frames: clean, or a little above.
        frames_at_once: frames that are on their way together unless a decoder is told otherwise.
        cacheable: no frame influences an earlier one, nor the context: what is clean stays as it is and may lie in a
            cache. `make_cache`, `start` and `denoise` are for such models only.
    """

    @property
    def num_frames(self) -> int: ...

    @property
    def frame_shape(self) -> tuple[int, ...]: ...

    @property
    def null_class(self) -> int: ...

    @property
    def schedule(self) -> Any: ...

    @property
    def prediction(self) -> Any: ...

    @property
    def context_time(self) -> Any: ...

    @property
    def frames_at_once(self) -> int: ...

    @property
    def cacheable(self) -> bool: ...

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """What the network predicts of all frames.

        Args:
            x: `[B, F, *S]`.
            t: times `[B, F]`.
            labels: int64 `[B]`.

        Returns:
            float32 `[B, F, *S]`.
        """
        ...

    def make_cache(self, batch: int) -> Any:
        """An empty `KVCache` with room for the context and all frames of `batch` rows."""
        ...

    def start(self, labels: Tensor, cache: Any) -> None:
        """Put the context of the labels `[B]` into an empty cache."""
        ...

    def denoise(self, x: Tensor, t: Tensor, cache: Any, keep: int = 0) -> Tensor:
        """What the network predicts of the G frames after those in the cache.

        Args:
            x: `[B, G, *S]`.
            t: times `[B, G]`.
            cache: from `make_cache(B)`, started.
            keep: leading frames of x that are added to the cache, at the times given here.

        Returns:
            float32 `[B, G, *S]`.
        """
        ...


@runtime_checkable
class MaskedModel(Protocol, metaclass=Offers):
    """Gives every place of a sequence of continuous tokens a vector, from the tokens that are visible.

    Attributes:
        token_shape: tokens L and values C of a token.
        null_class: the label that stands for no class, in guidance.
        head: draws a token, given its vector.
    """

    @property
    def token_shape(self) -> tuple[int, int]: ...

    @property
    def null_class(self) -> int: ...

    @property
    def head(self) -> DiffusionHead: ...

    def __call__(self, tokens: Tensor, visible: Tensor, labels: Tensor) -> Tensor:
        """Vectors of all places.

        Args:
            tokens: `[B, L, C]`; those that are not visible are not read.
            visible: int64 `[B, V]`, distinct places.
            labels: int64 `[B]`.

        Returns:
            float32 `[B, L, D]`.
        """
        ...


@runtime_checkable
class TokenModel(Protocol, metaclass=Offers):
    """Predicts one token after the other.

    Attributes:
        vocab_size: tokens that may be drawn; logits may have more columns, which mean nothing.
    """

    @property
    def vocab_size(self) -> int: ...

    def make_cache(self, batch: int, max_length: int) -> Any:
        """An empty cache for `batch` rows of up to `max_length` tokens, padding included."""
        ...

    def prefill(self, ids: Tensor, cache: Any, mask: Tensor | None = None) -> Tensor:
        """Logits of the token after `ids`, which follow what the cache holds and are added to it.

        Args:
            ids: int64 `[B, L]`, L >= 1.
            cache: from `make_cache(B, ...)`.
            mask: bool `[B, L]`, False at padding, which may stand before a row's first token only.

        Returns:
            float32 `[B, V]`, V >= vocab_size.
        """
        ...

    def step(self, ids: Tensor, cache: Any) -> Tensor:
        """`prefill` of one token per row: int64 `[B]` to float32 `[B, V]`."""
        ...


# Parents of drafts: a list, a list for each row, or a tensor.
Parents = Sequence[int] | Sequence[Sequence[int]] | Tensor


class Extended(NamedTuple):
    """What a model says about drafted tokens.

    Attributes:
        logits: float32 `[B, N, V]`, of the token after each draft.
        hidden: `[B, N, C]`, what the logits are computed from; for draft heads.
    """

    logits: Tensor
    hidden: Tensor


@runtime_checkable
class DraftableModel(TokenModel, Protocol):
    """A `TokenModel` that reads several drafted tokens at once and keeps those that are accepted."""

    def extend(self, ids: Tensor, cache: Any, parents: Parents | None = None) -> Extended:
        """Read drafts behind what the cache holds, without counting them in.

        Afterwards `cache.commit` counts in the first of them, or `cache.keep` those on a path.

        Args:
            ids: int64 `[B, N]`.
            cache: from `make_cache(B, ...)`.
            parents: draft i follows draft `parents[i] < i`, or the text for -1, `[N]` or `[B, N]`; None for a chain,
                in which each follows the one before.
        """
        ...


@runtime_checkable
class LatentDecoder(Protocol, metaclass=Offers):
    """Makes images of latents.

    Attributes:
        latent_shape: shape of the latent of one image, None where any size will do.
    """

    @property
    def latent_shape(self) -> tuple[int | None, ...]: ...

    def decode(self, latents: Tensor) -> Tensor:
        """Images `[B, C, H, W]` in [-1, 1], float32, of latents `[B, *latent_shape]` as models draw them."""
        ...
