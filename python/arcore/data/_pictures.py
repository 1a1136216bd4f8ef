"""Picture files to 8-bit grey or RGB, whatever mode Pillow opens them in.

What "black" and "white" are is known for most modes: 0 and 255, 0 and 65535 (16-bit grey), 0 and 4095 (12-bit TIFF), 0
and 1 (floats that stay within). It is not known for other floats, for 32-bit integers and for signed 16-bit integers;
such a picture is refused by name unless the caller says the range.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arcore._optional import require
from arcore.data._walk import MEND

# TIFF 6.0, section 8.
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0
# Files whose "I" mode is 16-bit grey: Pillow scales a PGM's maximum to 65535.
_SIXTEEN_BITS = ("PNG", "PPM")
_JPEG = ("JPEG", "MPO")
_SMALL = 8

Range = tuple[float, float]


class Pictures:
    """Reads picture files.

    Args:
        channels: 1 (grey) or 3 (RGB).
        value_range: black and white of pictures deeper than 8 bits per channel; None takes what the file's format says
            and refuses a file that leaves it open.

    Raises:
        ImportError: Pillow is missing.
        ValueError: a range that is not increasing and finite.
    """

    def __init__(self, channels: int, value_range: Range | None = None) -> None:
        if value_range is not None:
            low, high = value_range
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise ValueError(f"value_range must be two growing finite numbers but got {value_range}")
        self.mode = "L" if channels == 1 else "RGB"
        self.value_range = value_range
        self.pil = require("PIL.Image", extra="zoo")
        self._upright = require("PIL.ImageOps", extra="zoo").exif_transpose

    def read(self, path: Path) -> Any:
        """The picture in mode L or RGB, upright, transparent pixels on white; of several frames the first.

        Raises:
            ValueError: it cannot be read, or its range of values is unknown (the file is named).
        """
        return self._guarded(path, self._read)

    def square(self, picture: Any, size: int) -> Any:
        """The centre of a picture whose shorter side is scaled to `size` pixels, antialiased."""
        scale = size / min(picture.size)
        wide, high = (max(size, round(side * scale)) for side in picture.size)
        resized = picture.resize((wide, high), self.pil.Resampling.LANCZOS)
        left, top = (wide - size) // 2, (high - size) // 2
        return resized.crop((left, top, left + size, top + size))

    def check(self, path: Path, *, whole: bool) -> int:
        """Raise ValueError, as `read` would, for a file that cannot be used; returns its number of frames.

        Args:
            path: of the file.
            whole: decode the file. Otherwise the header is read, and the file's end where its format has a mark there;
                a file without such a mark, or without it in its place, is decoded all the same.
        """
        return int(self._guarded(path, lambda file: self._check(file, whole)))

    def frames(self, path: Path) -> list[Any]:
        """All frames of a picture file, as `read` gives the first.

        Raises:
            ValueError: see `read`.
        """
        return list(self._guarded(path, self._frames))

    def flatten(self, image: Any, source: Any = None) -> Any:
        """An image as `read` gives it, as it lies.

        Args:
            image: in any mode.
            source: the open file that it is a copy of; copies have lost format and tags.
        """
        if image.mode.startswith("I") or image.mode == "F":
            return self._deep(image, image if source is None else source)
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            layered = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
            image = self.pil.alpha_composite(self.pil.new("RGBA", layered.size, "white"), layered)
        if image.mode in ("LAB", "HSV", "CMYK", "YCbCr"):
            image = image.convert("RGB")  # not every mode has a way to grey
        return image.convert(self.mode)

    def _guarded(self, path: Path, work: Any) -> Any:
        try:
            return work(path)
        except _Refused as error:
            raise ValueError(f"cannot use the image {path}: {error}") from None
        except MemoryError:
            raise
        # Pillow's parsers of damaged files raise nearly everything: OSError, SyntaxError, struct.error, KeyError, ...
        except Exception as error:
            if isinstance(error, self.pil.UnidentifiedImageError):
                raise ValueError(f"{path} is not a readable image: {MEND}") from error
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise ValueError(f"cannot read the image {path}: {reason}; {MEND}") from error

    def _read(self, path: Path) -> Any:
        with self.pil.open(path) as image:
            return self.flatten(self._upright(image), image)

    def _frames(self, path: Path) -> list[Any]:
        with self.pil.open(path) as image:
            pictures = []
            for index in range(getattr(image, "n_frames", 1)):
                image.seek(index)
                pictures.append(self.flatten(image.copy(), image))
            return pictures

    def _check(self, path: Path, whole: bool) -> int:
        with self.pil.open(path) as image:
            # The second picture of an MPO file is a camera's preview.
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            shallow = not (image.mode.startswith("I") or image.mode == "F")
            if whole or not shallow or not _complete(path, image.format):
                if image.format in _JPEG:
                    # All of the file is decoded, but only few pixels are computed.
                    image.draft(image.mode, (_SMALL, _SMALL))
                self.flatten(image)
        return int(frames)

    def _deep(self, image: Any, source: Any) -> Any:
        """16-bit, 32-bit and float grey, scaled to 8 bits and rounded down, as every 8-bit reader of 16 bits does."""
        numpy = require("numpy", extra="zoo")
        tags = getattr(source, "tag_v2", None)
        values = numpy.asarray(image)
        if not numpy.isfinite(values).all():
            raise _Refused("it holds NaN or infinite values; replace them")
        low, high = self._range(source, tags, values)
        clear = _clear_value(source)
        whole = numpy.issubdtype(values.dtype, numpy.integer)
        # Of integers every level gets the same share of the 256: 16 bits lose their lower half.
        share = (values.astype(numpy.float64) - low) * (
            256 / (high - low + 1) if whole else 255 / (high - low)
        )
        if not whole:
            share = numpy.round(share)
        share = share.clip(0, 255)
        if tags is not None and tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            share = 255 - numpy.floor(share)
        grey = share.astype(numpy.uint8)
        if clear is not None:
            grey[values == clear] = 255
        return self.pil.fromarray(grey).convert(self.mode)

    def _range(self, source: Any, tags: Any, values: Any) -> Range:
        if self.value_range is not None:
            return self.value_range
        if source.mode.startswith("I;16"):
            bits = 16 if tags is None else int(tags.get(_BITS_PER_SAMPLE, (16,))[0])
            return 0, 2**bits - 1
        if source.mode == "I" and source.format in _SIXTEEN_BITS:
            return 0, 65535
        least, most = values.min().item(), values.max().item()
        if source.mode == "F" and 0 <= least <= most <= 1:
            return 0, 1
        kind = "floats" if source.mode == "F" else "integers of more than 16 bits, or with a sign,"
        known = "from 0 to 1" if source.mode == "F" else "of 8 or 16 bits"
        raise _Refused(
            f"its {kind} run from {least:g} to {most:g}, and the file does not say which are black and white; "
            f"expected values {known}: convert it, or pass value_range=(black, white)"
        )


def read_picture(path: Path, size: int, channels: int) -> Tensor:
    """The centre of a picture file, scaled to `size` x `size` pixels.

    Args:
        path: of the file.
        size: pixels per side.
        channels: 1 (grey) or 3 (RGB).

    Returns:
        float32 `[channels, size, size]` in [-1, 1].

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or there are no pictures of so many channels.
    """
    if channels not in (1, 3):
        raise ValueError(f"{path}: the model takes {channels} channels, and a picture has 1 or 3")
    if not path.is_file():
        raise FileNotFoundError(f"there is no picture {path}")
    reader = Pictures(channels)
    picture = reader.square(reader.read(path), size)
    values = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return values.view(size, size, channels).permute(2, 0, 1).float() / 127.5 - 1


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height of a picture file in pixels, upright.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no picture {path}")
    size: tuple[int, int] = Pictures(3).read(path).size
    return size


class _Refused(Exception):
    """A picture whose values cannot be understood."""


def _clear_value(source: Any) -> int | None:
    """The level of grey that a 16-bit PNG declares transparent."""
    value = source.info.get("transparency")
    return value if isinstance(value, int) and source.format == "PNG" else None


def _complete(path: Path, kind: str | None) -> bool:
    """Whether a file ends as its format demands; False where the format has no such mark."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(12)
        file.seek(max(0, size - 12))
        end = file.read()
    if kind in _JPEG:
        return end.endswith(b"\xff\xd9")
    if kind == "PNG":
        return end == b"\0\0\0\0IEND\xaeB`\x82"
    if kind == "GIF":
        return end.endswith(b"\x3b")
    # RIFF counts what follows its first 8 bytes.
    return kind == "WEBP" and int.from_bytes(head[4:8], "little") + 8 == size
