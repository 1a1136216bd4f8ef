"""`arcore data`"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from arcore.cli._parse import PlainParser
from arcore.data.image_folder import ImageFolder

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


KINDS: dict[str, Callable[[Path, str | None], tuple[list[str], list[str]]]] = {"images": _images}


def _kind(path: Path) -> str:
    return "images"
