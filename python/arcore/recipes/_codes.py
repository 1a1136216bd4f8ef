"""Codes of pictures as files, and reconstructions beside the pictures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from arcore._files import atomic_path
from arcore._optional import require
from arcore.data._pictures import read_picture
from arcore.recipes._pictures import TENSORS, grid, save_picture

# What a folder's pictures end in.
_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_PART = "codes"


@dataclass(frozen=True)
class Coded:
    """Pictures, their codes and their reconstructions.

    Attributes:
        files: of the pictures.
        images: `[N, C, H, W]` in [-1, 1].
        drawn: their reconstructions, likewise.
        codes: per scale, int64 `[N, n]`.
        columns: pictures per row; None: about square.
    """

    files: list[Path]
    images: Tensor
    drawn: Tensor
    codes: list[Tensor]
    columns: int | None

    def save(self, path: Path) -> list[str]:
        """Write the codes, or a picture in which each image stands above its reconstruction."""
        error = (self.drawn.float() - self.images).square().flatten(1).mean(1)
        psnr = (10 * (4 / error.clamp(min=1e-12)).log10()).mean().item()
        what = f"{len(self.images)} pictures, PSNR of their reconstructions {psnr:.1f} dB on average"
        if path.suffix.lower() == TENSORS:
            save_file = require("safetensors.torch", extra="zoo").save_file
            tensors = {f"{_PART}.{k}": part.contiguous() for k, part in enumerate(self.codes)}
            with atomic_path(path) as temporary:
                save_file(tensors, temporary, {"files": "\n".join(map(str, self.files))})
            each = sum(part.shape[1] for part in self.codes)
            return [f"{path}: {each} codes of each of {what}; decode them with --codes {path}"]
        columns = self.columns or math.ceil(math.sqrt(2 * len(self.images)))
        rows = []
        for at in range(0, len(self.images), columns):
            for images in (self.images, self.drawn):
                row = images[at : at + columns]
                rows.append(torch.cat([row, row.new_ones(columns - len(row), *row.shape[1:])]))
        save_picture(grid(torch.cat(rows), columns), path)
        return [f"{path}: {what}; each row of pictures stands above its reconstructions"]


@dataclass(frozen=True)
class Decoded:
    """Pictures of codes.

    Attributes:
        images: `[N, C, H, W]` in [-1, 1].
        columns: pictures per row; None: about square.
    """

    images: Tensor
    columns: int | None

    def save(self, path: Path) -> list[str]:
        """Write the pictures, or their numbers."""
        if path.suffix.lower() == TENSORS:
            with atomic_path(path) as temporary:
                require("safetensors.torch", extra="zoo").save_file({"images": self.images}, temporary)
        else:
            save_picture(grid(self.images, self.columns), path)
        return [f"{path}: {len(self.images)} pictures of codes"]


def read_codes(path: Path) -> list[Tensor]:
    """Codes per scale, int64 `[N, n]`, from a file that `Coded.save` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no codes.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of codes {path}")
    load_file = require("safetensors.torch", extra="zoo").load_file
    try:
        found = load_file(path)
        codes = [found[f"{_PART}.{k}"] for k in range(len(found))]
    except Exception as error:
        raise ValueError(f"{path} holds no codes: write them with --images FOLDER --out {path}") from error
    if not codes or len({len(part) for part in codes}) != 1 or not len(codes[0]):
        raise ValueError(f"{path} holds codes of no picture, or of different numbers of pictures per scale")
    return codes


def read_images(path: Path, size: int, channels: int) -> tuple[list[Path], Tensor]:
    """A picture, or all pictures of a folder and of the folders in it, by name.

    Returns:
        The files, and float32 `[N, channels, size, size]` in [-1, 1].

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: there is no picture, or one cannot be read.
    """
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _ENDINGS)
        if not files:
            raise ValueError(f"there is no picture in {path}; they end in {', '.join(_ENDINGS)}")
    return files, torch.stack([read_picture(file, size, channels) for file in files])
