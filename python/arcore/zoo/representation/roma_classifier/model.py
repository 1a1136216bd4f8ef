"""RoMA classifier: settings, network, presets."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore.catalog import preset
from arcore.nn import PatchEmbed, PreNormBlock, SelectiveSSM, SwiGLU, init_mamba_encoder
from arcore.nn.checks import check_floating
from arcore.nn.kinds import check_kinds
from arcore.zoo.representation.roma.model import RoMA

# In the order of the published names' suffixes.
_SUFFIXES = ("", "_b", "_c", "_c_b")


@check_kinds
@dataclass(frozen=True, kw_only=True)
class RoMAClassifierConfig:
    """Settings of `RoMAClassifier`. The defaults are those of the published models.

    Attributes:
        embed_dim: width C.
        depth: layers.
        num_classes: classes of the data.
        image_size: pixels per side, a multiple of `patch_size`.
        patch_size: pixels per side of a patch.
        in_channels: of the image.
        d_state: states per channel of the scans.
        drop_path: stochastic depth of the last layer; earlier layers have proportionally less.
        global_pool: classify the mean of the patches instead of the class token.
        probe: normalise features with batch statistics before the head, as linear probing does.

    Raises:
        ValueError: a size is below 1, or patches do not tile the image.
    """

    embed_dim: int
    depth: int = 12
    num_classes: int = 1000
    image_size: int = 224
    patch_size: int = 16
    in_channels: int = 3
    d_state: int = 16
    drop_path: float = 0.1
    global_pool: bool = False
    probe: bool = False

    def __post_init__(self) -> None:
        for name in (
            "embed_dim",
            "depth",
            "num_classes",
            "image_size",
            "patch_size",
            "in_channels",
            "d_state",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} to be at least 1 but got {getattr(self, name)}")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"expected image_size to be a multiple of patch_size={self.patch_size} but got {self.image_size}"
            )

    @property
    def side(self) -> int:
        """Patches per side G."""
        return self.image_size // self.patch_size


def column_order(side: int, device: torch.device | None = None) -> Tensor:
    """Tokens along columns, the class token in the middle as along rows: `x[:, column_order(G)]`.

    Args:
        side: patches per side G.
        device: of the result.

    Returns:
        int64 `[G * G + 1]`, a permutation that is its own inverse.
    """
    patches = torch.arange(side * side, device=device)
    middle = len(patches) // 2
    places = patches + (patches >= middle)
    order = torch.full((len(patches) + 1,), middle, device=device)
    order[places] = places.view(side, side).T.reshape(-1)
    return order


class FourDirectionMixer(nn.Module):
    """Selective scans along rows and columns, forwards and backwards, between shared projections.

    Args:
        dim: width C.
        d_state: states per channel.
    """

    directions: Any

    def __init__(self, dim: int, d_state: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(dim, 2 * dim, bias=False)
        self.directions = nn.ModuleList(
            SelectiveSSM(dim, dt_rank=math.ceil(dim / 16), d_state=d_state) for _ in _SUFFIXES
        )
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, order: Tensor) -> Tensor:
        """`[B, L, C]` to `[B, L, C]`; `order` is `column_order`."""
        rows, rows_back, columns, columns_back = self.directions
        xz = self.in_proj(x)
        u, z = xz.chunk(2, dim=-1)
        along_rows = rows.scan(u, z) + rows_back.scan(u, z, reverse=True)
        # Columns around a class token have no single stride: one gather there, and one back.
        u, z = xz[:, order].chunk(2, dim=-1)
        along_columns = columns.scan(u, z) + columns_back.scan(u, z, reverse=True)
        out: Tensor = self.out_proj((along_rows + along_columns[:, order]) / len(_SUFFIXES))
        return out


class FourDirectionEncoder(nn.Module):
    """Patches and a class token in their middle through layers of four scans, and a final norm.

    Args:
        embed_dim: width C.
        depth: layers.
        image_size: pixels per side, a multiple of `patch_size`.
        patch_size: pixels per side of a patch.
        in_channels: of the image.
        d_state: states per channel of the scans.
        drop_path: stochastic depth of the last layer; earlier layers have proportionally less.
    """

    layers: Any

    def __init__(
        self,
        *,
        embed_dim: int,
        depth: int,
        image_size: int,
        patch_size: int,
        in_channels: int,
        d_state: int,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.side = image_size // patch_size
        self.image_shape = (in_channels, image_size, image_size)
        self.sizes = {
            "embed_dim": embed_dim,
            "depth": depth,
            "patch_size": patch_size,
            "in_channels": in_channels,
            "d_state": d_state,
        }
        self.patch_embed = PatchEmbed(in_channels, embed_dim, patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, self.side**2 + 1, embed_dim))
        self.layers = nn.ModuleList(
            PreNormBlock(
                embed_dim,
                mixer=FourDirectionMixer(embed_dim, d_state),
                mlp=SwiGLU(embed_dim, embed_dim * 8 // 3),
                drop_path=drop_path * max(layer - 1, 0) / max(depth - 1, 1),
            )
            for layer in range(depth)
        )
        self.norm_f = nn.LayerNorm(embed_dim)
        init_mamba_encoder(self.patch_embed, self.layers)
        for table in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(table, std=0.02)

    def tokens(self, images: Tensor) -> Tensor:
        """Images `[B, channels, image_size, image_size]` to `[B, L, C]`, the class token in the middle.

        Raises:
            TypeError: images have a wrong dtype.
            ValueError: shapes do not fit.
        """
        if images.dim() != 4 or tuple(images.shape[1:]) != self.image_shape:
            raise ValueError(
                f"expected images of shape {('B', *self.image_shape)} but got {tuple(images.shape)}"
            )
        check_floating("images", images, self.cls_token, "scale them to [-1, 1]")
        x = self.patch_embed(images)
        middle = x.shape[1] // 2
        token = self.cls_token.to(x.dtype).expand(len(x), -1, -1)
        x = torch.cat([x[:, :middle], token, x[:, middle:]], dim=1) + self.pos_embed
        order = column_order(self.side, x.device)
        for layer in self.layers:
            x = layer(x, order=order)
        out: Tensor = self.norm_f(x)
        return out

    def feature_map(self, images: Tensor) -> Tensor:
        """Images as for `tokens` to the patches' tokens in their places, `[B, C, G, G]`."""
        x = self.tokens(images)
        middle = self.side**2 // 2
        x = torch.cat([x[:, :middle], x[:, middle + 1 :]], dim=1)
        return x.transpose(1, 2).unflatten(2, (self.side, self.side))

    @torch.no_grad()
    def start_from(self, pretrained: RoMA) -> None:
        """Take over a pretrained encoder; class token, final norm and what stands behind it stay as they are.

        Each direction becomes a copy of the one that pretraining had. Positions are interpolated to this image size,
        and the class token's is 0.

        Raises:
            ValueError: width, depth, patches or states differ.
        """
        for name, ours in self.sizes.items():
            theirs = getattr(pretrained.config, name)
            if ours != theirs:
                raise ValueError(f"expected a pretrained model with {name}={ours} but got {theirs}")
        self.patch_embed.load_state_dict(pretrained.patch_embed.state_dict())
        for layer, source in zip(self.layers, pretrained.layers, strict=True):
            state = source.state_dict()
            for key in [key for key in state if re.match(r"mixer\.(?!in_proj|out_proj)", key)]:
                value = state.pop(key)
                state |= {
                    key.replace("mixer.", f"mixer.directions.{k}."): value for k in range(len(_SUFFIXES))
                }
            layer.load_state_dict(state)
        side, new = pretrained.config.side, self.side
        table = pretrained.pos_embed
        if side != new:
            square = table.unflatten(1, (side, side)).permute(0, 3, 1, 2)
            square = F.interpolate(square, size=(new, new), mode="bicubic", align_corners=False)
            table = square.flatten(2).transpose(1, 2)
        middle = table.shape[1] // 2
        token = torch.zeros_like(table[:, :1])
        self.pos_embed.copy_(torch.cat([table[:, :middle], token, table[:, middle:]], dim=1))


