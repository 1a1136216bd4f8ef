"""Random changes of training images, and another scale of their values."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset

from arcore.nn.kinds import check_kinds
from arcore.training.stream import derive_seed

# How the bytes of a picture become numbers: [-1, 1], or mean 0 and deviation 1 in each colour of a set of pictures.
Scale = Literal["half", "imagenet", "spacenet"]
# Mean and deviation of bytes. Those of SpaceNet v1 are from the authors' code of RoMA (arXiv:2503.10392).
_COLOURS = {
    "imagenet": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    "spacenet": ((121.826, 106.52838, 78.372116), (56.717068, 44.517075, 40.451515)),
}


@check_kinds
def scaled(images: Tensor, scale: Scale) -> Tensor:
    """Pictures `[..., C, H, W]` of bytes, uint8 or float, as float32 on a scale of values.

    Raises:
        ValueError: that scale is one of colours, and the pictures are grey.
    """
    values = images.to(torch.float32)
    if scale == "half":
        return values / 127.5 - 1
    if images.shape[-3] != 3:
        raise ValueError(
            f"normalize {scale} is for colour pictures, and these have {images.shape[-3]} channel: use half, or give "
            "channels=3"
        )
    mean, deviation = (torch.tensor(part, device=images.device).view(3, 1, 1) for part in _COLOURS[scale])
    return (values - mean) / deviation


@check_kinds
class Augmented(Dataset[tuple[Tensor, int]]):
    """Images of a dataset, mirrored and shifted at random.

    An item is asked for by its place in the stream of a run (`StreamSampler` with `places`), which decides its draws,
    so a resumed run sees the same images.

    Args:
        inner: items `(image, label)`, image `[..., H, W]`.
        flip: mirror half of the images.
        crop: largest shift in pixels along each axis; edges are mirrored.
        seed: decides the draws.
    """

    placed = True

    def __init__(self, inner: Any, *, flip: bool, crop: int, seed: int) -> None:
        side = min(inner.image_shape[-2:])
        if crop >= side:
            raise ValueError(f"crop must be below the image's {side} pixels but got {crop}")
        self.inner, self.flip, self.crop, self.seed = inner, flip, crop, seed

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int]:
        """Item `(index, place in the stream)`."""
        index, place = item
        image, label = self.inner[index]
        draws = torch.Generator().manual_seed(derive_seed(self.seed, "augment", place))
        turned, down, right = (
            int(torch.randint(limit, (), generator=draws))
            for limit in (2, 2 * self.crop + 1, 2 * self.crop + 1)
        )
        if self.flip and turned:
            image = image.flip(-1)
        if self.crop:
            height, width = image.shape[-2:]
            # Reflection wants [N, C, H, W].
            wide = pad(image.reshape(1, -1, height, width), (self.crop,) * 4, mode="reflect")
            wide = wide[..., down : down + height, right : right + width]
            image = wide.reshape(image.shape)
        return image, label


@check_kinds
class Normalized(Dataset[tuple[Tensor, int]]):
    """Colour images with ImageNet's mean 0 and deviation 1 instead of values in [-1, 1], as many encoders want them.

    Args:
        inner: items `(image, label)`, image `[..., 3, H, W]` in [-1, 1].

    Raises:
        ValueError: the images have no three channels.
    """

    mean = (0.485, 0.456, 0.406)
    deviation = (0.229, 0.224, 0.225)

    def __init__(self, inner: Any) -> None:
        if inner.image_shape[-3] != 3:
            raise ValueError(
                f"ImageNet's mean and deviation are those of colour images, and these have {inner.image_shape[-3]} "
                "channel: leave normalize out, or give channels=3"
            )
        self.inner, self.image_shape = inner, inner.image_shape

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.inner[index]
        return normalized(image), label


def normalized(images: Tensor) -> Tensor:
    """Colour images `[..., 3, H, W]` in [-1, 1] with ImageNet's mean 0 and deviation 1."""
    mean, deviation = (
        torch.tensor(values).view(3, 1, 1) for values in (Normalized.mean, Normalized.deviation)
    )
    return ((images + 1) / 2 - mean) / deviation


def denormalized(images: Tensor) -> Tensor:
    """The way back from `normalized`."""
    mean, deviation = (
        torch.tensor(values).view(3, 1, 1) for values in (Normalized.mean, Normalized.deviation)
    )
    return (images * deviation + mean) * 2 - 1
