"""What RoMA's networks that label every pixel share: sizes, maps of four resolutions, the start from pretraining."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from arcore.data.pixels import UNLABELLED
from arcore.nn.kinds import check_kinds
from arcore.zoo.representation.roma.model import RoMA
from arcore.zoo.representation.roma_classifier.model import FourDirectionEncoder, own_name

# Maps of a pyramid, from the finest to the coarsest.
LEVELS = 4


@check_kinds
@dataclass(frozen=True, kw_only=True)
class DenseConfig:
    """Settings of an encoder whose features are read at every place.

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

    Raises:
        ValueError: a size is below 1, or patches do not tile the image.
    """

    embed_dim: int
    depth: int = 12
    num_classes: int = 2
    image_size: int
    patch_size: int = 16
    in_channels: int = 3
    d_state: int = 16
    drop_path: float = 0.1
    dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in ("embed_dim", "depth", "num_classes", "patch_size", "in_channels", "d_state"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} to be at least 1 but got {getattr(self, name)}")
        if self.image_size % self.patch_size or self.image_size < 2 * self.patch_size:
            raise ValueError(
                f"expected image_size to be a multiple of patch_size={self.patch_size}, two patches or more, but got "
                f"{self.image_size}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"expected 0 <= dropout < 1 but got {self.dropout}")

    def encoder(self) -> FourDirectionEncoder:
        """A new encoder of these sizes."""
        return FourDirectionEncoder(
            embed_dim=self.embed_dim,
            depth=self.depth,
            image_size=self.image_size,
            patch_size=self.patch_size,
            in_channels=self.in_channels,
            d_state=self.d_state,
            drop_path=self.drop_path,
        )


class DenseModel(nn.Module):
    """An encoder and its pyramid.

    Args:
        config: settings.
        norm, bias: as `FeaturePyramid` takes them.

    Attributes:
        pictures: how many pictures one item has.
    """

    official_entry = "state_dict"
    pictures = 1

    def __init__(self, config: DenseConfig, *, norm: bool, bias: bool) -> None:
        super().__init__()
        self.backbone = config.encoder()
        self.pyramid = FeaturePyramid(config.embed_dim, norm=norm, bias=bias)

    def start_from(self, pretrained: RoMA) -> None:
        """Take over a pretrained encoder, as `FourDirectionEncoder.start_from` does."""
        self.backbone.start_from(pretrained)

    def from_official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of a published checkpoint under our names; its classifier of whole images is left out."""
        renamed = {}
        for key, value in state.items():
            if key.startswith("backbone.fpn"):
                key = f"pyramid.{key.removeprefix('backbone.').replace('.ln.', '.')}"
            elif key.startswith("backbone."):
                key = f"backbone.{own_name(key.removeprefix('backbone.'))}"
            key = re.sub(r"\.conv\.weight$", ".0.weight", key)
            key = re.sub(r"\.bn\.(\w+)$", r".1.\1", key)
            if not key.startswith("backbone.head."):
                renamed[key] = value
        return renamed


class FeaturePyramid(nn.Module):
    """Maps at 4, 2, 1 and 1/2 times the resolution of the patches, all made from the one map of the last layer.

    Args:
        dim: width C.
        norm: normalise between the two steps to the finest map, as the authors' code for segmentation does and that for
            change detection does not.
        bias: of the last step to each map.
    """

    def __init__(self, dim: int, *, norm: bool, bias: bool) -> None:
        super().__init__()
        between = [ChannelNorm(dim), nn.GELU()] if norm else [nn.GELU()]
        self.fpn1 = nn.Sequential(_doubled(dim), *between, _doubled(dim, bias))
        self.fpn2 = nn.Sequential(_doubled(dim, bias))

    def forward(self, x: Tensor) -> list[Tensor]:
        """`[B, C, G, G]` to four maps, the finest first."""
        return [self.fpn1(x), self.fpn2(x), x, F.max_pool2d(x, 2)]


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of `[B, C, H, W]`."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def _doubled(dim: int, bias: bool = True) -> nn.Module:
    return nn.ConvTranspose2d(dim, dim, 2, stride=2, bias=bias)


def conv_norm_relu(in_channels: int, out_channels: int, kernel_size: int) -> nn.Sequential:
    """A convolution that keeps the size, without bias, then batch norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


def resized(x: Tensor, like: Any) -> Tensor:
    """`[B, C, H, W]` bilinearly at the height and width of `like`, a size or a tensor."""
    size = like.shape[-2:] if isinstance(like, Tensor) else like
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def pixel_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Mean cross entropy of the labelled pixels, 0 where there are none.

    Args:
        logits: float32 `[B, K, H, W]`.
        masks: int64 `[B, H, W]`; `UNLABELLED` does not count.

    Raises:
        ValueError: the shapes do not fit.
    """
    expected = (len(logits), *logits.shape[2:])
    if tuple(masks.shape) != expected:
        raise ValueError(f"expected masks of shape {expected} but got {tuple(masks.shape)}")
    total = F.cross_entropy(logits, masks, ignore_index=UNLABELLED, reduction="sum")
    return total / (masks != UNLABELLED).sum().clamp(min=1)


def init_head(head: nn.Module) -> None:
    """Convolutions that keep the variance through ReLU, and small classifying ones, as the authors' toolbox has it."""
    for name, module in head.named_modules():
        if isinstance(module, nn.Conv2d):
            if name.endswith("conv_seg"):
                nn.init.normal_(module.weight, std=0.01)
            else:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
