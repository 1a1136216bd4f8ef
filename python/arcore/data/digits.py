"""Real handwritten digits, 8x8 pixels, as shipped inside scikit-learn (the UCI optical recognition set)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from arcore._optional import require
from arcore.data.images import InMemoryImages, check_split, held_out_mask


def load_digits(split: str = "train", *, image_size: int = 8) -> InMemoryImages:
    """Load scikit-learn's 1797 handwritten digits.

    Every fifth image of each class is held out. The 13 writers appear in both parts, so held-out scores say how well
    a model knows these writers' digits and not everyone's.

    Args:
        split: `"train"` (1442 images), `"test"` (355 images) or `"all"`.
        image_size: 8, or a multiple of 16 for models of larger images: the digit at 16 x 16 pixels
            (interpolated linearly), over and over.

    Returns:
        Images `[N, 1, image_size, image_size]`, float32 in [-1, 1] (-1 is background), with labels 0..9. The
        17 grey levels of the data are evenly spaced, 1/8 apart.

    Raises:
        ImportError: scikit-learn is missing.
        ValueError: unknown split, or another `image_size`.
    """
    check_split(split)
    if image_size != 8 and (image_size < 16 or image_size % 16):
        raise ValueError(f"the digits have 8 pixels per side, or any multiple of 16, but not {image_size}")
    bunch = require("sklearn.datasets", extra="train").load_digits()
    images = torch.from_numpy(bunch.images).to(torch.float32).unsqueeze(1) / 8 - 1  # [N, 1, 8, 8]
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    if split != "all":
        chosen = held_out_mask(labels) == (split == "test")
        images, labels = images[chosen], labels[chosen]
    if image_size > 8:
        images = F.interpolate(images, scale_factor=2, mode="bilinear")
        images = images.repeat(1, 1, image_size // 16, image_size // 16)
    return InMemoryImages(images, labels, tuple(str(digit) for digit in range(10)))