@check_kinds
class RoMAClassifier(FourDirectionEncoder):
    """Encoder with a class token, and a linear head.

    Args:
        config: settings.
    """

    official_entry = "model"

    def __init__(self, config: RoMAClassifierConfig) -> None:
        super().__init__(
            embed_dim=config.embed_dim,
            depth=config.depth,
            image_size=config.image_size,
            patch_size=config.patch_size,
            in_channels=config.in_channels,
            d_state=config.d_state,
            drop_path=config.drop_path,
        )
        self.config = config
        head = nn.Linear(config.embed_dim, config.num_classes)
        self.head: nn.Module = (
            nn.Sequential(nn.BatchNorm1d(config.embed_dim, affine=False, eps=1e-6), head)
            if config.probe
            else head
        )
        nn.init.trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)

    def features(self, images: Tensor) -> Tensor:
        """What the head classifies.

        Args:
            images: `[B, channels, image_size, image_size]`.

        Returns:
            `[B, C]`.

        Raises:
            TypeError: images have a wrong dtype.
            ValueError: shapes do not fit.
        """
        x = self.tokens(images)
        middle = self.side**2 // 2
        if self.config.global_pool:
            return (x[:, :middle].mean(dim=1) + x[:, middle + 1 :].mean(dim=1)) / 2
        return x[:, middle]

    @check_kinds
    def forward(self, images: Tensor) -> Tensor:
        """Images as for `features` to float32 logits `[B, num_classes]`."""
        out: Tensor = self.head(self.features(images))
        return out.float()

    def from_official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of a published classifier under our names."""
        return {own_name(key): value for key, value in state.items()}


def own_name(key: str) -> str:
    """The name here of a weight of the authors' four-direction encoder."""
    match = re.fullmatch(r"(layers\.\d+\.mixer\.)(conv1d|x_proj|dt_proj|A|D)(_c_b|_b|_c|)(_log)?(\..+)?", key)
    if match is None:
        return key
    before, name, suffix, log, after = match.groups(default="")
    return f"{before}directions.{_SUFFIXES.index(suffix)}.{name}{log}{after}"


