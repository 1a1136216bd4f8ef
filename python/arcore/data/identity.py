"""Which data these are, by content and not by name of a place, and what shape images on disk have."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import Dataset

from arcore._optional import require
from arcore.data.image_folder import ImageFolder
from arcore.data.series import SERIES_NAMES

# What is asked for by a name and not by a place.
NAMES = frozenset(
    {
        "digits",
        "mnist",
        "moving_digits",
        "photos",
        "scenes",
        "mnist_masks",
        "mnist_changes",
        "kjv",
        "bytes",
        "bpe",
        *SERIES_NAMES,
    }
)


@dataclass(frozen=True)
class Identity:
    """What tells data from other data.

    Attributes:
        digest: changes when the content does, or how it is dealt to training and held-out part, and not when it moves.
        items: how many there are.
    """

    digest: str
    items: int


def identity(*parts: Dataset | None) -> Identity:
    """Which data these are.

    Args:
        parts: for example training and held-out part, told by their own `digest()`, or where they have none by the
            number of items alone.
    """
    digest, items = hashlib.blake2b(digest_size=8), 0
    for part in parts:
        if part is None:
            digest.update(b"none/")
            continue
        data: Any = part
        own = getattr(data, "digest", lambda: None)()
        items += len(data)
        digest.update(f"{own}/{len(data)}/".encode())
    return Identity(digest.hexdigest(), items)


def sizes_of(
    root: str | Path, nested: Literal["outer", "inner"] | None = None, skip_bad: bool = False
) -> tuple[set[int], bool]:
    """What shape the images of a folder have; headers alone are read.

    Args:
        root: as `ImageFolder` takes it.
        nested, skip_bad: likewise.

    Returns:
        Their sides, one entry per different one, empty where an image is no square; and True where an image has more
        than grey levels.
    """
    pil = require("PIL.Image", extra="zoo")
    sides: set[int] = set()
    square, colour = True, False
    for path in ImageFolder(root, image_size=1, nested=nested, skip_bad=skip_bad).files:
        with pil.open(path) as image:
            square = square and image.width == image.height
            sides.add(image.width)
            colour = colour or not (image.mode in ("1", "L", "LA", "F") or image.mode.startswith("I"))
    return (sides if square else set()), colour


def place(value: Any) -> Any:
    """An option as a later process in any working directory can read it: paths become absolute strings."""
    if isinstance(value, Path):
        return str(value.absolute())
    if isinstance(value, str) and value not in NAMES and value and Path(value).exists():
        return str(Path(value).absolute())
    return list(value) if isinstance(value, tuple) else value
