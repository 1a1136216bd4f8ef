"""DiT: a transformer that denoises the patches of an image (Peebles and Xie, arXiv:2212.09748).

Patches of a noisy latent image, with fixed sine-cosine positions, pass blocks whose layer norms the time and the class
modulate. The network predicts the noise and, for ancestral sampling, where the variance lies between its bounds.
At initialisation every block is the identity and the output is zero.

Legend: B rows, c channels and H side of the latent image, p patch side, N = (H / p)^2 tokens, C width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from arcore import masks
from arcore.catalog import System, preset
from arcore.catalog.claims import Claim, at_least, equals, shaken
from arcore.nn import (
    ClassEmbedding,
    DiTBlock,
    DiTHead,
    KVCache,
    PatchEmbed,
    TimestepEmbedding,
    init_dit,
    sincos_positions,
)
from arcore.nn.checks import check_floating, check_image_sizes, same_values
from arcore.nn.dit import renamed
from arcore.nn.kinds import check_kinds
from arcore.nn.patches import unpatchify
from arcore.schedules import Prediction, VPSchedule

SYSTEM = System(
    name="dit",
    title="DiT",
    paper="arXiv:2212.09748",
    paper_title="Scalable Diffusion Models with Transformers",
    topic="continuous",
    kind="model",
    model="DiT",
    ops=("block_sparse_attention",),
    recipe="diffusion",
    summary="Class-conditional diffusion transformer on latent images.",
    claim="At initialisation every block is the identity and the predicted noise is exactly zero (adaLN-Zero).",
    checked_on="published layout, random weights",
)


@check_kinds
@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Settings of `DiT`. The defaults are those of the published 256-pixel models.

    Attributes:
        depth: transformer blocks.
        embed_dim: width C, a multiple of 4.
        num_heads: attention heads.
        mlp_ratio: hidden width of the feed-forward network over C.
        num_classes: classes of the data.
        image_size: side H of the latent image.
        in_channels: channels c of the latent image.
        patch_size: side p of a patch.
        learn_sigma: also predict the variance.
        class_drop: share of rows that are trained without their class, for guidance.
        num_steps: diffusion steps of the linear schedule.

    Raises:
        ValueError: a size is below 1, or patches do not tile the image.
    """

    depth: int
    embed_dim: int
    num_heads: int
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    image_size: int = 32
    in_channels: int = 4
    patch_size: int = 2
    learn_sigma: bool = True
    class_drop: float = 0.1
    num_steps: int = 1000

    def __post_init__(self) -> None:
        sizes = ("depth", "embed_dim", "num_heads", "num_classes", "image_size", "in_channels", "patch_size")
        check_image_sizes(self, sizes)


