"""ACDiT: settings, network, presets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from arcore import masks
from arcore.catalog import preset
from arcore.masks import IntervalMask
from arcore.nn import (
    ClassEmbedding,
    DiTBlock,
    DiTHead,
    KVCache,
    TimestepEmbedding,
    axis_base,
    init_dit,
    rope_table,
)
from arcore.nn.cache import storage_dtype
from arcore.nn.checks import check_floating, check_image_sizes
from arcore.nn.dit import renamed
from arcore.nn.kinds import check_kinds
from arcore.nn.patches import cluster_order, inverse_order, patchify, unpatchify
from arcore.nn.rope import Rope, RopeLayout
from arcore.schedules import Prediction, VPSchedule


@check_kinds
@dataclass(frozen=True, kw_only=True)
class ACDiTConfig:
    """Settings of `ACDiT`. The defaults are those of the paper's 256-pixel image models but for `rope_layout`.

    Attributes:
        depth: transformer blocks.
        embed_dim: width C.
        num_heads: attention heads.
        mlp_ratio: hidden width of the feed-forward network over C.
        num_classes: classes of the data.
        image_size: side of the latent images.
        in_channels: channels of the latent images.
        patch_size: side p of a patch, which is a token.
        frames: frames F of a video; 1 for images.
        block_size: tokens n of a block, from 1 to all. An image's blocks are squares in raster order; a video's are
            runs of tokens, frame after frame.
        rope_layout: arrangement of rotary positions; `"acdit_v0"` loads the released weights, see `arcore.nn.rope`.
        nd_split: shares of the rotary channels of a head that go to the axes (frame, row, column; an image has no
            frames); None is (1, 1) for images and (2, 3, 3) for videos. `"2_3_3"`, as the released trainer has it, is
            read too.
        no_qk_norm: leave out the norms of queries and keys.
        class_drop: share of rows that are trained without their class, for guidance.
        drop_last_clean: leave the clean copy of the last block out of training sequences; changes no result.
        num_steps: diffusion steps of the linear schedule.

    Raises:
        ValueError: a size is below 1, patches do not tile the image, or blocks do not tile the sequence.
    """

    depth: int
    embed_dim: int
    num_heads: int
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    image_size: int = 32
    in_channels: int = 4
    patch_size: int = 1
    frames: int = 1
    block_size: int = 256
    rope_layout: RopeLayout = "blockdiag"
    nd_split: tuple[int, ...] | str | None = None
    no_qk_norm: bool = False
    class_drop: float = 0.1
    drop_last_clean: bool = True
    num_steps: int = 1000

    def __post_init__(self) -> None:
        sizes = ("depth", "embed_dim", "num_heads", "num_classes", "image_size", "in_channels", "patch_size")
        check_image_sizes(self, (*sizes, "frames", "block_size"))
        if self.nd_split is not None:
            object.__setattr__(self, "nd_split", _split(self.nd_split, 2 if self.frames == 1 else 3))
        side = math.isqrt(self.block_size)
        if self.frames == 1 and (side * side != self.block_size or self.side % side):
            raise ValueError(
                f"expected blocks that are squares and tile {self.side} x {self.side} tokens but got "
                f"block_size={self.block_size}; choose one of "
                f"{', '.join(str(s * s) for s in range(1, self.side + 1) if self.side % s == 0)}"
            )
        if self.tokens % self.block_size:
            raise ValueError(
                f"expected block_size to divide the {self.tokens} tokens of {self.frames} frames "
                f"but got block_size={self.block_size}"
            )

    @property
    def side(self) -> int:
        """Patches per side of a frame."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Tokens of all blocks."""
        return self.frames * self.side**2


