"""A folder with one subfolder of images per class, read lazily."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from arcore.data._pictures import Pictures
from arcore.data._walk import MEND, Found, counted, digest, is_hidden, left_out, or_skip, some, walk
from arcore.data.images import ImageDataset, check_split, held_out_mask
from arcore.nn.checks import check_path, check_whole

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
HELD_OUT_EVERY = 10
# Folders up to this size are decoded when they are opened, and their digest covers every byte.
SMALL_FOLDER = 2**28
TRAIN_FOLDER = "train"
HELD_OUT_FOLDERS = ("val", "valid", "validation", "test")


class ImageFolder(ImageDataset):
    """Images in `root/<class name>/*.png` (or jpg, webp, bmp, tiff, gif, ppm, pgm), or in ImageNet's layout.

    ImageNet's layout is `root/train/<class name>/` with `root/val/<class name>/` (or valid, validation, test) beside
    it: where `train` and one of these hold folders only, the second is the held-out part and the classes are those of
    the first.

    Classes are numbered by their sorted folder names and images are taken in sorted order, so the dataset is the
    same on every machine. Links are followed. Each image is scaled so that its shorter side equals `image_size`
    (antialiased) and then centre-cropped; a camera's rotation mark is obeyed; of several frames the first is taken.

    Nothing is left out without a word: hidden entries, which are skipped, are counted in `notes`; what cannot be used
    is an error that names the file, or with `skip_bad` a warning. Files are looked at when the folder is opened: up to
    256 MB in all they are decoded; in larger folders headers are read, and the end of files of the formats that mark it
    (JPEG, PNG, GIF, WebP). `check` decodes all of them.

    Grey pictures of 16 bits are scaled, floats are taken where they stay within 0 and 1. Other floats, 32-bit and
    signed integers are refused, as the files do not say what black and white are; `value_range` does.

    Args:
        root: the folder.
        image_size: side length in pixels of the square images that come out.
        channels: 1 (grey) or 3 (RGB). Transparent pixels become white.
        split: `"all"`, `"train"`, or `"test"`: the held-out folder, or else every tenth image of each class.
        nested: what a class folder is that holds no images itself but several folders of images: None refuses it,
            `"outer"` makes all images below it one class, `"inner"` makes each folder below a class of its own, named
            like `outer/inner`.
        skip_bad: leave out what cannot be used (damaged files, files that are no images, dangling links, class folders
            without images) with one warning that counts and names it.
        value_range: black and white of pictures deeper than 8 bits; values beyond are clipped.

    Attributes:
        files: paths of this split.
        labels: int64 `[N]`, class number of each.
        skipped: what `skip_bad` left out, as pairs of path and reason.
        notes: sentences on what was not used and is no error.

    Raises:
        FileNotFoundError: `root` is not a folder.
        ValueError: no class folders, a class without images, nested classes, or a file that cannot be used (named).
        TypeError: `image_size` is no whole number.
        ImportError: Pillow is missing.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        image_size: int,
        channels: int = 3,
        split: str = "all",
        nested: Literal["outer", "inner"] | None = None,
        skip_bad: bool = False,
        value_range: tuple[float, float] | None = None,
    ) -> None:
        check_split(split)
        root = check_path("root", root)
        if isinstance(channels, bool) or channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3 but got {channels}")
        if nested not in (None, "outer", "inner"):
            raise ValueError(f"nested must be 'outer', 'inner' or None but got {nested!r}")
        size = check_whole("image_size", image_size, 1, "pixel")
        self.root = Path(root)
        self.image_shape = (channels, size, size)
        self._pictures = Pictures(channels, value_range)
        listing = _Listing(self.root, nested, skip_bad)
        self.class_names = listing.class_names
        self.skipped: list[tuple[Path, str]] = listing.skipped
        self._everything = tuple(image.path for image in listing.images)
        self._bytes = sum(path.stat().st_size for path in self._everything)
        images = [image for image in listing.images if split == "all" or image.held_out == (split == "test")]
        several: list[Path] = []
        usable = []
        checked = self._look(images, whole_files=self._bytes <= SMALL_FOLDER)
        for image, found in zip(images, checked, strict=True):
            if isinstance(found, ValueError):
                if not skip_bad:
                    raise ValueError(or_skip(str(found)))
                self.skipped.append((image.path, str(found)))
            else:
                usable.append(image)
                if found > 1:
                    several.append(image.path)
        self.files = tuple(image.path for image in usable)
        self.labels = torch.tensor([image.label for image in usable], dtype=torch.int64)
        if several:
            listing.notes.append(
                counted(several, "{} of which only the first frame is used", "file", "files")
            )
        self.notes: tuple[str, ...] = tuple(listing.notes)
        if self.skipped:
            part = {"train": " (training part)", "test": " (held-out part)"}.get(split, "")
            warnings.warn(left_out(f"{self.root}{part}", self.skipped), stacklevel=2)
        if not self.files and split != "test":
            raise ValueError(f"no usable images are left in {self.root}")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        channels, size, _ = self.image_shape
        square = self._pictures.square(self._pictures.read(self.files[index]), size)
        pixels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8)
        pixels = pixels.view(size, size, channels).permute(2, 0, 1)
        return pixels.to(torch.float32) / 127.5 - 1, int(self.labels[index])

    def digest(self) -> str:
        """Identifies the content of the whole folder, whatever the split, the size and the place on disk.

        It covers names below `root`, sizes, and all bytes where the folder has up to 256 MB; of larger folders 4 kB
        each at the start, in the middle and at the end of every file. Times and links do not count.

        Returns:
            16 hexadecimal digits.
        """
        return digest(self.root, self._everything, whole=self._bytes <= SMALL_FOLDER)

    def check(self) -> list[tuple[Path, str]]:
        """Decode every file of this split.

        Returns:
            Path and reason of each file that cannot be used; empty when all are fine.
        """
        images = [
            _Image(path, int(label), False) for path, label in zip(self.files, self.labels, strict=True)
        ]
        found = self._look(images, whole_files=True)
        return [
            (image.path, str(result))
            for image, result in zip(images, found, strict=True)
            if isinstance(result, ValueError)
        ]

    def _look(self, images: Sequence[_Image], *, whole_files: bool) -> Iterable[int | ValueError]:
        """The number of frames of each image, or what is wrong with it, in order."""

        def look(image: _Image) -> int | ValueError:
            try:
                return self._pictures.check(image.path, whole=whole_files)
            except ValueError as error:
                return error

        # Decoders work outside Python's lock.
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            return list(pool.map(look, images))


