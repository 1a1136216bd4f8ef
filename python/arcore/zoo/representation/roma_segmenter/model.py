"""RoMA segmentation: settings, head, network, presets."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from arcore.catalog import preset
from arcore.nn.kinds import check_kinds
from arcore.zoo.representation._dense import (
    LEVELS,
    DenseConfig,
    DenseModel,
    conv_norm_relu,
    init_head,
    pixel_loss,
    resized,
)

# The coarsest map is pooled to so many places per side.
POOLED = (1, 2, 3, 6)
# Of the four maps, the one that the auxiliary head reads.
AUXILIARY_LEVEL = 2


@check_kinds
@dataclass(frozen=True, kw_only=True)
class RoMASegmenterConfig(DenseConfig):
    """Settings of `RoMASegmenter`. The defaults are those of the published models.

    Attributes:
        embed_dim: width C.
        depth: layers.
        num_classes: classes of a pixel.
        image_size: pixels per side, a multiple of `patch_size`, at least two patches.
        patch_size: pixels per side of a patch.
        in_channels: of the image.
        d_state: states per channel of the scans.
        drop_path: stochastic depth of the last layer; earlier layers have proportionally less.
        dropout: share of the feature maps that training leaves out before pixels are classified.
        channels: width D of the head.
        auxiliary_channels: width of the auxiliary head.

    Raises:
        ValueError: a size is below 1, or patches do not tile the image.
    """

    image_size: int = 384
    channels: int = 512
    auxiliary_channels: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("channels", "auxiliary_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} to be at least 1 but got {getattr(self, name)}")


class PixelHead(nn.Module):
    """Classifies the pixels of a map."""

    def __init__(self, channels: int, config: DenseConfig) -> None:
        super().__init__()
        self.dropout = nn.Dropout2d(config.dropout)
        self.conv_seg = nn.Conv2d(channels, config.num_classes, 1)

    def classified(self, x: Tensor) -> Tensor:
        """`[B, channels, H, W]` to logits `[B, num_classes, H, W]`."""
        out: Tensor = self.conv_seg(self.dropout(x))
        return out


class UPerHead(PixelHead):
    """UPerNet (arXiv:1807.10221, section 3.1), on maps of one width.

    Args:
        config: settings.
    """

    def __init__(self, config: RoMASegmenterConfig) -> None:
        super().__init__(config.channels, config)
        dim, channels = config.embed_dim, config.channels
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(side), conv_norm_relu(dim, channels, 1)) for side in POOLED
        )
        self.bottleneck = conv_norm_relu(dim + len(POOLED) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(conv_norm_relu(dim, channels, 1) for _ in range(LEVELS - 1))
        self.fpn_convs = nn.ModuleList(conv_norm_relu(channels, channels, 3) for _ in range(LEVELS - 1))
        self.fpn_bottleneck = conv_norm_relu(LEVELS * channels, channels, 3)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Four maps `[B, C, ., .]`, the finest first, to logits at the resolution of the finest."""
        *finer, coarsest = maps
        pooled = [resized(module(coarsest), coarsest) for module in self.psp_modules]
        known: Tensor = self.bottleneck(torch.cat([coarsest, *pooled], dim=1))
        out = [resized(known, maps[0])]
        for x, lateral, smooth in zip(
            reversed(finer), reversed(self.lateral_convs), reversed(self.fpn_convs), strict=True
        ):
            x = lateral(x)
            known = x + resized(known, x)
            out.insert(0, resized(smooth(known), maps[0]))
        return self.classified(self.fpn_bottleneck(torch.cat(out, dim=1)))


class AuxiliaryHead(PixelHead):
    """One convolution on one map, whose loss helps training and which nothing else reads."""

    def __init__(self, config: RoMASegmenterConfig) -> None:
        super().__init__(config.auxiliary_channels, config)
        self.convs = nn.ModuleList([conv_norm_relu(config.embed_dim, config.auxiliary_channels, 3)])

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, G, G]` to logits of the same resolution."""
        return self.classified(self.convs[0](x))


@check_kinds
class RoMASegmenter(DenseModel):
    """Encoder, pyramid, UPerNet and the auxiliary head.

    Args:
        config: settings.
    """

    def __init__(self, config: RoMASegmenterConfig) -> None:
        super().__init__(config, norm=True, bias=True)
        self.config = config
        self.decode_head = UPerHead(config)
        self.auxiliary_head = AuxiliaryHead(config)
        for head in (self.decode_head, self.auxiliary_head):
            init_head(head)

    @check_kinds
    def forward(self, images: Tensor, masks: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Logits of every pixel, and the loss where the classes are known.

        The loss is the cross entropy of the labelled pixels, with 0.4 of the auxiliary head's added. (The authors'
        toolbox divides its sum by all pixels, unlabelled ones too.)

        Args:
            images: `[B, channels, image_size, image_size]`.
            masks: int64 `[B, image_size, image_size]`, classes; 255 is not labelled.

        Returns:
            Logits, float32 `[B, num_classes, image_size, image_size]`; with masks a scalar loss and the logits.

        Raises:
            TypeError: images have a wrong dtype.
            ValueError: shapes do not fit.
        """
        maps = self.pyramid(self.backbone.feature_map(images))
        logits = resized(self.decode_head(maps).float(), images)
        if masks is None:
            return logits
        auxiliary = resized(self.auxiliary_head(maps[AUXILIARY_LEVEL]).float(), images)
        return pixel_loss(logits, masks) + 0.4 * pixel_loss(auxiliary, masks), logits


@preset
def roma_segmenter_tiny() -> RoMASegmenterConfig:
    """48 x 48 grey pixels in 12 x 12 patches of 4; starts from roma_tiny."""
    return RoMASegmenterConfig(
        embed_dim=64,
        depth=6,
        num_classes=11,
        image_size=48,
        patch_size=4,
        in_channels=1,
        drop_path=0.0,
        channels=32,
        auxiliary_channels=32,
    )


@preset
def roma_segmenter_tiny_pz16() -> RoMASegmenterConfig:
    """384 pixels, width 192; starts from arm_tiny_pz16."""
    return RoMASegmenterConfig(embed_dim=192)


@preset
def roma_segmenter_small_pz16() -> RoMASegmenterConfig:
    """384 pixels, width 384; starts from arm_small_pz16; the authors' code for finetuning calls it arm_tiny_pz16."""
    return RoMASegmenterConfig(embed_dim=384)


@preset
def roma_segmenter_w512_pz16() -> RoMASegmenterConfig:
    """384 pixels, width 512: what the authors' code for finetuning calls arm_small_pz16."""
    return RoMASegmenterConfig(embed_dim=512)


@preset
def roma_segmenter_base_pz16() -> RoMASegmenterConfig:
    """384 pixels, width 768, as on SpaceNet v1; starts from arm_base_pz16."""
    return RoMASegmenterConfig(embed_dim=768)


@preset
def roma_segmenter_large_pz16() -> RoMASegmenterConfig:
    """384 pixels, width 1024; starts from arm_large_pz16."""
    return RoMASegmenterConfig(embed_dim=1024, depth=24)


@preset
def roma_segmenter_huge_pz16() -> RoMASegmenterConfig:
    """384 pixels, width 1536; starts from arm_huge_pz16."""
    return RoMASegmenterConfig(embed_dim=1536, depth=24)