@check_kinds
class ACDiT(nn.Module):
    """The transformer. A `BlockModel` (`arcore.nn.protocols`).

    Args:
        config: settings.
    """

    official_entry = "model"
    prediction: Prediction = "eps"

    def __init__(self, config: ACDiTConfig) -> None:
        super().__init__()
        self.config = config
        self.null_class = config.num_classes
        self.schedule = VPSchedule("linear", num_steps=config.num_steps)
        self.num_blocks = config.tokens // config.block_size
        dim, values = config.embed_dim, config.patch_size**2 * config.in_channels
        self.block_shape = (config.block_size, values)
        self.mask = masks.skip_causal(
            self.num_blocks, config.block_size, drop_last_clean=config.drop_last_clean
        )
        self.order = _token_order(config)
        self.embed = nn.Linear(values, dim, bias=False)
        self.time_embed = TimestepEmbedding(dim)
        self.class_embed = ClassEmbedding(config.num_classes, dim, drop=config.class_drop)
        self.blocks = nn.ModuleList(
            DiTBlock(
                dim,
                config.num_heads,
                round(dim * config.mlp_ratio),
                norm="rms",
                qk_norm=not config.no_qk_norm,
            )
            for _ in range(config.depth)
        )
        self.rope = _rope(config, self.order)
        self.head = DiTHead(dim, values, norm="rms")
        init_dit(self)
        nn.init.normal_(self.class_embed.weight, std=0.02)

    @check_kinds
    def forward(self, clean: Tensor, noisy: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Predict the noise of every block, each given the clean blocks before it.

        Args:
            clean: the data in blocks `[B, T, n, P]`, see `to_blocks`.
            noisy: the same with noise.
            t: int64 time of each block `[B, T]`.
            labels: int64 `[B]` in [0, num_classes]; num_classes is the null class.

        Returns:
            float32 `[B, T, n, P]`.

        Raises:
            TypeError: an argument has a wrong dtype.
            ValueError: shapes do not fit, or a label or a time is out of range.
        """
        blocks = self.num_blocks
        if clean.dim() != 4 or clean.shape[1:] != (blocks, *self.block_shape) or noisy.shape != clean.shape:
            raise ValueError(
                f"expected clean and noisy blocks of shape {('B', blocks, *self.block_shape)} but got "
                f"{tuple(clean.shape)} and {tuple(noisy.shape)}"
            )
        self._check(noisy, t, labels, (len(clean), blocks), (len(clean),))
        context = blocks - 1 if self.config.drop_last_clean else blocks
        x = torch.cat([clean[:, :context].flatten(1, 2), noisy.flatten(1, 2)], dim=1)
        cond = self.time_embed(t) + self.class_embed(labels).unsqueeze(1)  # [B, T, C]
        rope = self.rope.to(x.device)
        length = self.config.block_size
        both = torch.cat([torch.arange(context * length), torch.arange(blocks * length)]).to(x.device)
        x = self._transform(x, cond, self.mask.to(x.device), rope.rows(both), passive=context * length)
        out = self.head(x[:, context * length :], cond)
        return out.unflatten(1, (blocks, length))

    def make_cache(self, batch: int, copies: int = 1) -> KVCache:
        """An empty cache like the weights, for T - 1 clean blocks and `copies` of a noisy one."""
        config = self.config
        return KVCache(
            num_layers=config.depth,
            batch=batch,
            num_heads=config.num_heads,
            max_length=(self.num_blocks - 1 + copies) * config.block_size,
            head_dim=config.embed_dim // config.num_heads,
            dtype=storage_dtype(self.embed.weight),
            device=self.embed.weight.device,
        )

    def denoise(self, x: Tensor, t: Tensor, labels: Tensor, cache: KVCache) -> tuple[Tensor, Tensor | None]:
        """Predict the noise of the block after those in the cache; arguments and result are those of `BlockModel`.

        Raises:
            TypeError, ValueError: as `forward` does, or all blocks are in the cache.
        """
        batch, copies = x.shape[:2]
        if x.dim() != 4 or x.shape[2:] != self.block_shape:
            raise ValueError(
                f"expected noisy blocks of shape {('B', 'G', *self.block_shape)} but got {tuple(x.shape)}"
            )
        self._check(x, t, labels, (batch, copies), (batch, copies))
        rope = self.rope.to(x.device).rows(self._next_tokens(cache).repeat(copies))
        cond = self.time_embed(t) + self.class_embed(labels.flatten()).unflatten(0, (batch, copies))
        mask = _denoising_mask(cache.length, self.config.block_size, copies).to(x.device)
        hidden = self._transform(x.flatten(1, 2), cond, mask, rope, cache=cache)
        return self.head(hidden, cond).unflatten(1, (copies, -1)), None

    def commit(self, block: Tensor, cache: KVCache) -> None:
        """Add the next clean block `[B, n, P]` to the cache."""
        rope = self.rope.to(block.device).rows(self._next_tokens(cache))
        length = self.config.block_size
        mask = masks.full(length, cache.length + length).to(block.device)
        self._transform(block, None, mask, rope, cache=cache, commit=True)

    def _transform(
        self,
        x: Tensor,
        cond: Tensor | None,
        mask: IntervalMask,
        rope: Rope,
        *,
        passive: int = 0,
        cache: KVCache | None = None,
        commit: bool = False,
    ) -> Tensor:
        x = self.embed(x)
        for layer, block in enumerate(self.blocks):
            x = block(x, cond, mask, passive=passive, rope=rope, cache=cache, layer=layer, commit=commit)
        return x

    def _next_tokens(self, cache: KVCache) -> Tensor:
        start, length = cache.length, self.config.block_size
        if start + length > self.config.tokens:
            raise ValueError(f"all {self.num_blocks} blocks are in the cache: there is no next one")
        return torch.arange(start, start + length, device=cache.keys.device)

    def _check(
        self, x: Tensor, t: Tensor, labels: Tensor, times: tuple[int, ...], classes: tuple[int, ...]
    ) -> None:
        if t.shape != times or labels.shape != classes:
            raise ValueError(
                f"expected times of shape {times} and labels of shape {classes} but got {tuple(t.shape)} and "
                f"{tuple(labels.shape)}"
            )
        check_floating("blocks", x, self.embed.weight, "scale latent images to deviation 1")
        self.schedule.check_times("t", t)

    def to_blocks(self, latents: Tensor) -> Tensor:
        """Latent images `[B, c, H, H]`, or videos `[B, F, c, H, H]`, as blocks `[B, T, n, P]`.

        Raises:
            ValueError: another shape than the config's.
        """
        config = self.config
        frame = (config.in_channels, config.image_size, config.image_size)
        shape = frame if config.frames == 1 else (config.frames, *frame)
        if tuple(latents.shape[1:]) != shape:
            raise ValueError(f"expected latents of shape {('B', *shape)} but got {tuple(latents.shape)}")
        frames = latents.reshape(-1, *frame)
        tokens = patchify(frames, config.patch_size).reshape(len(latents), config.tokens, -1)
        return tokens[:, self.order.to(latents.device)].unflatten(1, (self.num_blocks, -1))

    def to_pixels(self, blocks: Tensor) -> Tensor:
        """The inverse of `to_blocks`; of the first blocks of a video alone, its first frames."""
        config = self.config
        tokens = blocks.flatten(1, 2)
        if config.frames == 1:
            raster = inverse_order(self.order).to(blocks.device)
            return unpatchify(tokens[:, raster], config.patch_size)
        frames = tokens.unflatten(1, (-1, config.side**2))
        return unpatchify(frames.flatten(0, 1), config.patch_size).unflatten(0, frames.shape[:2])

    def from_official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of a published checkpoint under our names. They want `rope_layout="acdit_v0"`."""
        return renamed(state)

    @staticmethod
    def official_settings(args: Mapping[str, Any]) -> dict[str, Any]:
        """What the command line of the released trainer, stored beside the weights, says about the config.

        The number of classes is left out: the released samplers do not take it from there.
        """
        known = {"block_size": "block_size", "num_frames": "frames", "patch_size": "patch_size"}
        settings = {ours: args[theirs] for theirs, ours in known.items() if theirs in args}
        if "vae_latent_size" in args:
            settings["in_channels"] = args["vae_latent_size"]
        if "image_size" in args and "vae_patch_pixels" in args:
            settings["image_size"] = args["image_size"] // args["vae_patch_pixels"]
        if args.get("nd_split") is not None:
            settings["nd_split"] = tuple(int(share) for share in str(args["nd_split"]).split("_"))
        elif "nd_split" in args and "num_frames" in args:
            settings["nd_split"] = (1, 1) if args["num_frames"] == 1 else (2, 3, 3)
        if "no_qk_norm" in args:
            settings["no_qk_norm"] = bool(args["no_qk_norm"])
        return settings

    def setting(self, name: str) -> Any:
        """A field of the config, with the value that None stands for."""
        return _nd_split(self.config) if name == "nd_split" else getattr(self.config, name)


@lru_cache(maxsize=64)
def _denoising_mask(context: int, length: int, copies: int) -> IntervalMask:
    """Each copy of a noisy block sees the context and itself."""
    start = context + torch.arange(copies, device="cpu").repeat_interleave(length) * length
    zeros = torch.zeros_like(start)
    return IntervalMask(
        torch.stack([zeros, zeros + context, start, start + length], dim=1), context + copies * length
    )


def _token_order(config: ACDiTConfig) -> Tensor:
    """Raster position of each token of the sequence."""
    if config.frames > 1:
        return torch.arange(config.tokens, device="cpu")
    return cluster_order(config.side, math.isqrt(config.block_size), torch.device("cpu"))


def _split(shares: Any, axes: int) -> tuple[int, ...]:
    try:
        split = tuple(int(share) for share in (shares.split("_") if isinstance(shares, str) else shares))
    except (TypeError, ValueError):
        split = ()
    if len(split) != axes or min(split) < 1:
        raise ValueError(
            f"expected nd_split to be {axes} shares of at least 1, one per axis, but got {shares!r}"
        )
    return split


def _nd_split(config: ACDiTConfig) -> Any:
    return config.nd_split or ((1, 1) if config.frames == 1 else (2, 3, 3))


def _rope(config: ACDiTConfig, order: Tensor) -> Rope:
    side = config.side
    frame, within = order // side**2, order % side**2
    axes, lengths = [within // side, within % side], [side, side]
    if config.frames > 1:
        axes, lengths = [frame, *axes], [config.frames, *lengths]
    return rope_table(
        torch.stack(axes),
        config.embed_dim // config.num_heads,
        split=list(_nd_split(config)),
        bases=[axis_base(length) for length in lengths],
        layout=config.rope_layout,
        inclusive=True,
    )


@preset
def acdit_tiny() -> ACDiTConfig:
    """8x8 digits in 2x2 patches, 16 tokens in 4 blocks; trains on a CPU in minutes."""
    return ACDiTConfig(
        depth=4,
        embed_dim=96,
        num_heads=3,
        num_classes=10,
        image_size=8,
        in_channels=1,
        patch_size=2,
        block_size=4,
    )


@preset
def acdit_video_tiny() -> ACDiTConfig:
    """8 frames of 16x16 pixels with a moving digit, 4x4 patches, 128 tokens in 4 blocks of 2 frames."""
    return ACDiTConfig(
        depth=4,
        embed_dim=128,
        num_heads=2,
        num_classes=10,
        image_size=16,
        in_channels=1,
        patch_size=4,
        frames=8,
        block_size=32,
    )


def _published(depth: int, heads: int, video: bool = False) -> ACDiTConfig:
    size = ACDiTConfig(depth=depth, embed_dim=64 * heads, num_heads=heads, rope_layout="acdit_v0")
    if not video:
        return size
    return replace(size, num_classes=101, patch_size=2, frames=16, block_size=1024)


@preset
def acdit_b() -> ACDiTConfig:
    """ImageNet, 256 pixels, base, 4 blocks of 16 x 16 tokens."""
    return _published(12, 12)


@preset
def acdit_l() -> ACDiTConfig:
    """ImageNet, 256 pixels, large."""
    return _published(24, 16)


@preset
def acdit_xl() -> ACDiTConfig:
    """ImageNet, 256 pixels, extra large; weights: ACDiT-XL-img.pt."""
    return _published(28, 18)


@preset
def acdit_h() -> ACDiTConfig:
    """ImageNet, 256 pixels, huge; weights: ACDiT-H-img.pt."""
    return _published(32, 20)


@preset
def acdit_video_xl() -> ACDiTConfig:
    """UCF-101, 16 frames of 256 pixels in 4 blocks of 4 frames, extra large; weights: ACDiT-XL-vid.pt."""
    return _published(28, 18, video=True)


@preset
def acdit_video_h() -> ACDiTConfig:
    """UCF-101, 16 frames of 256 pixels in 4 blocks of 4 frames, huge; weights: ACDiT-H-vid.pt."""
    return _published(32, 20, video=True)
