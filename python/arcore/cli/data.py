"""`arcore data`"""

from __future__ import annotations

import warnings
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from arcore.cli._parse import PlainParser
from arcore.data import Series, VideoFolder, load_text, open_series
from arcore.data._walk import walk
from arcore.data.image_folder import IMAGE_SUFFIXES, ImageFolder
from arcore.data.series import TABLE_SUFFIXES
from arcore.data.text import TEXT_SUFFIXES
from arcore.data.videos import CONTAINER_SUFFIXES, VIDEO_SUFFIXES

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
    parser.add_argument("--time", metavar="COLUMN", help="of a table: the column of dates or whole numbers")
    parser.add_argument("--group", metavar="COLUMN", help="of a table: the column that tells series apart")
    parser.add_argument(
        "--columns",
        metavar="COLUMN",
        nargs="+",
        help="of a table: the columns of values (default: all others)",
    )
    options = parser.parse_args(argv)
    if not options.path.exists():
        raise FileNotFoundError(f"{options.path} does not exist: expected a folder or a file")
    kind = options.kind or _kind(options.path)
    lines, bad = KINDS[kind](options.path, options)
    print("\n".join(lines))
    for line in bad[:SHOWN]:
        print(f"bad: {line}")
    if len(bad) > SHOWN:
        print(f"bad: and {len(bad) - SHOWN} more")
    print(f"{len(bad)} bad entries" if bad else "all of it can be read")
    return 1 if bad else 0


def _images(path: Path, options: Namespace) -> tuple[list[str], list[str]]:
    with warnings.catch_warnings():
        # What is left out is printed below.
        warnings.simplefilter("ignore", UserWarning)
        images = ImageFolder(path, image_size=8, nested=options.nested, skip_bad=True)
    bad = [f"{file}: {reason}" if str(file) not in reason else reason for file, reason in images.skipped]
    bad += [reason for _, reason in images.check()]
    lines = [f"{len(images)} images in {len(images.class_names)} classes"]
    counts = Counter(images.labels.tolist())
    lines += [f"  {name}: {counts[label]}" for label, name in enumerate(images.class_names[:SHOWN])]
    if len(images.class_names) > SHOWN:
        lines.append(f"  and {len(images.class_names) - SHOWN} more")
    if options.kind is None and any(file.suffix.lower() in VIDEO_SUFFIXES for file in walk(path).files):
        lines.append("taken as images: --kind videos looks at them as videos")
    return [*lines, *images.notes, f"digest {images.digest()}"], bad


def _text(path: Path, options: Namespace) -> tuple[list[str], list[str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        text = load_text(path, skip_bad=True)
    lines = [f"{len(text.train)} characters to train on, {len(text.test)} held out"]
    return [*lines, *text.notes, f"digest {text.digest}"], [
        f"{file}: {reason}" for file, reason in text.skipped
    ]


def _videos(path: Path, options: Namespace) -> tuple[list[str], list[str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        videos = VideoFolder(path, frames=1, image_size=8, skip_bad=True)
    counts = Counter(videos.labels.tolist())
    lines = [f"{len(videos)} frames of videos in {len(videos.class_names)} classes"]
    lines += [f"  {name}: {counts[label]}" for label, name in enumerate(videos.class_names[:SHOWN])]
    return [*lines, *videos.notes, f"digest {videos.digest()}"], [reason for _, reason in videos.skipped]


def _series(path: Path, options: Namespace) -> tuple[list[str], list[str]]:
    files, lines, bad = [path], [], []
    if path.is_dir():
        found = walk(path)
        files = [file for file in found.files if file.suffix.lower() in TABLE_SUFFIXES]
        bad += [f"{file}: no table" for file in found.files if file not in files]
        bad += [f"{file}: the target of the link does not exist" for file in found.dangling]
    every: list[Series] = []
    for file in files:
        try:
            opened = open_series(file, time=options.time, group=options.group, columns=options.columns)
        except ValueError as error:
            bad.append(str(error))
            continue
        if opened.inferred_time is not None and not every:
            lines.append(f"the column {opened.inferred_time!r} orders the rows")
        every += opened.series
    columns = {one.columns: one.name for one in every}
    if len(columns) > 1:
        bad.append("; ".join(f"{name} has the columns {', '.join(found)}" for found, name in columns.items()))
    lines.append(f"{len(every)} series of {', '.join(every[0].columns) if every else 'nothing'}")
    for one in every[:SHOWN]:
        missing = {
            name: int(count)
            for name, count in zip(one.columns, one.values.isnan().sum(0), strict=True)
            if count
        }
        holes = ", ".join(f"{count} of {name!r}" for name, count in missing.items())
        lines.append(
            f"  {one.name}: {len(one.values)} rows, {f'missing values: {holes}' if holes else 'none missing'}"
        )
    if len(every) > SHOWN:
        lines.append(f"  and {len(every) - SHOWN} more")
    return lines, bad


KINDS: dict[str, Callable[[Path, Namespace], tuple[list[str], list[str]]]] = {
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
