"""Every file below a folder, links followed, with an account of what was left out."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

NAMES_SHOWN = 3
# The digest of files reads this much at the start, in the middle and at the end of each, where it does not read all.
SAMPLE = 4096


@dataclass
class Found:
    """What `walk` saw.

    Attributes:
        files: regular files, sorted by their path below the folder.
        hidden: files and folders whose names begin with a dot; they are not looked at.
        dangling: links whose target does not exist.
        cycles: links to a folder that they lie in; they are not followed.
        special: pipes, sockets and devices.
    """

    files: list[Path] = field(default_factory=list)
    hidden: list[Path] = field(default_factory=list)
    dangling: list[Path] = field(default_factory=list)
    cycles: list[Path] = field(default_factory=list)
    special: list[Path] = field(default_factory=list)

    def notes(self) -> list[str]:
        """One sentence for each kind of entry that was left out, with its number and the first names."""
        kinds = (
            (self.hidden, "{} skipped", "hidden entry", "hidden entries"),
            (
                self.cycles,
                "{} not followed",
                "link back to a folder around it",
                "links back to folders around them",
            ),
            (
                self.special,
                "{} skipped",
                "entry that is no regular file",
                "entries that are no regular files",
            ),
        )
        return [counted(paths, text, one, many) for paths, text, one, many in kinds if paths]


def is_name(source: str | Path, names: Collection[str]) -> bool:
    """Whether a data set of the package is meant, by its name; warns where a file or folder here has that name too."""
    name = str(source)
    if name not in names:
        return False
    if (here := Path(name)).exists():
        warnings.warn(
            f"{name!r} is the data set of that name, not what is called so here: for that, write {here.absolute()}",
            stacklevel=3,
        )
    return True


def walk(root: Path) -> Found:
    """Look at all entries of a folder and of the folders below it.

    Links to files and folders are followed. The same folder may be reached, and counted, more than once; a link that
    leads back to a folder it lies in is not followed.

    Args:
        root: the folder.

    Raises:
        OSError: a folder cannot be listed (named).
    """
    found = Found()
    status = root.stat()
    _walk(root, ((status.st_dev, status.st_ino),), found)
    for paths in (found.files, found.hidden, found.dangling, found.cycles, found.special):
        paths.sort(key=lambda path: path.relative_to(root).as_posix())
    return found


def _walk(folder: Path, around: tuple[tuple[int, int], ...], found: Found) -> None:
    with os.scandir(folder) as entries:
        for entry in entries:
            path = folder / entry.name
            if entry.name.startswith("."):
                found.hidden.append(path)
                continue
            try:
                status = entry.stat()
            except FileNotFoundError:
                found.dangling.append(path)
                continue
            except OSError as error:
                # A link that leads to itself (ELOOP); what cannot be looked at for another reason is an error.
                if not entry.is_symlink() or isinstance(error, PermissionError):
                    raise
                found.dangling.append(path)
                continue
            if entry.is_dir():
                place = (status.st_dev, status.st_ino)
                if place in around:
                    found.cycles.append(path)
                else:
                    _walk(path, (*around, place), found)
            elif entry.is_file():
                found.files.append(path)
            else:
                found.special.append(path)


def some(names: Iterable[object]) -> str:
    """The first names of many."""
    every = [str(name) for name in names]
    rest = len(every) - NAMES_SHOWN
    return ", ".join(every[:NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def counted(paths: Sequence[object], text: str, one: str, many: str) -> str:
    """`text` with the number of paths in its place, and the first paths after it."""
    number = f"{len(paths)} {one if len(paths) == 1 else many}"
    return f"{text.format(number)}: {some(paths)}"


def digest(root: Path, files: Iterable[Path], *, whole: bool) -> str:
    """Identifies files by their names below `root`, their sizes and their bytes; times and links do not count.

    Args:
        root: of the names.
        files: in the order in which they count.
        whole: read all bytes, not only 4 kB at the start, in the middle and at the end of each file.

    Returns:
        16 hexadecimal digits.
    """
    state = hashlib.blake2b(digest_size=8)
    for path in files:
        size = path.stat().st_size
        name = path.relative_to(root).as_posix()
        state.update(f"{name}\0{size}\0".encode(errors="surrogateescape"))
        with path.open("rb") as file:
            if whole or size <= 3 * SAMPLE:
                while block := file.read(2**20):
                    state.update(block)
                continue
            for start in (0, (size - SAMPLE) // 2, size - SAMPLE):
                file.seek(start)
                state.update(file.read(SAMPLE))
    return state.hexdigest()