class _Image(NamedTuple):
    path: Path
    label: int
    held_out: bool


class _Listing:
    """What lies in a folder of classes: images with label and split, before any of them is opened."""

    def __init__(self, root: Path, nested: str | None, skip_bad: bool) -> None:
        self.root, self.nested, self.skip_bad = root, nested, skip_bad
        self.skipped: list[tuple[Path, str]] = []
        self.notes: list[str] = []
        self.images: list[_Image] = []
        if not root.is_dir():
            what = "is a file" if root.exists() else "does not exist"
            raise FileNotFoundError(
                f"the data folder {root} {what}: expected a folder with one subfolder of images per class"
            )
        found = walk(root)
        self._refuse_useless(found)
        self.notes += found.notes()
        parts = self._parts(found)
        if parts is None:
            classes = self._classes(root, found.files)
            self.class_names = tuple(classes)
            for label, files in enumerate(classes.values()):
                held_out = held_out_mask(torch.zeros(len(files)), HELD_OUT_EVERY).tolist()
                self.images += [_Image(path, label, held) for path, held in zip(files, held_out, strict=True)]
                if len(files) < HELD_OUT_EVERY:
                    self.notes.append(
                        f"the class {self.class_names[label]} has fewer than {HELD_OUT_EVERY} images, too few to hold "
                        f"any out: every {HELD_OUT_EVERY}th is"
                    )
            return
        train, held = parts
        classes = self._classes(root / train, found.files)
        self.class_names = tuple(classes)
        others = self._classes(root / held, found.files)
        strange = [name for name in others if name not in classes]
        if strange:
            raise ValueError(
                f"{root / held} has classes that {root / train} has not: {some(strange)}; both need the same names"
            )
        for part, group in ((False, classes), (True, others)):
            for name, files in group.items():
                label = self.class_names.index(name)
                self.images += [_Image(path, label, part) for path in files]

    def _refuse_useless(self, found: Found) -> None:
        """Files that are no images and dangling links: an error, or left out."""
        for path in found.dangling:
            self._bad(path, "the target of the link does not exist")
        usable = []
        top_level = []
        for path in found.files:
            if path.suffix.lower() in IMAGE_SUFFIXES:
                usable.append(path)
            elif path.parent == self.root:
                top_level.append(path)
            else:
                known = ", ".join(sorted(IMAGE_SUFFIXES))
                self._bad(path, f"is not an image file (known endings: {known})")
        if top_level:
            self.notes.append(counted(top_level, "{} beside the class folders not read", "file", "files"))
        found.files = usable

    def _parts(self, found: Found) -> tuple[str, str] | None:
        """Names of the folders for training and for what is held out, where the layout is ImageNet's."""
        names = {path.name: path for path in self.root.iterdir() if path.is_dir()}
        held = [name for name in HELD_OUT_FOLDERS if name in names]
        if TRAIN_FOLDER not in names or not held:
            return None
        direct = {path.parent for path in found.files}
        flat = [name for name in (TRAIN_FOLDER, *held) if names[name] in direct]
        if flat:
            raise ValueError(
                f"the folders {TRAIN_FOLDER} and {', '.join(held)} of {self.root} look like parts of a data set, but "
                f"{some(flat)} holds images without class folders: put them into {self.root / flat[0]}/<class name>/"
            )
        rest = sorted(name for name in names if name not in (TRAIN_FOLDER, held[0]) and not is_hidden(name))
        if rest:
            self.notes.append(f"folders beside {TRAIN_FOLDER} and {held[0]} not read: {some(rest)}")
        return TRAIN_FOLDER, held[0]

    def _classes(self, root: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
        """Files of each class, by class name in order."""
        folders = sorted(path.name for path in root.iterdir() if path.is_dir() and not is_hidden(path.name))
        if not folders:
            raise ValueError(
                f"the data folder {root} has no class subfolders: put the images into {root}/<class name>/, "
                "one subfolder per class (a single one is fine)"
            )
        classes: dict[str, list[Path]] = {}
        members: dict[str, list[Path]] = {name: [] for name in folders}
        loose = []
        for path in files:
            if not path.is_relative_to(root):
                continue
            first, *rest = path.relative_to(root).parts
            if rest:
                members[first].append(path)
            else:
                loose.append(path)
        for path in loose:
            self._bad(path, f"is an image beside the class folders of {root}, not in one of them")
        for name, paths in members.items():
            if not paths:
                self._bad(root / name, "holds no images: add some or remove the folder", "the class folder ")
                continue
            inner: dict[str, list[Path]] = {}
            for path in paths:
                inner.setdefault(path.relative_to(root / name).parts[0], []).append(path)
            direct = any(path.parent == root / name for path in paths)
            if direct or len(inner) == 1 or self.nested == "outer":
                classes[name] = paths
            elif self.nested == "inner":
                classes.update({f"{name}/{part}": group for part, group in inner.items()})
            else:
                raise ValueError(
                    f"the class folder {root / name} holds no images itself but {len(inner)} folders of images "
                    f"({some(inner)}): expected one folder of images per class; say --nested outer (nested='outer') if "
                    f"{name} is the class, or --nested inner if each of these folders is one"
                )
        return classes

    def _bad(self, path: Path, reason: str, what: str = "") -> None:
        if not self.skip_bad:
            advice = "" if what else f": {or_skip(MEND)}"
            raise ValueError(
                f"{what}{path}{'' if reason.startswith(('is', 'holds')) else ':'} {reason}{advice}"
            )
        self.skipped.append((path, reason))
