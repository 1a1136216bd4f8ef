"""Windows of pictures with a class for every pixel: random ones for training, ones that cover all for evaluation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from arcore.data.pixels import UNLABELLED, PixelData
from arcore.nn.kinds import check_kinds
from arcore.training.augment import Scale, scaled
from arcore.training.stream import derive_seed


@check_kinds
def enlarged(images: Tensor, masks: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Float pictures `[P, C, H, W]` bilinearly, masks `[H, W]` by the nearest pixel, at `factor` times their size."""
    if factor == 1:
        return images, masks
    height, width = (max(1, round(side * factor)) for side in images.shape[-2:])
    images = F.interpolate(images, size=(height, width), mode="bilinear", align_corners=False)
    grid = masks[None, None].to(torch.float32)
    return images, F.interpolate(grid, size=(height, width), mode="nearest")[0, 0].to(masks.dtype)


@check_kinds
def padded(images: Tensor, masks: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Pictures and masks with a margin below and on the right, so that both sides are at least `size`."""
    height, width = images.shape[-2:]
    margin = (0, max(0, size - width), 0, max(0, size - height))
    return F.pad(images, margin), F.pad(masks, margin, value=UNLABELLED)


@check_kinds
def starts(side: int, size: int, stride: int) -> list[int]:
    """Where windows of `size` begin that cover `side`: every `stride`, the last one at the end."""
    if side <= size:
        return [0]
    return [*range(0, side - size, stride), side - size]


@check_kinds
class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Windows that cover all pictures, for evaluation: each pixel is labelled in one of them.

    Args:
        inner: pictures.
        size: pixels per side.
        scale: of the values, see `scaled`.
        enlarge: factor by which pictures are enlarged first.
    """

    def __init__(self, inner: PixelData, size: int, scale: Scale, enlarge: float = 1.0) -> None:
        self.inner, self.side, self.scale, self.enlarge = inner, size, scale, enlarge
        self._places = [
            (index, top, left)
            for index in range(len(inner))
            for top in starts(max(1, round(inner.size(index)[0] * enlarge)), size, size)
            for left in starts(max(1, round(inner.size(index)[1] * enlarge)), size, size)
        ]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """float32 `[C, S, S]`, or `[2, C, S, S]` of pairs, and int64 `[S, S]`."""
        number, top, left = self._places[index]
        images, masks = self.inner[number]
        images, masks = padded(*enlarged(scaled(images, self.scale), masks, self.enlarge), self.side)
        window = masks[top : top + self.side, left : left + self.side].to(torch.int64)
        # A window at the end overlaps the one before it.
        for axis, start in ((0, top), (1, left)):
            repeated = -start % self.side
            if repeated:
                window = window.index_fill(axis, torch.arange(repeated), UNLABELLED)
        return _one(images[..., top : top + self.side, left : left + self.side]), window


@check_kinds
class RandomWindows(Dataset[tuple[Tensor, Tensor]]):
    """A random window of each picture, changed at random, for training.

    An item is asked for by its place in the stream of a run, which decides its draws.

    Args:
        inner: pictures.
        size: pixels per side.
        scale: of the values, see `scaled`.
        enlarge: factor by which pictures are enlarged first.
        zoom: pictures are scaled by a random factor from `1 / zoom` to `zoom`.
        mirror: mirror half of the windows.
        turn: turn windows by a random number of right angles.
        light: largest random change of brightness, and of contrast, as a share; each picture of a pair has its own.
        seed: decides the draws.
    """

    placed = True

    def __init__(
        self,
        inner: PixelData,
        size: int,
        scale: Scale,
        *,
        enlarge: float = 1.0,
        zoom: float = 1.0,
        mirror: bool = False,
        turn: bool = False,
        light: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.inner, self.side, self.scale, self.enlarge = inner, size, scale, enlarge
        self.zoom, self.mirror, self.turn, self.light, self.seed = zoom, mirror, turn, light, seed

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Item `(index, place in the stream)`: float32 `[C, S, S]`, or `[2, C, S, S]` of pairs, and int64 `[S, S]`."""
        index, place = item
        images, masks = self.inner[index]
        draws = torch.Generator().manual_seed(derive_seed(self.seed, "windows", place))
        share = torch.rand(3, generator=draws).tolist()
        light = 1 + self.light * (2 * torch.rand(2, len(images), 1, 1, 1, generator=draws) - 1)
        mirrored, turns = (int(torch.randint(limit, (), generator=draws)) for limit in (2, 4))
        values = images.to(torch.float32)
        if self.light:
            mean = values.mean(dim=(1, 2, 3), keepdim=True)
            values = (((values - mean) * light[0] + mean) * light[1]).clamp(0, 255)
        factor = self.enlarge * self.zoom ** (2 * share[0] - 1)
        values, masks = padded(*enlarged(scaled(values, self.scale), masks, factor), self.side)
        height, width = masks.shape
        top, left = (
            int(part * (side - self.side + 1)) for part, side in zip(share[1:], (height, width), strict=True)
        )
        values = values[..., top : top + self.side, left : left + self.side]
        masks = masks[top : top + self.side, left : left + self.side]
        if self.mirror and mirrored:
            values, masks = values.flip(-1), masks.flip(-1)
        if self.turn:
            values, masks = values.rot90(turns, (-2, -1)), masks.rot90(turns)
        return _one(values.contiguous()), masks.to(torch.int64).contiguous()


def _one(images: Tensor) -> Tensor:
    return images[0] if len(images) == 1 else images
