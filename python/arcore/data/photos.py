"""Crops of the two real photographs that scikit-learn ships: a temple in China and a flower, 427 x 640 pixels."""

from __future__ import annotations

import torch

from arcore._optional import require
from arcore.data.images import InMemoryImages, check_split
from arcore.data.real.files import package_file
from arcore.nn.checks import check_whole

# Crops overlap by half. The right fifth of each photograph is held out, and no training crop touches it.
HELD_OUT = 0.2


def load_photos(split: str = "train", *, image_size: int = 48, channels: int = 3) -> InMemoryImages:
    """Load square crops of scikit-learn's two sample photographs.

    Args:
        split: `"train"`, `"test"` (crops of the right fifth of each photograph) or `"all"` (both).
        image_size: side length in pixels, at most 128, the width of the held-out part.
        channels: 1 (grey, the mean of the colours) or 3 (RGB).

    Returns:
        Images `[N, channels, image_size, image_size]`, float32 in [-1, 1], with labels 0 (china) and 1 (flower).

    Raises:
        ImportError: scikit-learn or Pillow is missing.
        ValueError: unknown split, or a size or number of channels that there is none of.
    """
    check_split(split)
    image_size = check_whole("image_size", image_size, 0, "pixels")
    if isinstance(channels, bool) or channels not in (1, 3) or not 2 <= image_size <= 128:
        raise ValueError(
            f"expected 1 or 3 channels and an image_size from 2 to 128 but got {channels} and {image_size}"
        )
    pillow, numpy = require("PIL.Image", extra="zoo"), require("numpy", extra="zoo")
    stride, crops, labels = image_size // 2, [], []
    for label, name in enumerate(("china", "flower")):
        # Without scikit-learn itself, which takes a second of processor time to import.
        path = package_file(
            "sklearn", f"datasets/images/{name}.jpg", extra="train", distribution="scikit-learn"
        )
        pixels = torch.tensor(numpy.asarray(pillow.open(path).convert("RGB")), dtype=torch.float32)
        photo = pixels.permute(2, 0, 1) / 127.5 - 1  # [3, H, W]
        if channels == 1:
            photo = photo.mean(dim=0, keepdim=True)
        border = round(photo.shape[2] * (1 - HELD_OUT))
        parts = {"train": photo[:, :, :border], "test": photo[:, :, border:]}
        for part in ("train", "test") if split == "all" else (split,):
            tiles = parts[part].unfold(1, image_size, stride).unfold(2, image_size, stride)
            tiles = tiles.flatten(1, 2).transpose(0, 1)  # [N, channels, image_size, image_size]
            crops.append(tiles)
            labels += [label] * len(tiles)
    return InMemoryImages(torch.cat(crops).contiguous(), torch.tensor(labels), ("china", "flower"))