@preset
def roma_classifier_tiny() -> RoMAClassifierConfig:
    """48 x 48 grey pixels in 12 x 12 patches of 4, ten classes; starts from roma_tiny."""
    return RoMAClassifierConfig(
        embed_dim=64, depth=6, num_classes=10, image_size=48, patch_size=4, in_channels=1, drop_path=0.0
    )


@preset
def roma_classifier_tiny_pz16() -> RoMAClassifierConfig:
    """224 pixels, width 192; starts from arm_tiny_pz16."""
    return RoMAClassifierConfig(embed_dim=192)


@preset
def roma_classifier_small_pz16() -> RoMAClassifierConfig:
    """224 pixels, width 384; starts from arm_small_pz16; the authors' code for finetuning calls it arm_tiny_pz16."""
    return RoMAClassifierConfig(embed_dim=384)


@preset
def roma_classifier_w512_pz16() -> RoMAClassifierConfig:
    """224 pixels, width 512: what the authors' code for finetuning calls arm_small_pz16."""
    return RoMAClassifierConfig(embed_dim=512)


@preset
def roma_classifier_base_pz16() -> RoMAClassifierConfig:
    """224 pixels, width 768; starts from arm_base_pz16."""
    return RoMAClassifierConfig(embed_dim=768)


@preset
def roma_classifier_large_pz16() -> RoMAClassifierConfig:
    """224 pixels, width 1024; starts from arm_large_pz16."""
    return RoMAClassifierConfig(embed_dim=1024, depth=24)


@preset
def roma_classifier_huge_pz16() -> RoMAClassifierConfig:
    """224 pixels, width 1536; starts from arm_huge_pz16."""
    return RoMAClassifierConfig(embed_dim=1536, depth=24)
