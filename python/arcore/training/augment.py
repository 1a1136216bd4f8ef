"""Random changes of training images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset

from arcore.training.stream import derive_seed


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
