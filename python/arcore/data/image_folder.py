"""A folder with one subfolder of images per class, read lazily."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arcore._optional import require
from arcore.data.images import ImageDataset, check_split, held_out_mask

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
HELD_OUT_EVERY = 10


class ImageFolder(ImageDataset):
    """Images in `root/<class name>/*.png` (or jpg, webp, bmp, tiff, gif, ppm, pgm).

    Classes are numbered by their sorted folder names and images are taken in sorted order, so the dataset is the
    same on every machine. Hidden files are skipped. Each image is scaled so that its shorter side equals
    `image_size` (antialiased) and then centre-cropped; a camera's rotation mark is obeyed. The header of every
    file is read at once, so a file that is no image is reported before training starts.

    Args:
        root: the folder.
        image_size: side length in pixels of the square images that come out.
        channels: 1 (grey) or 3 (RGB). Transparent pixels become white.
        split: `"all"`, `"train"`, or `"test"`: every tenth image of each class.

    Raises:
        FileNotFoundError: `root` is not a folder.
        ValueError: no class folders, a class without images, or a file that is not a readable image (named).
        ImportError: Pillow is missing.
    """

    def __init__(self, root: str | Path, *, image_size: int, channels: int = 3, split: str = "all") -> None:
        check_split(split)
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3 but got {channels}")
        if image_size < 1:
            raise ValueError(f"image_size must be at least 1 pixel but got {image_size}")
        self._pil = require("PIL.Image", extra="zoo")
        self._upright = require("PIL.ImageOps", extra="zoo").exif_transpose
        self.root = Path(root)
        self.image_shape = (channels, image_size, image_size)
        classes = _class_folders(self.root)
        self.class_names = tuple(folder.name for folder in classes)
        files: list[Path] = []
        labels: list[int] = []
        for label, folder in enumerate(classes):
            members = _image_files(folder)
            files += members
            labels += [label] * len(members)
        for path in files:
            self._check_header(path)
        self.labels = torch.tensor(labels)
        if split != "all":
            chosen = held_out_mask(self.labels, HELD_OUT_EVERY) == (split == "test")
            files = [path for path, keep in zip(files, chosen.tolist(), strict=True) if keep]
            self.labels = self.labels[chosen]
        self.files = tuple(files)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        channels, size, _ = self.image_shape
        path = self.files[index]
        try:
            with self._pil.open(path) as image:
                picture = _flatten(self._pil, self._upright(image), "L" if channels == 1 else "RGB")
        except (OSError, SyntaxError, ValueError, self._pil.DecompressionBombError) as error:
            raise ValueError(f"cannot read the image {path}: {error}") from error
        scale = size / min(picture.size)
        resized = picture.resize(
            (max(size, round(picture.width * scale)), max(size, round(picture.height * scale))),
            self._pil.Resampling.LANCZOS,
        )
        left, top = (resized.width - size) // 2, (resized.height - size) // 2
        square = resized.crop((left, top, left + size, top + size))
        pixels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8)
        pixels = pixels.view(size, size, channels).permute(2, 0, 1)
        return pixels.to(torch.float32) / 127.5 - 1, int(self.labels[index])

    def _check_header(self, path: Path) -> None:
        try:
            with self._pil.open(path):
                pass
        except (OSError, SyntaxError, ValueError, self._pil.DecompressionBombError) as error:
            raise ValueError(
                f"{path} is not a readable image ({type(error).__name__}): mend it or move it away"
            ) from error


def _flatten(pil: Any, image: Any, mode: str) -> Any:
    """Convert to `mode`, with transparent pixels on white and 16-bit grey scaled to 8 bits."""
    if image.mode.startswith("I"):
        # convert("L") would clip 16-bit values at 255 instead of scaling them.
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layered = image.convert("RGBA")
        white = pil.new("RGBA", layered.size, "white")
        image = pil.alpha_composite(white, layered)
    return image.convert(mode)


def _class_folders(root: Path) -> list[Path]:
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise FileNotFoundError(
            f"the data folder {root} {what}: expected a folder with one subfolder of images per class"
        )
    folders = sorted(
        (path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")),
        key=lambda path: path.name,
    )
    if not folders:
        raise ValueError(
            f"the data folder {root} has no class subfolders: put the images into {root}/<class name>/, "
            "one subfolder per class (a single one is fine)"
        )
    return folders


def _image_files(folder: Path) -> list[Path]:
    members = sorted(
        (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")),
        key=lambda path: path.relative_to(folder).as_posix(),
    )
    for path in members:
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            raise ValueError(
                f"{path} is not an image file (known endings: {', '.join(sorted(IMAGE_SUFFIXES))}): move it away"
            )
    if not members:
        raise ValueError(f"the class folder {folder} holds no images: add some or remove the folder")
    return members
