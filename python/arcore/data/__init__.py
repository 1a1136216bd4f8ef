"""Labelled images and text for training: small real data that ships with a package, and adapters for folders on disk.

Nothing here downloads anything. A dataset of images yields `(image, label)` with `image` a float32 tensor
`[C, H, W]` in [-1, 1] and `label` a class number, and has `class_names` and `image_shape`.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from arcore.data._walk import is_name
from arcore.data.concepts import ConceptPair, ConceptPairs, concept_pairs
from arcore.data.digits import load_digits, load_moving_digits
from arcore.data.image_folder import ImageFolder
from arcore.data.images import ImageDataset, InMemoryImages, held_out_mask
from arcore.data.mnist import load_mnist
from arcore.data.photos import load_photos
from arcore.data.rotation_crop import RotatedImages, adaptive_rotation
from arcore.data.scenes import Scenes, load_scenes
from arcore.data.series import (
    Series,
    SeriesWindows,
    Window,
    fill_missing,
    open_series,
    read_tables,
    series_of_table,
)
from arcore.data.text import Text, TokenCrops, load_kjv, load_text
from arcore.data.text_tokenizers import BPETokenizer, ByteTokenizer, TextStream, TextTokenizer, make_tokenizer
from arcore.data.videos import VideoFolder
from arcore.nn.checks import check_whole

__all__ = [
    "BPETokenizer",
    "ByteTokenizer",
    "ConceptPair",
    "ConceptPairs",
    "ImageDataset",
    "ImageFolder",
    "InMemoryImages",
    "RotatedImages",
    "Scenes",
    "Series",
    "SeriesWindows",
    "Text",
    "TextStream",
    "TextTokenizer",
    "TokenCrops",
    "VideoFolder",
    "Window",
    "adaptive_rotation",
    "concept_pairs",
    "fill_missing",
    "held_out_mask",
    "load_digits",
    "load_kjv",
    "load_mnist",
    "load_moving_digits",
    "load_photos",
    "load_scenes",
    "load_text",
    "make_tokenizer",
    "open_dataset",
    "open_series",
    "read_tables",
    "series_of_table",
]


# Data sets that `open_dataset` knows by name.
NAMES = ("digits", "mnist", "moving_digits", "photos", "scenes")


def check_source(source: str | os.PathLike[str], names: Sequence[str] = NAMES) -> None:
    """Raise unless `source` names a data set or something on disk.

    Args:
        source: what `--data` names.
        names: of data sets.

    Raises:
        FileNotFoundError: it is neither; the message suggests a close name, of a folder beside it first.
    """
    path = Path(source)
    if is_name(os.fspath(source), names) or path.exists():
        return
    beside = [one.name for one in path.parent.iterdir()] if path.parent.is_dir() else []
    folders = difflib.get_close_matches(path.name, beside, n=1, cutoff=0.8)
    close = [str(path.parent / name) for name in folders] or difflib.get_close_matches(
        str(source), names, n=1
    )
    if close:
        raise FileNotFoundError(
            f"there is neither a data set nor a folder {str(source)!r}: did you mean {close[0]!r}?"
        )
    raise FileNotFoundError(
        f"the data folder {source} does not exist: expected a folder with one subfolder per class, or one of "
        f"{', '.join(names)}"
    )


def open_dataset(
    source: str | os.PathLike[str],
    *,
    image_size: int,
    channels: int,
    frames: int = 1,
    split: str = "train",
    nested: Literal["outer", "inner"] | None = None,
    skip_bad: bool = False,
) -> ImageDataset:
    """Open what `arcore train --data` names.

    Args:
        source: `"digits"` (8 x 8 pixels), `"mnist"` (28 x 28), `"moving_digits"` (videos), `"photos"` (crops of two
            photographs), `"scenes"` (two digits of MNIST beside each other), or the path of a folder
            with one subfolder of images per class (see `ImageFolder`), or of videos where `frames` is above 1 (see
            `VideoFolder`).
        image_size: side length in pixels that the model wants; images and videos of folders are resized and
            centre-cropped to it, `"digits"` are repeated to fill it (8, or a multiple of 16), `"mnist"` is padded or
            resized.
        channels: 1 (grey) or 3 (RGB).
        frames: of a video; 1 for images.
        split: `"train"`, `"test"` or `"all"`.
        nested, skip_bad: of folders, see `ImageFolder`.

    Returns:
        The dataset. Its `digest()` identifies the content.

    Raises:
        TypeError: `source` is neither a name nor a path, or a size is no whole number.
        FileNotFoundError: `source` is neither of the names nor a folder; the message suggests close names.
        ValueError: the folder holds no usable images, or the built-in data have none of that size.
    """
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"expected data as {', '.join(NAMES)} or the path of a folder but got {source!r}")
    source = os.fspath(source)
    frames = check_whole("frames", frames, 1)
    image_size = check_whole("image_size", image_size, 1, "pixel")
    channels = check_whole("channels", channels, 1)
    if is_name(source, NAMES) and (source == "moving_digits") != (frames > 1):
        raise ValueError(
            f"the model takes {f'videos of {frames} frames' if frames > 1 else 'images'} but --data {source} has "
            f"{'images: use moving_digits or a folder of videos' if frames > 1 else 'videos'}"
        )
    if source == "moving_digits":
        if channels != 1:
            raise ValueError(f"the moving digits are grey but the model takes {channels} channels")
        return load_moving_digits(split, frames=frames, image_size=image_size)
    if source == "digits":
        if channels != 1 or (image_size != 8 and image_size % 16):
            raise ValueError(
                f"the digits are 1 x 8 x 8 images (or 16, 32, 48, ...) but the model takes "
                f"{channels} x {image_size} x {image_size}: choose a *_tiny preset, or give --data a folder of images"
            )
        return load_digits(split, image_size=image_size)
    if source == "photos":
        return load_photos(split, image_size=image_size, channels=channels)
    if source == "scenes":
        if channels != 1:
            raise ValueError(f"the scenes of digits are grey but the model takes {channels} channels")
        return load_scenes(split, image_size=image_size)
    if source == "mnist":
        if channels != 1:
            raise ValueError(f"the digits of mnist are grey but the model takes {channels} channels")
        return load_mnist(split, image_size=image_size)
    check_source(source)
    if frames > 1:
        if nested is not None:
            raise ValueError("nested is for folders of images: videos lie in folders of their own")
        return VideoFolder(
            source,
            frames=frames,
            image_size=image_size,
            channels=channels,
            split=split,
            skip_bad=skip_bad,
        )
    return ImageFolder(
        source, image_size=image_size, channels=channels, split=split, nested=nested, skip_bad=skip_bad
    )
