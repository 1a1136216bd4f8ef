"""Pictures, or pairs of them, with a class for every pixel: in memory, and in folders on disk."""

from __future__ import annotations

import difflib
import hashlib
import os
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from arcore._optional import require
from arcore.data._pictures import Pictures
from arcore.data._walk import MEND, counted, digest, is_name, some, walk
from arcore.data.image_folder import HELD_OUT_FOLDERS, IMAGE_SUFFIXES, SMALL_FOLDER, TRAIN_FOLDER
from arcore.data.images import check_split, held_out_mask
from arcore.nn.checks import check_path, check_tensor, check_whole
from arcore.nn.kinds import check_kinds

# What a mask says of pixels whose class is not known.
UNLABELLED = 255
# Names of the folders of pictures, of one and of two per item, and of masks; the first that is there counts.
PICTURE_FOLDERS = {1: (("images", "image", "img"),), 2: (("A", "before"), ("B", "after"))}
MASK_FOLDERS = ("masks", "mask", "labels", "label", "annotations", "annotation")
CHANGE = ("unchanged", "changed")
CLASS_FILE = "classes.txt"
HELD_OUT_EVERY = 10
# Black and white of a mask of two classes, as programs for pictures write it.
_BINARY = {0, 255}


class PixelData(Dataset[tuple[Tensor, Tensor]]):
    """Pictures with a class for every pixel.

    An item is uint8 `[P, C, H, W]`, P pictures of one place, and uint8 `[H, W]`, classes; `UNLABELLED` is of no class.
    Items may differ in height and width.

    Attributes:
        class_names: in the order of the class numbers.
        pictures: P, 1 or 2.
    """

    class_names: tuple[str, ...]
    pictures: int

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def size(self, index: int) -> tuple[int, int]:
        """Height and width of an item."""

    def digest(self) -> str | None:
        """Identifies the content; None where that is unknown."""
        return None


