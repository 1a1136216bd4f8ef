"""MAR: masked autoregression over continuous tokens with a diffusion head (Li et al., arXiv:2406.11838).

Tokens of a latent image come in random order, several at a time. An encoder reads those that are there, and only those;
a decoder sees them at their places, with a learned vector at the places that are missing, and gives each place a vector
z; a small network turns noise into a token there, given z (`arcore.nn.DiffusionHead`). Attention is bidirectional.

The class enters as `buffer_size` copies of its embedding in front, which are never masked.

Legend: B rows, L tokens, C values per token, V visible tokens, D width.

Left out: dropout of attention weights, 0.1 in the published training; dropout after projections is there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from arcore import masks
from arcore.catalog import System, preset
from arcore.catalog.claims import Claim, at_least, at_most, steps
from arcore.masks import IntervalMask
from arcore.nn import MLP, ClassEmbedding, DiffusionHead, DiTAttention
from arcore.nn.adaln import EPS
from arcore.nn.checks import check_floating, check_ids, check_image_sizes
from arcore.nn.kinds import check_kinds
from arcore.nn.patches import patchify, unpatchify
from arcore.objectives import diffusion_head_loss
from arcore.schedules import DDIM, Prediction, VPSchedule

SYSTEM = System(
    name="mar",
    title="MAR",
    paper="arXiv:2406.11838",
    paper_title="Autoregressive Image Generation without Vector Quantization",
    topic="continuous",
    kind="model",
    model="MAR",
    ops=("block_sparse_attention",),
    recipe="masked_autoregressive",
    summary="Class-conditional image generator over continuous tokens in random order, with a diffusion head.",
    claim=(
        "Where a token has two modes, the diffusion head draws both; the best mean-squared-error head "
        "is far off."
    ),
    checked_on="synthetic data",
)


@check_kinds
@dataclass(frozen=True, kw_only=True)
class MARConfig:
    """Settings of `MAR`. The defaults are those of the published 256-pixel models.

    Attributes:
        depth: transformer blocks of the encoder, and as many of the decoder.
        embed_dim: width D.
        num_heads: attention heads.
        head_width: of the diffusion head.
        head_depth: residual blocks of the diffusion head.
        mlp_ratio: hidden width of the feed-forward network over D.
        num_classes: classes of the data.
        image_size: side of the latent images.
        in_channels: channels of the latent images.
        patch_size: side of a patch, which is a token.
        buffer_size: copies of the class embedding.
        class_drop: share of rows that are trained without their class, for guidance.
        dropout: after projections of attention and feed-forward network.
        prediction: what the head predicts; `"eps"` for the published weights, see `arcore.schedules`.
        learn_variance: the head predicts the variance too.
        num_steps: diffusion steps of the cosine schedule.

    Raises:
        ValueError: a size is below 1, or patches do not tile the image.
    """

    depth: int
    embed_dim: int
    num_heads: int
    head_width: int
    head_depth: int
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    image_size: int = 16
    in_channels: int = 16
    patch_size: int = 1
    buffer_size: int = 64
    class_drop: float = 0.1
    dropout: float = 0.1
    prediction: Prediction = "eps"
    learn_variance: bool = True
    num_steps: int = 1000

    def __post_init__(self) -> None:
        sizes = ("depth", "embed_dim", "num_heads", "head_width", "head_depth", "num_classes", "image_size")
        check_image_sizes(self, (*sizes, "in_channels", "patch_size", "buffer_size"))

    @property
    def tokens(self) -> int:
        """Tokens L of an image."""
        return (self.image_size // self.patch_size) ** 2


class _Block(nn.Module):
    """Pre-norm transformer block of the vision transformer, bidirectional."""

    def __init__(self, config: MARConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=EPS), nn.LayerNorm(dim, eps=EPS)
        self.attn = DiTAttention(dim, config.num_heads)
        self.mlp = MLP(dim, round(dim * config.mlp_ratio), approximate="none")
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: IntervalMask) -> Tensor:
        x = x + self.dropout(self.attn(self.norm1(x), mask))
        out: Tensor = x + self.dropout(self.mlp(self.norm2(x)))
        return out


@check_kinds
class MAR(nn.Module):
    """The transformer and its head. A `MaskedModel` (`arcore.nn.protocols`).

    Args:
        config: settings.
    """

    official_entry = "model_ema"

    def __init__(self, config: MARConfig) -> None:
        super().__init__()
        self.config = config
        self.null_class = config.num_classes
        self.token_shape = (config.tokens, config.patch_size**2 * config.in_channels)
        dim, (length, channels) = config.embed_dim, self.token_shape
        # By the number of visible tokens; the decoder sees all places.
        lengths = range(config.buffer_size, config.buffer_size + length + 1)
        self.masks = tuple(masks.full(n, n) for n in lengths)
        self.class_embed = ClassEmbedding(config.num_classes, dim, drop=config.class_drop)
        self.embed = nn.Linear(channels, dim)
        self.embed_norm = nn.LayerNorm(dim, eps=EPS)
        self.encoder_positions = nn.Parameter(torch.empty(1, config.buffer_size + length, dim))
        self.encoder_blocks = nn.ModuleList(_Block(config) for _ in range(config.depth))
        self.encoder_norm = nn.LayerNorm(dim, eps=EPS)
        self.decoder_embed = nn.Linear(dim, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.decoder_positions = nn.Parameter(torch.empty(1, config.buffer_size + length, dim))
        self.decoder_blocks = nn.ModuleList(_Block(config) for _ in range(config.depth))
        self.decoder_norm = nn.LayerNorm(dim, eps=EPS)
        self.head_positions = nn.Parameter(torch.empty(1, length, dim))
        self._init_weights()
        self.head = DiffusionHead(
            channels,
            dim,
            config.head_width,
            config.head_depth,
            schedule=VPSchedule("cosine", num_steps=config.num_steps),
            prediction=config.prediction,
            learn_variance=config.learn_variance,
        )

    @torch.no_grad()
    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                module.bias.zero_()
        for table in (
            self.class_embed.weight,
            self.encoder_positions,
            self.mask_token,
            self.decoder_positions,
            self.head_positions,
        ):
            nn.init.normal_(table, std=0.02)

    def shard_units(self) -> list[nn.Module]:
        """Parts whose weights are gathered one after the other where they are sharded over processes."""
        return [*self.encoder_blocks, *self.decoder_blocks, self.head]

    @check_kinds
    def forward(self, tokens: Tensor, visible: Tensor, labels: Tensor) -> Tensor:
        """The vector z of every place, from the visible tokens.

        Args:
            tokens: `[B, L, C]`; what stands at places that are not visible is not read.
            visible: int64 `[B, V]`, distinct places, as many in every row.
            labels: int64 `[B]` in [0, num_classes]; num_classes is the null class.

        Returns:
            float32 `[B, L, D]`.

        Raises:
            TypeError: an argument has a wrong dtype.
            ValueError: shapes do not fit, or a place or a label is out of range.
        """
        if tokens.dim() != 3 or tokens.shape[1:] != self.token_shape:
            raise ValueError(
                f"expected tokens of shape {('B', *self.token_shape)} but got {tuple(tokens.shape)}"
            )
        if (
            visible.dim() != 2
            or visible.shape[1] > tokens.shape[1]
            or not len(visible) == len(tokens) == len(labels)
        ):
            raise ValueError(
                f"expected visible places and labels for {len(tokens)} rows but got {tuple(visible.shape)} and "
                f"{tuple(labels.shape)}"
            )
        check_floating("tokens", tokens, self.embed.weight, "scale latent images to deviation 1")
        check_ids("visible places", visible, self.config.tokens)
        return self._decode(self._encode(tokens, visible, labels), visible)

    def _encode(self, tokens: Tensor, visible: Tensor, labels: Tensor) -> Tensor:
        """`[B, buffer_size + V, D]`: the buffer, then the visible tokens."""
        buffer = self.config.buffer_size
        cond = self.class_embed(labels).unsqueeze(1).expand(-1, buffer, -1)
        seen = self.embed(_at(tokens, visible))
        positions = self.encoder_positions.expand(len(tokens), -1, -1)
        x = torch.cat([cond + positions[:, :buffer], seen + _at(positions[:, buffer:], visible)], dim=1)
        x = self.embed_norm(x)
        mask = self.masks[visible.shape[1]].to(x.device)
        for block in self.encoder_blocks:
            x = block(x, mask)
        out: Tensor = self.encoder_norm(x)
        return out

    def _decode(self, x: Tensor, visible: Tensor) -> Tensor:
        buffer, length = self.config.buffer_size, self.config.tokens
        x = self.decoder_embed(x)
        grid = self.mask_token.to(x.dtype).expand(len(x), length, -1)
        grid = grid.scatter(1, visible.unsqueeze(-1).expand(-1, -1, x.shape[-1]), x[:, buffer:])
        x = torch.cat([x[:, :buffer], grid], dim=1) + self.decoder_positions
        mask = self.masks[length].to(x.device)
        for block in self.decoder_blocks:
            x = block(x, mask)
        z: Tensor = self.decoder_norm(x)[:, buffer:] + self.head_positions
        return z.float()

    def to_tokens(self, latents: Tensor) -> Tensor:
        """Latent images `[B, c, H, H]` as tokens `[B, L, C]` in raster order."""
        config = self.config
        frame = (config.in_channels, config.image_size, config.image_size)
        if tuple(latents.shape[1:]) != frame:
            raise ValueError(f"expected latents of shape {('B', *frame)} but got {tuple(latents.shape)}")
        return patchify(latents, config.patch_size)

    def to_pixels(self, tokens: Tensor) -> Tensor:
        """The inverse of `to_tokens`."""
        return unpatchify(tokens, self.config.patch_size)

    def from_official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of a published checkpoint under our names. Their null class is a vector apart; ours is the last row.

        Raises:
            ValueError: there is no null class.
        """
        ours = {}
        for key, value in state.items():
            for pattern, name in _OFFICIAL_NAMES:
                key = re.sub(pattern, name, key)
            ours[key] = value
        null = ours.pop("fake_latent", None)
        if "class_embed.weight" in ours:
            if null is None:
                raise ValueError("they have no fake_latent, the vector of the null class")
            ours["class_embed.weight"] = torch.cat([ours["class_embed.weight"], null])
        return ours

    @staticmethod
    def official_settings(args: Mapping[str, Any]) -> dict[str, Any]:
        """What the command line of the released trainer, stored beside the weights, says about the config."""
        known = {
            "patch_size": "patch_size",
            "vae_embed_dim": "in_channels",
            "buffer_size": "buffer_size",
            "class_num": "num_classes",
            "diffloss_d": "head_depth",
            "diffloss_w": "head_width",
        }
        settings = {ours: args[theirs] for theirs, ours in known.items() if theirs in args}
        if "img_size" in args and "vae_stride" in args:
            settings["image_size"] = args["img_size"] // args["vae_stride"]
        heads = {"mar_base": 12, "mar_large": 16, "mar_huge": 16}
        if args.get("model") in heads:
            settings["num_heads"] = heads[args["model"]]
        return settings


