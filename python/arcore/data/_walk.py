"""Every file below a folder, links followed, with an account of what was left out."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

NAMES_SHOWN = 3
# What is left out is named up to here: `arcore data check` names all of it.
LEFT_OUT_SHOWN = 20
# How an error about one file ends.
MEND = "mend it or move it away"
SKIP = "or leave out all such files with --skip-bad (skip_bad)"
# What Windows and macOS put into folders by themselves, beside files whose names begin with a dot.
LITTER = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx"})
# The digest of files reads this much at the start, in the middle and at the end of each, where it does not read all.
SAMPLE = 4096


@dataclass
class Found:
    """What `walk` saw.

    Attributes:
        files: regular files, sorted by their path below the folder.
        hidden: files and folders whose names begin with a dot, and what systems put there by themselves (`Thumbs.db`);
            they are not looked at.
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


def is_hidden(name: str) -> bool:
    """Whether an entry of that name is none of the data's: its name begins with a dot, or a system put it there."""
    return name.startswith(".") or name.lower() in LITTER


def _walk(folder: Path, around: tuple[tuple[int, int], ...], found: Found) -> None:
    with os.scandir(folder) as entries:
        for entry in entries:
            path = folder / entry.name
            if is_hidden(entry.name):
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


def or_skip(reason: str) -> str:
    """What is wrong with a file, with the second way out where the first is to mend it."""
    return f"{reason}, {SKIP}" if reason.endswith(MEND) else reason


def left_out(what: str, skipped: Sequence[tuple[Path, str]]) -> str:
    """The warning about files that are not used.

    Args:
        what: they belong to, such as "the folder pictures".
        skipped: path of each and what is wrong with it, which may name the path too and may end with advice.
    """
    lines = []
    for path, reason in skipped[:LEFT_OUT_SHOWN]:
        said = reason.removesuffix(MEND).rstrip(":; ")
        lines.append(
            said
            if str(path) in said
            else f"{path}{' ' if said.startswith(('is ', 'has ', 'holds ')) else ': '}{said}"
        )
    rest = len(skipped) - len(lines)
    if rest > 0:
        lines.append(f"and {rest} more, which `arcore data check` names")
    number = f"{len(skipped)} {'entry' if len(skipped) == 1 else 'entries'}"
    return f"{number} of {what} left out: {'; '.join(lines)}"


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
