"""`arcore data`"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from arcore.cli._parse import PlainParser
from arcore.data import VideoFolder, load_text, read_tables
from arcore.data._walk import walk
from arcore.data.image_folder import IMAGE_SUFFIXES, ImageFolder
from arcore.data.series import TABLE_SUFFIXES
from arcore.data.text import TEXT_SUFFIXES
from arcore.data.videos import CONTAINER_SUFFIXES

DESCRIPTION = """\
Look through data before training on them: every file is read to its end, and what cannot be used is named.
The exit code is 1 when something is bad.

Example: arcore data check my_images/"""
SHOWN = 20


def main(argv: Sequence[str]) -> int:
    parser = PlainParser("data", DESCRIPTION)
    parser.add_argument("action", choices=["check"], help="what to do")
    parser.add_argument("path", type=Path, metavar="PATH", help="folder or file")
    parser.add_argument(
        "--kind", choices=sorted(KINDS), help="what it is (default: by the endings of the files)"
    )
    parser.add_argument(
        "--nested",
        choices=["outer", "inner"],
        help="which folders are the classes, where class folders hold folders",
    )
    options = parser.parse_args(argv)
    if not options.path.exists():
        raise FileNotFoundError(f"{options.path} does not exist: expected a folder or a file")
    kind = options.kind or _kind(options.path)
    lines, bad = KINDS[kind](options.path, options.nested)
    print("\n".join(lines))
    for line in bad[:SHOWN]:
        print(f"bad: {line}")
    if len(bad) > SHOWN:
        print(f"bad: and {len(bad) - SHOWN} more")
    print(f"{len(bad)} bad entries" if bad else "all of it can be read")
    return 1 if bad else 0


def _images(path: Path, nested: str | None) -> tuple[list[str], list[str]]:
    with warnings.catch_warnings():
        # What is left out is printed below.
        warnings.simplefilter("ignore", UserWarning)
        images = ImageFolder(path, image_size=8, nested=nested, skip_bad=True)  # type: ignore[arg-type]
    bad = [f"{file}: {reason}" if str(file) not in reason else reason for file, reason in images.skipped]
    bad += [reason for _, reason in images.check()]
    lines = [f"{len(images)} images in {len(images.class_names)} classes"]
    counts = Counter(images.labels.tolist())
    lines += [f"  {name}: {counts[label]}" for label, name in enumerate(images.class_names[:SHOWN])]
    if len(images.class_names) > SHOWN:
        lines.append(f"  and {len(images.class_names) - SHOWN} more")
    return [*lines, *images.notes, f"digest {images.digest()}"], bad


def _text(path: Path, nested: str | None) -> tuple[list[str], list[str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        text = load_text(path, skip_bad=True)
    lines = [f"{len(text.train)} characters to train on, {len(text.test)} held out"]
    return [*lines, *text.notes, f"digest {text.digest}"], [
        f"{file}: {reason}" for file, reason in text.skipped
    ]


def _videos(path: Path, nested: str | None) -> tuple[list[str], list[str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        videos = VideoFolder(path, frames=1, image_size=8, skip_bad=True)
    counts = Counter(videos.labels.tolist())
    lines = [f"{len(videos)} frames of videos in {len(videos.class_names)} classes"]
    lines += [f"  {name}: {counts[label]}" for label, name in enumerate(videos.class_names[:SHOWN])]
    return [*lines, *videos.notes, f"digest {videos.digest()}"], [reason for _, reason in videos.skipped]


def _series(path: Path, nested: str | None) -> tuple[list[str], list[str]]:
    try:
        series = read_tables(path)
    except ValueError as error:
        return [], [str(error)]
    lines = [f"{len(series)} series of {', '.join(series[0].columns)}"]
    for one in series[:SHOWN]:
        missing = int(one.values.isnan().sum())
        lines.append(f"  {one.name}: {len(one.values)} rows, {missing} values missing")
    return lines, []


KINDS: dict[str, Callable[[Path, str | None], tuple[list[str], list[str]]]] = {
    "series": _series,
    "videos": _videos,
    "images": _images,
    "text": _text,
}
_SUFFIXES = {
    "images": IMAGE_SUFFIXES,
    "text": TEXT_SUFFIXES,
    "videos": CONTAINER_SUFFIXES,
    "series": TABLE_SUFFIXES,
}


def _kind(path: Path) -> str:
    """By the endings of most files."""
    files = walk(path).files if path.is_dir() else [path]
    counts = {
        kind: sum(file.suffix.lower() in suffixes for file in files) for kind, suffixes in _SUFFIXES.items()
    }
    kind = max(counts, key=lambda name: counts[name])
    if not counts[kind]:
        raise ValueError(
            f"{path} holds no images, videos, text or tables that are known by their endings: say --kind"
        )
    return kind