def _at(x: Tensor, places: Tensor) -> Tensor:
    """`[B, L, C]` at `[B, V]` to `[B, V, C]`."""
    return x.gather(1, places.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


_OFFICIAL_NAMES = (
    (r"^class_emb\.", "class_embed."),
    (r"^z_proj\.", "embed."),
    (r"^z_proj_ln\.", "embed_norm."),
    (r"^encoder_pos_embed_learned$", "encoder_positions"),
    (r"^decoder_pos_embed_learned$", "decoder_positions"),
    (r"^diffusion_pos_embed_learned$", "head_positions"),
    (r"^diffloss\.net\.", "head."),
    (r"^head\.time_embed\.mlp\.0\.", "head.time_embed.fc1."),
    (r"^head\.time_embed\.mlp\.2\.", "head.time_embed.fc2."),
    (r"^head\.res_blocks\.", "head.blocks."),
    (r"^(head\.blocks\.\d+)\.in_ln\.", r"\1.norm."),
    (r"^(head\.blocks\.\d+)\.mlp\.0\.", r"\1.fc1."),
    (r"^(head\.blocks\.\d+)\.mlp\.2\.", r"\1.fc2."),
    (r"^head\.final_layer\.linear\.", "head.out."),
    (r"^head\.final_layer\.adaLN_modulation\.1\.", "head.modulation."),
    (r"^(head\.blocks\.\d+)\.adaLN_modulation\.1\.", r"\1.modulation."),
)


@preset
def mar_tiny() -> MARConfig:
    """8x8 digits in 2x2 patches, 16 tokens; trains on a CPU in minutes."""
    return MARConfig(
        depth=2,
        embed_dim=96,
        num_heads=3,
        head_width=128,
        head_depth=3,
        num_classes=10,
        image_size=8,
        in_channels=1,
        patch_size=2,
        buffer_size=4,
        dropout=0.0,
        prediction="v",
        learn_variance=False,
    )


@preset
def mar_b() -> MARConfig:
    """ImageNet, 256 pixels, base; weights: mar_base/checkpoint-last.pth."""
    return MARConfig(depth=12, embed_dim=768, num_heads=12, head_width=1024, head_depth=6)


@preset
def mar_l() -> MARConfig:
    """ImageNet, 256 pixels, large; weights: mar_large/checkpoint-last.pth."""
    return MARConfig(depth=16, embed_dim=1024, num_heads=16, head_width=1280, head_depth=8)


@preset
def mar_h() -> MARConfig:
    """ImageNet, 256 pixels, huge; weights: mar_huge/checkpoint-last.pth."""
    return MARConfig(depth=20, embed_dim=1280, num_heads=16, head_width=1536, head_depth=12)


def claim(*, quick: bool) -> Claim:
    """Four conditions, each with two modes in the plane: the mean lies between the modes, where there is no data."""
    generator = torch.Generator().manual_seed(0)
    conditions = torch.eye(4)
    centres = torch.tensor([[2.0, 0.0], [0.0, 2.0], [1.5, 1.5], [-1.5, 1.5]])
    count, batch, lr, points, depth = (300, 96, 1e-2, 25, 2) if quick else (4000, 128, 2e-3, 50, 3)

    def draw(kinds: Tensor) -> Tensor:
        side = torch.randint(2, (len(kinds), 1), generator=generator) * 2 - 1
        return side * centres[kinds] + 0.1 * torch.randn(len(kinds), 2, generator=generator)

    schedule = VPSchedule("cosine")
    head = DiffusionHead(2, 4, 64, depth, schedule=schedule)
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, fused=True)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, count)
    for _ in steps(count, "training"):
        kinds = torch.randint(4, (batch,), generator=generator)
        loss, _ = diffusion_head_loss(head, draw(kinds), conditions[kinds], repeats=2, generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    times, solver = schedule.grid(points, "linspace"), DDIM(schedule, "v", eta=1.0)
    distances, regression, shown = [], [], []
    for kind in range(4):
        kinds = torch.full((500,), kind)
        data, noise = draw(kinds), torch.randn(points, 500, 2, generator=generator)
        samples = head.sample(conditions[kinds], noise, solver=solver, times=times)
        distances.append(_energy_distance(samples, data))
        # The best that a head trained by mean squared error can do: the mean of the data.
        mean = draw(kinds).mean(0)
        regression.append(_energy_distance(mean.expand(500, 2), data))
        shown.append((data, samples, mean))

    def picture(figure: Any) -> None:
        for place, (data, samples, mean) in enumerate(shown):
            axes = figure.add_subplot(1, 4, place + 1, aspect="equal")
            axes.scatter(*data.T.tolist(), s=2, color="0.75", label="data")
            axes.scatter(*samples.T.tolist(), s=2, label="diffusion head")
            axes.scatter(*mean.tolist(), marker="x", color="C3", label="best regression")
            axes.set(xlim=(-3, 3), ylim=(-3, 3), title=f"condition {place}")
        axes.legend(fontsize=7, loc="lower right")

    return Claim(
        (
            at_most("energy distance of the head's samples to data, worst condition", max(distances), 0.05),
            at_least("that of the best regression, best condition", min(regression), 0.5),
        ),
        draw=picture,
        size=(12.0, 3.2),
    )


def _energy_distance(a: Tensor, b: Tensor) -> float:
    within = [torch.cdist(one, one).sum() / (len(one) * (len(one) - 1)) for one in (a, b)]
    return float(2 * torch.cdist(a, b).mean() - within[0] - within[1])
