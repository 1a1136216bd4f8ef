"""AR-Diffusion: settings, network, presets."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore import masks
from arcore.catalog import preset
from arcore.masks import IntervalMask
from arcore.nn import ContextEmbedding, DiTBlock, KVCache, TimestepEmbedding, init_dit, sincos_sequence
from arcore.nn.adaln import EPS
from arcore.nn.cache import storage_dtype
from arcore.nn.checks import check_floating, same_values
from arcore.nn.dit import renamed
from arcore.nn.embed import NullContext
from arcore.nn.kinds import check_kinds
from arcore.nn.patches import patchify, unpatchify
from arcore.schedules import Prediction, VPSchedule, fopp_times


@check_kinds
@dataclass(frozen=True, kw_only=True)
class ARDiffusionConfig:
    """Settings of `ARDiffusion`. The sizes are those of the published models; the flags are not, see the presets.

    Attributes:
        depth: transformer blocks.
        embed_dim: width C.
        num_heads: attention heads.
        mlp_ratio: hidden width of the feed-forward network over C.
        num_classes: classes of the data; 1 for data without classes, all of which are class 0.
        frames: frames F, at least 2.
        tokens: tokens n of a frame.
        channels: values P of a token.
        patch_size: side of the square patches of pixels that are the tokens, in raster order; None where tokens come
            from an encoder of frames.
        context_tokens: tokens of a class.
        context_dim: their width before they are mapped to C.
        temporal_causal: context tokens do not see the video. False is the released mask, through which a frame learns
            of later ones in the second block.
        residual_from_normed: see `arcore.nn.DiTBlock`; True in the released models.
        null_context: see `arcore.nn.ContextEmbedding`. The released models without classes are guided by `"zero"`,
            which they never saw in training; those with classes by `"first"`.
        class_drop: share of rows that are trained without their class. The released class models compare a normal
            number with 0.2 instead of a uniform one, which drops 0.579.
        unit_tokens: scale tokens to length 1 in `to_frames` and to 2 in `to_pixels`, as the released models do.
        num_steps: diffusion steps of the schedule, whose betas are linear in their square root.

    Raises:
        ValueError: a size is too small, or tokens are not those of square patches.
    """

    depth: int
    embed_dim: int
    num_heads: int
    mlp_ratio: float = 4.0
    num_classes: int = 1
    frames: int = 16
    tokens: int = 32
    channels: int = 4
    patch_size: int | None = None
    context_tokens: int = 77
    context_dim: int = 768
    temporal_causal: bool = True
    residual_from_normed: bool = False
    null_context: NullContext = "learned"
    class_drop: float = 0.1
    unit_tokens: bool = False
    num_steps: int = 1000

    def __post_init__(self) -> None:
        for name in ("depth", "embed_dim", "num_heads", "tokens", "channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} to be at least 1 but got {getattr(self, name)}")
        if self.frames < 2:
            raise ValueError(f"expected frames to be at least 2 but got {self.frames}")
        if self.patch_size is not None and (
            self.patch_size < 1
            or math.isqrt(self.tokens) ** 2 != self.tokens
            or self.channels % self.patch_size**2
        ):
            raise ValueError(
                f"expected a square number of patches of {self.patch_size} x {self.patch_size} pixels but got "
                f"tokens={self.tokens} and channels={self.channels}"
            )

    @property
    def image_size(self) -> int:
        """Side of a frame in pixels."""
        return math.isqrt(self.tokens) * self._patch()

    @property
    def in_channels(self) -> int:
        """Channels of a frame of pixels."""
        return self.channels // self._patch() ** 2

    def _patch(self) -> int:
        if self.patch_size is None:
            raise ValueError(
                "the model reads tokens of an encoder of frames, which arcore does not have; "
                "ar_diffusion_tiny reads pixels (patch_size)"
            )
        return self.patch_size


@check_kinds
class ARDiffusion(nn.Module):
    """The transformer. A `FrameModel` (`arcore.nn.protocols`), cacheable with `temporal_causal`.

    Args:
        config: settings.
    """

    prediction: Prediction = "x0"

    def __init__(self, config: ARDiffusionConfig) -> None:
        super().__init__()
        self.config = config
        self.schedule = VPSchedule("scaled_linear", num_steps=config.num_steps)
        self.num_frames, self.frame_shape = config.frames, (config.tokens, config.channels)
        self.cacheable = config.temporal_causal
        self.context_time, self.frames_at_once = int(self.schedule.clean), 10
        dim = config.embed_dim
        self.mask = _mask(config)
        self.positions = sincos_sequence(config.frames * config.tokens, dim)
        context = config.num_classes, config.context_tokens, config.context_dim
        self.context = ContextEmbedding(*context, null=config.null_context, drop=config.class_drop)
        self.null_class = self.context.null_class
        self.context_proj = nn.Linear(config.context_dim, dim)
        self.embed = nn.Linear(config.channels, dim)
        self.time_embed = TimestepEmbedding(dim)
        self.blocks = nn.ModuleList(
            DiTBlock(
                dim,
                config.num_heads,
                round(dim * config.mlp_ratio),
                residual_from_normed=config.residual_from_normed,
            )
            for _ in range(config.depth)
        )
        self.head = nn.Linear(dim, config.channels)
        init_dit(self)
        nn.init.zeros_(self.head.weight)

    @check_kinds
    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Predict the clean frames.

        Args:
            x: noisy frames `[B, F, n, P]`, see `to_frames`.
            t: int64 time of each frame `[B, F]`; -1, clean, is read as 0, the least noise of training.
            labels: int64 `[B]` in [0, num_classes]; num_classes is the null class (and 0 too where `null_context` is
                `"first"`).

        Returns:
            float32 `[B, F, n, P]`.

        Raises:
            TypeError: an argument has a wrong dtype.
            ValueError: shapes do not fit, or a label or a time is out of range.
        """
        self._check(x, t, self.num_frames)
        if labels.shape != x.shape[:1]:
            raise ValueError(f"expected labels of shape {(len(x),)} but got {tuple(labels.shape)}")
        passive = self.config.context_tokens
        hidden = torch.cat([self.context_proj(self.context(labels)), self._embed(x)], dim=1)
        hidden = self._transform(hidden, t, self.mask.to(x.device), passive=passive)
        return self._predict(hidden[:, passive:], x)

    def make_cache(self, batch: int) -> KVCache:
        """An empty cache like the weights, for the context and all frames."""
        config = self.config
        return KVCache(
            num_layers=config.depth,
            batch=batch,
            num_heads=config.num_heads,
            max_length=config.context_tokens + config.frames * config.tokens,
            head_dim=config.embed_dim // config.num_heads,
            dtype=storage_dtype(self.embed.weight),
            device=self.embed.weight.device,
        )

    def start(self, labels: Tensor, cache: KVCache) -> None:
        """See `FrameModel`.

        Raises:
            ValueError: the mask is the released one, under which nothing can be cached, or the cache is not empty.
        """
        if not self.cacheable:
            raise ValueError("the context sees all frames: to cache anything, use temporal_causal=True")
        if cache.length:
            raise ValueError(f"expected an empty cache but it holds {cache.length} tokens")
        tokens = self.config.context_tokens
        mask = masks.full(tokens, tokens).to(labels.device)
        self._transform(self.context_proj(self.context(labels)), None, mask, cache=cache, commit=True)

    def denoise(self, x: Tensor, t: Tensor, cache: KVCache, keep: int = 0) -> Tensor:
        """See `FrameModel`.

        Raises:
            TypeError, ValueError: as `forward` does, or more frames than are left, or `keep` is out of range.
        """
        config, count = self.config, x.shape[1]
        known = (cache.length - config.context_tokens) // config.tokens
        if cache.length < config.context_tokens or known + count > config.frames:
            raise ValueError(
                f"expected a cache that `start` has begun, and at most {config.frames} frames, but {cache.length} "
                f"tokens are in the cache and {count} frames follow"
            )
        if not 0 <= keep <= count:
            raise ValueError(f"expected keep from 0 to {count} but got {keep}")
        self._check(x, t, count)
        before, after = cache.length, cache.length + count * config.tokens
        mask = _rows(self.mask, before, after, after).to(x.device)
        hidden = self._transform(self._embed(x, known), t, mask, cache=cache, commit=keep > 0)
        if keep:
            cache.truncate(before + keep * config.tokens)
        return self._predict(hidden, x)

    def _embed(self, x: Tensor, first: int = 0) -> Tensor:
        tokens: Tensor = self.embed(x.flatten(1, 2))
        start = first * self.config.tokens
        return tokens + self.positions[:, start : start + tokens.shape[1]].to(tokens.device, tokens.dtype)

    def _transform(
        self,
        hidden: Tensor,
        t: Tensor | None,
        mask: IntervalMask,
        *,
        passive: int = 0,
        cache: KVCache | None = None,
        commit: bool = False,
    ) -> Tensor:
        cond = None if t is None else self.time_embed(t.clamp(min=0))
        for layer, block in enumerate(self.blocks):
            hidden = block(hidden, cond, mask, passive=passive, cache=cache, layer=layer, commit=commit)
        return hidden

    def _predict(self, hidden: Tensor, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            hidden = hidden.to(self.head.weight.dtype)
            out: Tensor = self.head(F.layer_norm(hidden, hidden.shape[-1:], eps=EPS))
        return out.float().view(x.shape)

    def _check(self, x: Tensor, t: Tensor, frames: int) -> None:
        if x.dim() != 4 or x.shape[1:] != (frames, *self.frame_shape) or t.shape != x.shape[:2]:
            raise ValueError(
                f"expected frames of shape {('B', frames, *self.frame_shape)} with a time each but got "
                f"{tuple(x.shape)} and times of shape {tuple(t.shape)}"
            )
        check_floating("frames", x, self.embed.weight, "scale them to deviation 1")
        self.schedule.check_times("t", t)

    def training_times(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """Times to train on, int64 `[B, F]` on the weights' device, non-decreasing from frame to frame."""
        device = self.embed.weight.device
        return fopp_times(batch, self.num_frames, self.config.num_steps, device=device, generator=generator)

    def to_frames(self, videos: Tensor) -> Tensor:
        """Videos `[B, F, c, H, H]`, or frames of an encoder's tokens `[B, F, n, P]`, as frames of tokens.

        Raises:
            ValueError: another shape than the config's.
        """
        config = self.config
        shape: tuple[int, ...] = self.frame_shape
        if config.patch_size is not None:
            shape = (config.in_channels, config.image_size, config.image_size)
        if tuple(videos.shape[2:]) != shape:
            raise ValueError(f"expected videos of shape {('B', 'F', *shape)} but got {tuple(videos.shape)}")
        tokens = videos
        if config.patch_size is not None:
            tokens = patchify(videos.flatten(0, 1), config.patch_size).unflatten(0, videos.shape[:2])
        return F.normalize(tokens, dim=-1) if config.unit_tokens else tokens

    def to_pixels(self, frames: Tensor) -> Tensor:
        """The inverse of `to_frames`, but for the length of tokens with `unit_tokens`; any number of frames."""
        if self.config.unit_tokens:
            frames = 2 * frames
        if self.config.patch_size is None:
            return frames
        return unpatchify(frames.flatten(0, 1), self.config.patch_size).unflatten(0, frames.shape[:2])

    def from_official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of a published checkpoint under our names.

        The autoencoder's weights and the tables of the diffusion are dropped; positions and betas must be ours.

        Raises:
            ValueError: they are not.
        """
        ours = {}
        for key, value in state.items():
            if key.startswith("vae.") or _TABLES.fullmatch(key):
                continue
            for pattern, name in _OFFICIAL_NAMES:
                key = re.sub(pattern, name, key)
            ours[key] = value.unsqueeze(0) if key == "context.weight" and value.dim() == 2 else value
        tables = {
            "positions": (ours.pop("pos_embed", None), self.positions),
            "betas": (state.get("diffusion_model.betas"), self.schedule.betas.float()),
        }
        for what, (theirs, own) in tables.items():
            if theirs is not None and not same_values(theirs, own):
                raise ValueError(
                    f"its {what} are not those of {self.num_frames} frames and {self.config.num_steps} steps"
                )
        return renamed(ours)


# Published checkpoints hold these too; all follow from the betas.
_TABLES = re.compile(
    r"diffusion_model\.(betas|logvar|posterior_(variance|log_variance_clipped|mean_coef[12])|alphas_cumprod(_prev)?"
    r"|(sqrt|(sqrt|log)_one_minus|sqrt_recip(m1)?)_alphas_cumprod)"
)
_OFFICIAL_NAMES = (
    (r"^(diffusion_model\.)?model\.", ""),
    (r"^final_layer\.1\.", "head."),
    (r"^c_embedder\.", "context_proj."),
    (r"^(context|class)_emb$", "context.weight"),
)


def _mask(config: ARDiffusionConfig) -> IntervalMask:
    context, total = config.context_tokens, config.frames * config.tokens
    causal = masks.block_causal([context, *[config.tokens] * config.frames])
    if config.temporal_causal:
        return causal
    everything = torch.tensor([[0, context + total]] * context + [[0, 0]] * total, device="cpu")
    return causal | IntervalMask(everything, context + total)


# The same rows come in every iteration of sampling; a mask keeps what the op plans for it.
_rows = lru_cache(maxsize=64)(IntervalMask.rows)


@preset
def ar_diffusion_tiny() -> ARDiffusionConfig:
    """8 frames of 16x16 pixels with a moving digit, 16 tokens each; for tests and a CPU."""
    return ARDiffusionConfig(
        depth=4,
        embed_dim=128,
        num_heads=2,
        num_classes=10,
        frames=8,
        tokens=16,
        channels=16,
        patch_size=4,
        context_tokens=4,
        context_dim=32,
    )


def _published(**settings: Any) -> ARDiffusionConfig:
    released: Any = {"temporal_causal": False, "residual_from_normed": True, "unit_tokens": True}
    return ARDiffusionConfig(depth=28, embed_dim=1152, num_heads=16, **released, **settings)


@preset
def ar_diffusion_xl() -> ARDiffusionConfig:
    """Released size and flags, 16 frames of 32 tokens, no classes; weights: FaceForensics, SkyTimelapse, TaiChi."""
    return _published(null_context="zero", class_drop=0.0)


@preset
def ar_diffusion_xl_ucf101() -> ARDiffusionConfig:
    """Released size and flags, 16 frames of 32 tokens, 101 classes; weights: UCF-101."""
    return _published(num_classes=101, null_context="first", class_drop=0.579)