@check_kinds
class InMemoryPixels(PixelData):
    """Pictures of one size that fit in memory.

    Args:
        images: uint8 `[N, P, C, H, W]`.
        masks: uint8 `[N, H, W]`.
        class_names: name of each class.

    Raises:
        TypeError: these are no tensors of that dtype.
        ValueError: shapes do not fit, or a pixel is of a class without a name.
    """

    def __init__(self, images: Tensor, masks: Tensor, class_names: Sequence[str]) -> None:
        for name, value in (("images", images), ("masks", masks)):
            check_tensor(name, value)
            if value.dtype != torch.uint8:
                raise TypeError(f"expected {name} of uint8 but got {value.dtype}")
        if images.dim() != 5 or masks.shape != (len(images), *images.shape[3:]):
            raise ValueError(
                "expected images [N, P, C, H, W] and masks [N, H, W] but got "
                f"{tuple(images.shape)} and {tuple(masks.shape)}"
            )
        self.images, self.masks = images, masks
        self.class_names, self.pictures = tuple(class_names), images.shape[1]
        known = masks[masks != UNLABELLED]
        if len(known) and int(known.max()) >= len(self.class_names):
            raise ValueError(
                f"a pixel is of class {int(known.max())} and there are {len(self.class_names)} names"
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.masks[index]

    def size(self, index: int) -> tuple[int, int]:
        """See `PixelData`."""
        return self.masks.shape[1], self.masks.shape[2]

    def digest(self) -> str:
        """See `PixelData`."""
        state = hashlib.blake2b(repr((self.class_names, tuple(self.images.shape))).encode(), digest_size=8)
        for values in (self.images, self.masks):
            state.update(values.contiguous().numpy().data)
        return state.hexdigest()


@check_kinds
class PixelFolder(PixelData):
    """Pictures and masks in folders beside each other, in files of the same names.

    `root/images/` and `root/masks/` (or labels, annotations); for two pictures per item `root/A/` or `root/before/`,
    `root/B/` or `root/after/`, and the masks. Where there are `root/train/` and `root/val/` (or valid, validation,
    test), each holds these folders and the second is the held-out part; else every tenth item is held out.

    A mask is a picture of one channel, or with a palette, whose values are the class numbers; 255 is of no class. Where
    there are but the values 0 and 255 in all masks, 255 is class 1. `root/classes.txt` names the classes, one per line;
    without it they are named by their numbers. Masks of pairs say what changed: 0 and 1, or 0 and 255.

    Args:
        root: the folder.
        pictures: per item, 1 or 2.
        channels: 1 (grey) or 3 (RGB).
        split: `"all"`, `"train"` or `"test"`.
        skip_bad: leave out items that cannot be used, with one warning that counts and names them.

    Attributes:
        files: of this split, pairs of the pictures' paths and the mask's.
        notes: sentences on what was not used and is no error.

    Raises:
        FileNotFoundError: `root` or a folder in it is missing.
        ValueError: a file has no partner, or cannot be used (named).
        ImportError: Pillow is missing.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        pictures: int = 1,
        channels: int = 3,
        split: str = "all",
        skip_bad: bool = False,
    ) -> None:
        check_split(split)
        self.root = Path(check_path("root", root))
        self.pictures = check_whole("pictures", pictures, 1)
        if pictures not in PICTURE_FOLDERS:
            raise ValueError(f"pictures must be 1 or 2 but got {pictures}")
        if isinstance(channels, bool) or channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3 but got {channels}")
        self._reader, self._masks = Pictures(channels), MaskFile()
        if not self.root.is_dir():
            what = "is a file" if self.root.exists() else "does not exist"
            raise FileNotFoundError(f"the data folder {self.root} {what}: {self._expected()}")
        self.notes: list[str] = []
        self._items, self._sizes, values = self._listed(skip_bad)
        self._binary = pictures == 2 or white_is_one(values)
        highest = max(values - {UNLABELLED}, default=0)
        if self._binary and 255 in values:
            if pictures == 1:
                self.notes.append("all masks hold but 0 and 255: 255 is taken as class 1")
            highest = max(highest, 1)
        self.class_names = CHANGE if pictures == 2 else self._names(highest)
        if pictures == 2 and not (values <= _BINARY or values <= {0, 1}):
            raise ValueError(
                f"masks of {self.root} hold the values {some(sorted(values))}: expected 0 (unchanged) and 1 or 255 "
                "(changed)"
            )
        self._chosen = [
            i for i, (_, _, held) in enumerate(self._items) if split in ("all", ("train", "test")[held])
        ]
        self.files = tuple(self._items[i][:2] for i in self._chosen)
        if not self.files and split != "test":
            raise ValueError(f"no usable pictures are left in {self.root}")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        paths, mask = self.files[index]
        return torch.stack([self.picture(path) for path in paths]), self._mask(mask)

    def size(self, index: int) -> tuple[int, int]:
        """See `PixelData`."""
        return self._sizes[self._chosen[index]]

    def picture(self, path: Path) -> Tensor:
        """A picture file, uint8 `[C, H, W]`.

        Raises:
            ValueError: it cannot be read.
        """
        return as_tensor(self._reader.read(path))

    def digest(self) -> str:
        """See `PixelData`; of the whole folder, whatever the split."""
        every = [path for paths, mask, _ in self._items for path in (*paths, mask)]
        whole = sum(path.stat().st_size for path in every) <= SMALL_FOLDER
        return digest(self.root, every, whole=whole)

    def _expected(self) -> str:
        if self.pictures == 2:
            return "expected a folder with A/ (before), B/ (after) and masks/, in files of the same names"
        return "expected a folder with images/ and masks/, in files of the same names"

    def _listed(self, skip_bad: bool) -> tuple[list[Any], list[tuple[int, int]], set[int]]:
        """Items with whether they are held out, their sizes, and all values of the masks."""
        held = next((name for name in HELD_OUT_FOLDERS if (self.root / name).is_dir()), None)
        parts = [self.root]
        if (self.root / TRAIN_FOLDER).is_dir() and held is not None:
            parts = [self.root / TRAIN_FOLDER, self.root / held]
        items: list[Any] = []
        sizes: list[tuple[int, int]] = []
        values: set[int] = set()
        bad: list[str] = []
        for number, part in enumerate(parts):
            found = self._partners(part)
            marks = held_out_mask(torch.zeros(len(found)), HELD_OUT_EVERY).tolist()
            for (paths, mask), mark in zip(found, marks, strict=True):
                try:
                    size, seen = self._look(paths, mask)
                except ValueError as error:
                    if not skip_bad:
                        raise
                    bad.append(str(error))
                    continue
                items.append((paths, mask, bool(number) if len(parts) > 1 else mark))
                sizes.append(size)
                values |= seen
        if bad:
            warnings.warn(f"{len(bad)} bad items of {self.root} are left out: {some(bad)}", stacklevel=4)
        return items, sizes, values

    def _partners(self, part: Path) -> list[tuple[tuple[Path, ...], Path]]:
        """Pictures and masks of the same names."""
        tables = []
        for names in (*PICTURE_FOLDERS[self.pictures], MASK_FOLDERS):
            folder = next((part / name for name in names if (part / name).is_dir()), None)
            if folder is None:
                there = some(sorted(path.name for path in part.iterdir())) or "nothing"
                raise FileNotFoundError(
                    f"{part} has no folder {names[0]} (or {', '.join(names[1:])}) but {there}: {self._expected()}"
                )
            seen = walk(folder)
            self.notes += seen.notes()
            others = [path for path in seen.files if path.suffix.lower() not in IMAGE_SUFFIXES]
            if others:
                self.notes.append(
                    counted(others, "{} skipped", "file that is no picture", "files that are no pictures")
                )
            files = [path for path in seen.files if path.suffix.lower() in IMAGE_SUFFIXES]
            table = {path.relative_to(folder).with_suffix("").as_posix(): path for path in files}
            if len(table) < len(files):
                raise ValueError(
                    f"{folder} holds files that differ in nothing but their endings: keep one of each"
                )
            tables.append((folder, table))
        first, names_of_first = tables[0]
        for folder, table in tables[1:]:
            for missing, where in (
                (names_of_first.keys() - table, folder),
                (table.keys() - names_of_first, first),
            ):
                if missing:
                    raise ValueError(
                        f"{where} lacks a partner of {some(sorted(missing))}: expected the same names in all"
                    )
        return [
            (tuple(table[name] for _, table in tables[:-1]), tables[-1][1][name])
            for name in sorted(names_of_first)
        ]

    def _look(self, paths: Sequence[Path], mask: Path) -> tuple[tuple[int, int], set[int]]:
        sizes = {}
        for path in paths:
            picture = self._reader.read(path)
            sizes[path] = (picture.height, picture.width)
        values = self._masks.read(mask)
        sizes[mask] = tuple(values.shape)  # type: ignore[assignment]
        if len(set(sizes.values())) > 1:
            told = ", ".join(f"{path} {h} x {w}" for path, (h, w) in sizes.items())
            raise ValueError(f"pictures and mask differ in height and width: {told}")
        return sizes[mask], set(values.unique().tolist())

    def _mask(self, path: Path) -> Tensor:
        values = self._masks.read(path)
        return values.clamp(max=1) if self._binary else values

    def _names(self, highest: int) -> tuple[str, ...]:
        file = self.root / CLASS_FILE
        if not file.is_file():
            return tuple(str(number) for number in range(max(2, highest + 1)))
        names = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        if highest >= len(names):
            raise ValueError(
                f"{file} names {len(names)} classes and a mask holds {highest}: name all of them"
            )
        return tuple(names)


@check_kinds
class MaskFile:
    """Reads pictures whose values are the numbers of classes.

    Raises:
        ImportError: Pillow is missing.
    """

    def __init__(self) -> None:
        self._pil = require("PIL.Image", extra="zoo")

    def read(self, path: Path) -> Tensor:
        """The values of a mask of one channel or with a palette, uint8 `[H, W]`; of one bit 0 and 1.

        Raises:
            ValueError: it cannot be read, or is of another mode (the file is named).
        """
        try:
            with self._pil.open(path) as image:
                image.load()
                mode, size = image.mode, (image.height, image.width)
                held = bytearray(image.convert("L").tobytes() if mode == "1" else image.tobytes())
        # Pillow's parsers of damaged files raise nearly everything.
        except Exception as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise ValueError(f"cannot read the mask {path}: {reason}; {MEND}") from error
        if mode not in ("1", "L", "P"):
            raise ValueError(
                f"the mask {path} is of mode {mode}: expected one channel of 8 bits, or a palette, whose values are "
                "the numbers of the classes"
            )
        values = torch.frombuffer(held, dtype=torch.uint8).view(size)
        return values.clamp(max=1) if mode == "1" else values


def white_is_one(values: set[int]) -> bool:
    """Whether 255 is class 1 in masks that hold these values in all: there is no other class but 0."""
    return UNLABELLED in values and values <= _BINARY


def as_tensor(picture: Any) -> Tensor:
    """A PIL picture of mode L or RGB as uint8 `[C, H, W]`."""
    values = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return values.view(picture.height, picture.width, -1).permute(2, 0, 1)


@check_kinds
def open_pixels(
    source: str | os.PathLike[str],
    *,
    pictures: int,
    image_size: int,
    channels: int,
    split: str = "train",
    skip_bad: bool = False,
) -> PixelData:
    """Open what `arcore train --data` names for a model that labels pixels.

    Args:
        source: `"mnist_masks"` for one picture per item, `"mnist_changes"` for two (see `arcore.data.pasted`), or the
            path of a folder (see `PixelFolder`).
        pictures: per item, 1 or 2.
        image_size: pixels per side of the named ones; pictures of folders keep their size.
        channels: 1 (grey) or 3 (RGB).
        split: `"train"`, `"test"` or `"all"`.
        skip_bad: of folders.

    Raises:
        FileNotFoundError: `source` is neither a name nor a folder.
        ValueError: unusable files, or a data set of another number of pictures.
    """
    from arcore.data.pasted import load_mnist_changes, load_mnist_masks

    named = {"mnist_masks": (1, load_mnist_masks), "mnist_changes": (2, load_mnist_changes)}
    source = os.fspath(source)
    if is_name(source, named):
        own, load = named[source]
        if pictures not in (1, 2):
            raise ValueError(f"expected pictures to be 1 or 2 but got {pictures}")
        if own != pictures:
            other = next(name for name, (count, _) in named.items() if count == pictures)
            raise ValueError(
                f"the model takes {'pairs of pictures' if pictures == 2 else 'single pictures'}: use {other}, or a "
                "folder"
            )
        return load(split, image_size=image_size, channels=channels)
    close = difflib.get_close_matches(source, named, n=1)
    if close and not Path(source).exists():
        raise FileNotFoundError(
            f"there is neither a data set nor a folder {source!r}: did you mean {close[0]!r}?"
        )
    return PixelFolder(source, pictures=pictures, channels=channels, split=split, skip_bad=skip_bad)
