"""RoMA change detection: settings, head, network, presets."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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


@check_kinds
@dataclass(frozen=True, kw_only=True)
class RoMAChangeConfig(DenseConfig):
    """Settings of `RoMAChange`. The defaults are those of the published models.

    Attributes:
        embed_dim: width C.
        depth: layers.
        num_classes: classes of a pixel; 2 are unchanged and changed.
        image_size: pixels per side, a multiple of `patch_size`, at least two patches.
        patch_size: pixels per side of a patch.
        in_channels: of the image.
        d_state: states per channel of the scans.
        drop_path: stochastic depth of the last layer; earlier layers have proportionally less.
        dropout: share of the feature maps that training leaves out before pixels are classified.
        decoder_channels: widths of the decoder's blocks, each at twice the resolution of the one before; the first
            three see the encoder's maps.

    Raises:
        ValueError: a size is below 1, there are fewer than three blocks, or patches do not tile the image.
    """

    image_size: int = 768
    decoder_channels: tuple[int, ...] = (512, 256, 128, 64)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "decoder_channels", tuple(self.decoder_channels))
        if len(self.decoder_channels) < LEVELS - 1 or min(self.decoder_channels) < 1:
            raise ValueError(
                f"expected decoder_channels to be {LEVELS - 1} widths or more but got {self.decoder_channels}"
            )


class DecoderBlock(nn.Module):
    """Twice the resolution, then two convolutions, beside a finer map where there is one."""

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = conv_norm_relu(in_channels + skip_channels, out_channels, 3)
        self.conv2 = conv_norm_relu(out_channels, out_channels, 3)

    def forward(self, x: Tensor, skip: Tensor | None) -> Tensor:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        if skip is not None:
            x = torch.cat([x, resized(skip, x)], dim=1)
        out: Tensor = self.conv2(self.conv1(x))
        return out


class UNetHead(nn.Module):
    """From the coarsest of four maps to the pixels.

    Args:
        config: settings.
    """

    def __init__(self, config: RoMAChangeConfig) -> None:
        super().__init__()
        widths = config.decoder_channels
        skips = [config.embed_dim] * (LEVELS - 1) + [0] * len(widths)
        self.blocks = nn.ModuleList(
            DecoderBlock(before, skip, width)
            for before, skip, width in zip((config.embed_dim, *widths), skips, widths, strict=False)
        )
        self.dropout = nn.Dropout2d(config.dropout)
        self.conv_seg = nn.Conv2d(widths[-1], config.num_classes, 1)

    def forward(self, maps: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Four maps `[B, C, ., .]`, the finest first, to logits `[B, num_classes, *size]`."""
        *finer, x = maps
        for index, block in enumerate(self.blocks):
            x = block(x, finer[-1 - index] if index < len(finer) else None)
        out: Tensor = self.conv_seg(self.dropout(resized(x, size)))
        return out


@check_kinds
class RoMAChange(DenseModel):
    """Encoder, pyramid and U-Net on the differences of two pictures.

    Args:
        config: settings.
    """

    pictures = 2

    def __init__(self, config: RoMAChangeConfig) -> None:
        # A bias would be the same in both pictures' maps and never reach their difference.
        super().__init__(config, norm=False, bias=False)
        self.config = config
        self.decode_head = UNetHead(config)
        init_head(self.decode_head)

    @check_kinds
    def forward(self, images: Tensor, masks: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Logits of every pixel, and the loss where the changes are known; the order of the pictures does not count.

        Args:
            images: `[B, 2, channels, image_size, image_size]`, before and after.
            masks: int64 `[B, image_size, image_size]`, 1 where something changed; 255 is not labelled.

        Returns:
            Logits, float32 `[B, num_classes, image_size, image_size]`; with masks the mean cross entropy of the
            labelled pixels and the logits.

        Raises:
            TypeError: images have a wrong dtype.
            ValueError: shapes do not fit.
        """
        expected = (self.pictures, *self.backbone.image_shape)
        if images.dim() != 5 or tuple(images.shape[1:]) != expected:
            raise ValueError(f"expected images of shape {('B', *expected)} but got {tuple(images.shape)}")
        # One pass through the encoder for both.
        features = self.backbone.feature_map(images.flatten(0, 1))
        both = [x.unflatten(0, (-1, self.pictures)) for x in self.pyramid(features)]
        differences = [(x[:, 0] - x[:, 1]).abs() for x in both]
        size = (self.config.image_size, self.config.image_size)
        logits: Tensor = self.decode_head(differences, size).float()
        return logits if masks is None else (pixel_loss(logits, masks), logits)

    def from_official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """As `DenseModel.from_official`, without the biases that no difference shows."""
        renamed = super().from_official(state)
        return {key: value for key, value in renamed.items() if key not in _UNSEEN}


_UNSEEN = ("pyramid.fpn1.2.bias", "pyramid.fpn2.0.bias")


@preset
def roma_change_tiny() -> RoMAChangeConfig:
    """48 x 48 grey pixels in 12 x 12 patches of 4; starts from roma_tiny."""
    return RoMAChangeConfig(
        embed_dim=64,
        depth=6,
        image_size=48,
        patch_size=4,
        in_channels=1,
        drop_path=0.0,
        decoder_channels=(64, 32, 16),
    )


@preset
def roma_change_tiny_pz16() -> RoMAChangeConfig:
    """768 pixels, width 192; starts from arm_tiny_pz16."""
    return RoMAChangeConfig(embed_dim=192)


@preset
def roma_change_small_pz16() -> RoMAChangeConfig:
    """768 pixels, width 384; starts from arm_small_pz16; the authors' code for finetuning calls it arm_tiny_pz16."""
    return RoMAChangeConfig(embed_dim=384)


@preset
def roma_change_w512_pz16() -> RoMAChangeConfig:
    """768 pixels, width 512: what the authors' code for finetuning calls arm_small_pz16."""
    return RoMAChangeConfig(embed_dim=512)


@preset
def roma_change_base_pz16() -> RoMAChangeConfig:
    """768 pixels, width 768, as on OSCD; starts from arm_base_pz16."""
    return RoMAChangeConfig(embed_dim=768)


@preset
def roma_change_large_pz16() -> RoMAChangeConfig:
    """768 pixels, width 1024; starts from arm_large_pz16."""
    return RoMAChangeConfig(embed_dim=1024, depth=24)


@preset
def roma_change_huge_pz16() -> RoMAChangeConfig:
    """768 pixels, width 1536; starts from arm_huge_pz16."""
    return RoMAChangeConfig(embed_dim=1536, depth=24)
