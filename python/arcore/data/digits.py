"""Real handwritten digits, 8x8 pixels, as shipped inside scikit-learn (the UCI optical recognition set)."""

from __future__ import annotations

import gzip

import torch
import torch.nn.functional as F
from torch import Tensor

from arcore.data.images import InMemoryImages, check_split, held_out_mask
from arcore.data.real.files import package_file
from arcore.nn.checks import check_whole


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
    image_size = check_whole("image_size", image_size, -(2**63))
    if image_size != 8 and (image_size < 16 or image_size % 16):
        raise ValueError(f"the digits have 8 pixels per side, or any multiple of 16, but not {image_size}")
    levels, labels = _levels_and_classes()
    images = levels.to(torch.float32).view(-1, 1, 8, 8) / 8 - 1
    if split != "all":
        chosen = held_out_mask(labels) == (split == "test")
        images, labels = images[chosen], labels[chosen]
    if image_size > 8:
        images = F.interpolate(images, scale_factor=2, mode="bilinear")
        images = images.repeat(1, 1, image_size // 16, image_size // 16)
    return InMemoryImages(images, labels, tuple(str(digit) for digit in range(10)))


def _levels_and_classes() -> tuple[Tensor, Tensor]:
    """Grey levels from 0 to 16, int64 `[1797, 64]`, and classes, int64 `[1797]`.

    scikit-learn's file is read without scikit-learn, which takes a second of processor time to import.
    """
    path = package_file("sklearn", "datasets/data/digits.csv.gz", extra="train", distribution="scikit-learn")
    with gzip.open(path, "rt", encoding="ascii") as file:
        rows = torch.tensor([[int(float(word)) for word in line.split(",")] for line in file])
    return rows[:, :64], rows[:, 64].contiguous()


def load_moving_digits(split: str = "train", *, frames: int = 8, image_size: int = 16) -> InMemoryImages:
    """Videos made of the digits: each of `load_digits` drifts over a larger picture and bounces off its edges.

    Start and velocity, whole pixels per frame and never zero, are the same on every machine.

    Args:
        split: as for `load_digits`, which digits the videos are of.
        frames: of a video.
        image_size: side of a frame, at least 9.

    Returns:
        Videos `[N, frames, 1, image_size, image_size]`, float32 in [-1, 1], with labels 0..9.

    Raises:
        ImportError: scikit-learn is missing.
        ValueError: unknown split, no frames, or frames too small to move in.
    """
    frames, image_size = check_whole("frames", frames, 0), check_whole("image_size", image_size, 0, "pixels")
    if frames < 1 or image_size < 9:
        raise ValueError(
            f"digits move over frames of at least 9 pixels per side, but got frames={frames} and "
            f"image_size={image_size}"
        )
    digits = load_digits(split)
    count, room = len(digits), image_size - 8
    generator = torch.Generator().manual_seed({"train": 0, "test": 1, "all": 2}[split])
    start = torch.randint(2 * room, (count, 1, 2), generator=generator)
    way = torch.randint(8, (count,), generator=generator)  # the eight neighbours of a pixel
    velocity = torch.tensor([[-1, -1], [-1, 0], [-1, 1], [0, -1], [0, 1], [1, -1], [1, 0], [1, 1]])[way]
    walked = start + torch.arange(frames)[:, None] * velocity[:, None]  # [N, frames, 2]
    # Folding a straight line at the walls makes it bounce.
    place = room - (walked % (2 * room) - room).abs()
    videos = torch.full((count, frames, 1, image_size, image_size), -1.0)
    rows = place[..., 0, None, None] + torch.arange(8)[:, None]  # [N, frames, 8, 1]
    columns = place[..., 1, None, None] + torch.arange(8)
    which, frame = torch.arange(count)[:, None, None, None], torch.arange(frames)[:, None, None]
    videos[which, frame, 0, rows, columns] = digits.images.expand(-1, frames, -1, -1)
    return InMemoryImages(videos, digits.labels, digits.class_names)
