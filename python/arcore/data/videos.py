"""A folder with one subfolder of videos per class: folders of frames, animated GIFs, and what PyAV decodes."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from arcore._optional import require
from arcore.data._pictures import Pictures
from arcore.data._walk import MEND, counted, digest, is_hidden, left_out, or_skip, some, walk
from arcore.data.image_folder import HELD_OUT_EVERY, IMAGE_SUFFIXES
from arcore.data.images import ImageDataset, check_split, held_out_mask
from arcore.nn.checks import check_path, check_whole

# Pictures that may be animated.
ANIMATED_SUFFIXES = frozenset({".gif", ".webp"})
CONTAINER_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"})
VIDEO_SUFFIXES = ANIMATED_SUFFIXES | CONTAINER_SUFFIXES


class VideoFolder(ImageDataset):
    """Clips of the videos in `root/<class name>/`.

    A video is a folder of frames (pictures, in the order of the numbers in their names: 2.png before 10.png), an
    animated .gif or .webp, or an .mp4, .avi, .mov, .mkv, .webm and the like, which the package PyAV decodes. Classes
    and files are taken in sorted order and links are followed. Of a video, as many clips are taken as fit one behind
    the other, and of a clip every `step`-th frame. Frames are scaled and cropped as `ImageFolder` does.

    All videos are decoded once when the folder is opened, to count their frames: what is damaged or too short is an
    error that names it, or with `skip_bad` a warning.

    Args:
        root: the folder.
        frames: of a clip.
        image_size: side length in pixels of the square frames that come out.
        channels: 1 (grey) or 3 (RGB). Transparent pixels become white.
        step: frames from one frame of a clip to the next; 1 takes all.
        split: `"all"`, `"train"`, or `"test"`: the clips of every tenth video of each class.
        skip_bad: leave out what cannot be used, with one warning that counts and names it.

    Attributes:
        clips: video and first frame of each clip.
        labels: int64 `[N]`, class number of each clip.
        skipped: what `skip_bad` left out, as pairs of path and reason.
        notes: sentences on what was not used and is no error.

    Raises:
        FileNotFoundError: `root` is not a folder.
        ImportError: Pillow is missing, or PyAV where a file needs it.
        TypeError: a size is no whole number.
        ValueError: no class folders, a class without videos, or one that is damaged or too short (named).
    """

    def __init__(
        self,
        root: str | Path,
        *,
        frames: int,
        image_size: int,
        channels: int = 3,
        step: int = 1,
        split: str = "all",
        skip_bad: bool = False,
    ) -> None:
        check_split(split)
        root = check_path("root", root)
        if isinstance(channels, bool) or channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3 but got {channels}")
        size = check_whole("image_size", image_size, 1, "pixel")
        self._frames, self._step = check_whole("frames", frames, 1), check_whole("step", step, 1, "frame")
        self.root, self.image_shape = Path(root), (self._frames, channels, size, size)
        self._pictures = Pictures(channels)
        self.skipped: list[tuple[Path, str]] = []
        self._skip_bad = skip_bad
        if not self.root.is_dir():
            what = "is a file" if self.root.exists() else "does not exist"
            raise FileNotFoundError(
                f"the data folder {root} {what}: expected a folder with one subfolder of videos per class"
            )
        classes, self._files, notes = self._listing()
        self.class_names = tuple(classes)
        self.clips: list[tuple[_Video, int]] = []
        labels: list[int] = []
        for label, (name, videos) in enumerate(classes.items()):
            if len(videos) < HELD_OUT_EVERY:
                notes.append(f"the class {name} has {len(videos)} videos, too few to hold any out")
            held_out = held_out_mask(torch.zeros(len(videos)), HELD_OUT_EVERY).tolist()
            for video, held in zip(videos, held_out, strict=True):
                if split != "all" and held != (split == "test"):
                    continue
                starts = self._starts(video)
                self.clips += [(video, start) for start in starts]
                labels += [label] * len(starts)
        self.labels = torch.tensor(labels, dtype=torch.int64)
        self.notes = tuple(notes)
        if self.skipped:
            warnings.warn(left_out(str(root), self.skipped), stacklevel=2)
        if not self.clips and split != "test":
            raise ValueError(f"no usable videos are left in {root}")

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Clip `[frames, channels, image_size, image_size]`, float32 in [-1, 1], and its label."""
        video, start = self.clips[index]
        wanted = range(start, start + self._frames * self._step, self._step)
        size, pictures = self.image_shape[-1], []
        for number, picture in enumerate(self._decode(video)):
            if number in wanted:
                square = self._pictures.square(picture, size)
                pixels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8)
                pictures.append(pixels.view(size, size, -1).permute(2, 0, 1))
            if number >= wanted[-1]:
                break
        if len(pictures) < self._frames:
            raise ValueError(f"the video {video.path} has become shorter since it was opened")
        return torch.stack(pictures).to(torch.float32) / 127.5 - 1, int(self.labels[index])

    def digest(self) -> str:
        """See `ImageDataset`; of names, sizes and the bytes at three places of every file of the folder."""
        return digest(self.root, self._files, whole=False)

    def _starts(self, video: _Video) -> range:
        need = (self._frames - 1) * self._step + 1
        try:
            sizes = [picture.size for picture in self._decode(video)]
            if len(set(sizes)) > 1:
                raise ValueError(f"the frames of {video.path} have several sizes: {some(sorted(set(sizes)))}")
            if len(sizes) < need:
                raise ValueError(
                    f"the video {video.path} has {len(sizes)} frames but a clip takes {need}: move it away, or take "
                    "fewer frames"
                )
        except ValueError as error:
            self._bad(video.path, str(error))
            return range(0)
        span = self._frames * self._step
        return range(0, len(sizes) - need + 1, span)

    def _decode(self, video: _Video) -> Iterator[Any]:
        if video.frames:
            for path in video.frames:
                yield self._pictures.read(path)
        elif video.path.suffix.lower() in ANIMATED_SUFFIXES:
            yield from self._pictures.frames(video.path)
        else:
            av = require("av", extra="video")
            try:
                with av.open(str(video.path)) as container:
                    for frame in container.decode(video=0):
                        yield self._pictures.flatten(frame.to_image())
            # PyAV's errors, and IndexError where there is no stream of pictures.
            except (av.error.FFmpegError, IndexError, OSError) as error:
                reason = str(error).partition("\n")[0] or type(error).__name__
                raise ValueError(f"cannot read the video {video.path}: {reason}; {MEND}") from error

    def _listing(self) -> tuple[dict[str, list[_Video]], list[Path], list[str]]:
        found = walk(self.root)
        for link in found.dangling:
            self._bad(link, f"{link}: the target of the link does not exist")
        folders = sorted(
            path.name for path in self.root.iterdir() if path.is_dir() and not is_hidden(path.name)
        )
        if not folders:
            raise ValueError(
                f"the data folder {self.root} has no class subfolders: put the videos into {self.root}/<class name>/"
            )
        classes: dict[str, dict[str, list[Path]]] = {name: {} for name in folders}
        beside, used = [], []
        for path in found.files:
            parts = path.relative_to(self.root).parts
            suffix = path.suffix.lower()
            if len(parts) == 1:
                beside.append(path)
                continue
            if len(parts) == 2 and suffix in VIDEO_SUFFIXES:
                classes[parts[0]][parts[1]] = [path]
            elif len(parts) == 3 and suffix in IMAGE_SUFFIXES:
                classes[parts[0]].setdefault(parts[1], []).append(path)
            else:
                self._bad(
                    path,
                    f"{path} is no video ({', '.join(sorted(VIDEO_SUFFIXES))}) in a class folder and no frame in a "
                    "folder of frames below one: move it away",
                )
                continue
            used.append(path)
        videos: dict[str, list[_Video]] = {}
        for name, members in classes.items():
            if not members:
                self._bad(self.root / name, f"the class folder {self.root / name} holds no videos")
                continue
            videos[name] = [_video(self.root / name / member, members[member]) for member in sorted(members)]
        notes = found.notes()
        if beside:
            notes.append(counted(beside, "{} beside the class folders not read", "file", "files"))
        return videos, used, notes

    def _bad(self, path: Path, reason: str) -> None:
        if not self._skip_bad:
            raise ValueError(or_skip(reason))
        self.skipped.append((path, reason))


class _Video(NamedTuple):
    """A file, or a folder of frames in order."""

    path: Path
    frames: tuple[Path, ...]


def _video(path: Path, files: list[Path]) -> _Video:
    return _Video(path, () if files == [path] else tuple(sorted(files, key=_by_number)))


def _by_number(path: Path) -> tuple[list[tuple[int, int, str]], str]:
    """Numbers in names count as numbers, so that frame 10 comes after frame 2."""
    parts = re.findall(r"\d+|\D+", path.name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts], path.name