@check_kinds
class DiT(nn.Module):
    """The transformer. A `BlockModel` (`arcore.nn.protocols`) whose only block is the image.

    Args:
        config: settings.
    """

    official_entry = "ema"
    num_blocks = 1
    prediction: Prediction = "eps"

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.null_class = config.num_classes
        self.schedule = VPSchedule("linear", num_steps=config.num_steps)
        dim, side = config.embed_dim, config.image_size // config.patch_size
        self.block_shape = (config.in_channels, config.image_size, config.image_size)
        self.mask = masks.full(side * side, side * side)
        self.positions = sincos_positions(side, dim)
        self.embed = PatchEmbed(config.in_channels, dim, config.patch_size)
        self.time_embed = TimestepEmbedding(dim)
        self.class_embed = ClassEmbedding(config.num_classes, dim, drop=config.class_drop)
        self.blocks = nn.ModuleList(
            DiTBlock(dim, config.num_heads, round(dim * config.mlp_ratio)) for _ in range(config.depth)
        )
        parts = 2 if config.learn_sigma else 1
        self.head = DiTHead(dim, config.patch_size**2 * parts * config.in_channels)
        init_dit(self)
        nn.init.xavier_uniform_(self.embed.proj.weight.data.view(dim, -1))
        nn.init.normal_(self.class_embed.weight, std=0.02)

    @check_kinds
    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Predict the noise, and with `learn_sigma` the variance.

        Args:
            x: noisy latent images `[B, c, H, H]`.
            t: int64 times `[B]`.
            labels: int64 `[B]` in [0, num_classes]; num_classes is the null class.

        Returns:
            float32 `[B, c, H, H]`, or `[B, 2c, H, H]` with the variance in the second half.

        Raises:
            TypeError: an argument has a wrong dtype.
            ValueError: shapes do not fit, or a label or a time is out of range.
        """
        if x.dim() != 4 or x.shape[1:] != self.block_shape or t.shape != x.shape[:1] != labels.shape:
            raise ValueError(
                f"expected images of shape {('B', *self.block_shape)} with times and labels [B] but got "
                f"{tuple(x.shape)}, {tuple(t.shape)} and {tuple(labels.shape)}"
            )
        check_floating("images", x, self.embed.proj.weight, "scale latent images to deviation 1")
        self.schedule.check_times("t", t)
        cond = (self.time_embed(t) + self.class_embed(labels)).unsqueeze(1)  # [B, 1, C]
        hidden = self.embed(x)
        hidden = hidden + self.positions.to(hidden.device, hidden.dtype)
        for block in self.blocks:
            hidden = block(hidden, cond, self.mask.to(x.device))
        return unpatchify(self.head(hidden, cond), self.config.patch_size)

    def make_cache(self, batch: int, copies: int = 1) -> KVCache:
        """A cache without room: there are no earlier blocks."""
        return KVCache(num_layers=1, batch=batch, num_heads=1, max_length=0, head_dim=8)

    def denoise(self, x: Tensor, t: Tensor, labels: Tensor, cache: KVCache) -> tuple[Tensor, Tensor | None]:
        """See `BlockModel`."""
        out = self(x.flatten(0, 1), t.flatten(), labels.flatten()).unflatten(0, x.shape[:2])
        if not self.config.learn_sigma:
            return out, None
        prediction, variance = out.chunk(2, dim=2)
        return prediction, variance

    def commit(self, block: Tensor, cache: KVCache) -> None:
        """See `BlockModel`; an image is complete after its only block."""
        raise ValueError("an image has one block: there is nothing to continue")

    def to_pixels(self, blocks: Tensor) -> Tensor:
        """`[B, 1, c, H, H]`, what decoders return, as images `[B, c, H, H]`."""
        return blocks.squeeze(1)

    def from_official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of a published checkpoint under our names; its fixed positions must be ours and are dropped.

        Raises:
            ValueError: they are not.
        """
        positions = state.get("pos_embed")
        if positions is not None and not same_values(positions, self.positions):
            raise ValueError(
                f"its positions are not those of {self.config.image_size // self.config.patch_size} patches per side"
            )
        return renamed({key: value for key, value in state.items() if key != "pos_embed"})

    @staticmethod
    def official_settings(args: Mapping[str, Any]) -> dict[str, Any]:
        """What the command line of the released trainer, stored beside the weights, says about the config."""
        settings: dict[str, Any] = {}
        if "image_size" in args:
            settings["image_size"] = args["image_size"] // 8
        name = re.fullmatch(r"DiT-(XL|L|B|S)/([248])", str(args.get("model")))
        if name:
            settings["num_heads"] = {"XL": 16, "L": 16, "B": 12, "S": 6}[name[1]]
            settings["patch_size"] = int(name[2])
        return settings


@preset
def dit_tiny() -> DiTConfig:
    """8x8 digits in 2x2 patches, 16 tokens; trains on a CPU in minutes."""
    return DiTConfig(
        depth=4, embed_dim=96, num_heads=3, num_classes=10, image_size=8, in_channels=1, learn_sigma=False
    )


@preset
def dit_s_2() -> DiTConfig:
    """ImageNet, 256 pixels, small, 2x2 patches."""
    return DiTConfig(depth=12, embed_dim=384, num_heads=6)


@preset
def dit_b_2() -> DiTConfig:
    """ImageNet, 256 pixels, base, 2x2 patches."""
    return DiTConfig(depth=12, embed_dim=768, num_heads=12)


@preset
def dit_l_2() -> DiTConfig:
    """ImageNet, 256 pixels, large, 2x2 patches."""
    return DiTConfig(depth=24, embed_dim=1024, num_heads=16)


@preset
def dit_xl_2() -> DiTConfig:
    """ImageNet, 256 pixels, extra large, 2x2 patches; weights: DiT-XL-2-256x256.pt."""
    return DiTConfig(depth=28, embed_dim=1152, num_heads=16)


@preset
def dit_xl_2_512() -> DiTConfig:
    """ImageNet, 512 pixels, extra large, 2x2 patches; weights: DiT-XL-2-512x512.pt."""
    return DiTConfig(depth=28, embed_dim=1152, num_heads=16, image_size=64)


@torch.no_grad()
def claim(*, quick: bool) -> Claim:
    """What fresh blocks add to their input, and what the whole network predicts."""
    added, predicted, later = 0.0, 0.0, 0.0
    for learn_sigma in (False, True):
        for depth in (4,) if quick else (4, 12, 28):
            model = DiT(replace(dit_tiny(), learn_sigma=learn_sigma, depth=depth))
            x, t, labels = torch.randn(2, *model.block_shape), torch.randint(1000, (2,)), torch.arange(2)
            predicted = max(predicted, model(x, t, labels).abs().max().item())
            hidden, cond = torch.randn(2, 16, 96), torch.randn(2, 1, 96)
            for block in model.blocks:
                out = block(hidden, cond, masks.full(16, 16))
                added = max(added, (out - hidden).abs().max().item())
            later = shaken(model)(x, t, labels).abs().max().item()
    return Claim(
        (
            equals("largest value that a fresh block adds", added, 0.0),
            equals("largest value that a fresh network predicts", predicted, 0.0),
            # The comparison can fail: other weights predict something.
            at_least("the same after the weights were moved", later, 0.1),
        )
    )
