"""Pictures of generated images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arcore._files import atomic_path
from arcore._optional import require

SMALLEST_CELL = 64
TENSORS = ".safetensors"


@dataclass(frozen=True)
class Pictures:
    """What a model drew.

    Attributes:
        images: `[N, C, H, W]`, or videos `[N, F, C, H, W]`, in [-1, 1] where C is 1 or 3; else latents.
        what: for the sentence that says what was written.
        columns: per row; None: about square.
        latents: the numbers are no images, whatever their shape.
    """

    images: Tensor
    what: str
    columns: int | None = None
    latents: bool = False

    def save(self, path: Path) -> list[str]:
        """Write a picture, or the numbers where they are asked for or there is no picture of them.

        Returns:
            Sentences about what was written.
        """
        channels = self.images.shape[-3]
        if self.latents or channels not in (1, 3):
            target = path.with_suffix(TENSORS)
            self._save_numbers(target, "latents")
            kind = "latents" if self.latents else f"latents of {channels} channels"
            return [
                f"{target}: {self.what}, as {kind} {tuple(self.images.shape)}: they become "
                "pictures with the decoder that the model was made for, --vae FILE"
            ]
        if path.suffix.lower() == TENSORS:
            self._save_numbers(path, "images")
        elif self.images.dim() == 5:
            save_animation(self.images, path, self.columns)
        else:
            save_picture(grid(self.images, self.columns), path)
        return [f"{path}: {self.what}"]

    def _save_numbers(self, path: Path, name: str) -> None:
        save_file = require("safetensors.torch", extra="zoo").save_file
        with atomic_path(path) as temporary:
            save_file({name: self.images.contiguous()}, temporary)


def to_bytes(images: Tensor) -> Tensor:
    """Images `[..., C, H, W]` in [-1, 1] as uint8 `[..., H, W, C]`."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(-3, -1)


def grid(images: Tensor, columns: int | None = None) -> Any:
    """A picture with the images in rows.

    Args:
        images: `[N, C, H, W]` in [-1, 1], C 1 or 3. Small images are magnified pixel by pixel.
        columns: images per row; default: as square as can be.

    Returns:
        A PIL image.
    """
    image_module = require("PIL.Image", extra="zoo")
    count, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    zoom = math.ceil(SMALLEST_CELL / max(height, width)) if max(height, width) < SMALLEST_CELL else 1
    gap = 4
    cell_h, cell_w = height * zoom, width * zoom
    picture = image_module.new("RGB", (columns * (cell_w + gap) + gap, rows * (cell_h + gap) + gap), "white")
    for index, pixels in enumerate(to_bytes(images)):
        mode, pixels = ("L", pixels[..., 0]) if channels == 1 else ("RGB", pixels)
        cell = image_module.frombytes(mode, (width, height), pixels.contiguous().numpy().tobytes())
        cell = cell.resize((cell_w, cell_h), image_module.Resampling.NEAREST)
        row, column = divmod(index, columns)
        picture.paste(cell, (gap + column * (cell_w + gap), gap + row * (cell_h + gap)))
    return picture


def save_animation(videos: Tensor, path: Path, columns: int | None = None, milliseconds: int = 150) -> None:
    """Write videos side by side, repeating for ever, or as a still picture where the format has no motion.

    Args:
        videos: `[N, F, C, H, W]` in [-1, 1].
        path: `.gif` shows motion; in another format each video is a row of its frames.
        columns: videos per row; default: as square as can be.
        milliseconds: time of a frame.
    """
    if path.suffix.lower() != ".gif":
        save_picture(grid(videos.flatten(0, 1), columns=videos.shape[1]), path)
        return
    first, *rest = (grid(frame, columns) for frame in videos.unbind(1))
    with atomic_path(path) as temporary:
        first.save(temporary, format="GIF", save_all=True, append_images=rest, duration=milliseconds, loop=0)


def save_picture(picture: Any, path: Path) -> None:
    """Write a PIL image under a temporary name and rename it."""
    with atomic_path(path) as temporary:
        picture.save(temporary, format=image_format(path))


def image_format(path: Path) -> str:
    """PIL's name of the format that a file's ending asks for.

    Raises:
        ValueError: unknown ending.
    """
    if path.suffix.lower() == TENSORS:
        return "numbers"
    formats = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".gif": "GIF"}
    try:
        return formats[path.suffix.lower()]
    except KeyError:
        raise ValueError(f"{path} must end in one of {', '.join([*formats, TENSORS])}") from None
