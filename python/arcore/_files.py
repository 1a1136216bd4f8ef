"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import gzip
import os
import secrets
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file under a temporary name in the same folder and rename it when the block ends well.

    A missing folder is made. The temporary name keeps the file's ending, for libraries that go by it. Where a link
    is, the file that it leads to is replaced; into a device or a pipe, such as /dev/null, the complete file is written.

    Args:
        path: the final name; an older file there stays until the new one is complete.

    Yields:
        The temporary file, empty.

    Raises:
        OSError: the folder cannot be written, or `path` is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"cannot write the file {path}: there is a folder of that name")
    if path.exists() and not path.is_file():
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder) / f"file{path.suffix}"
            temporary.touch()
            yield temporary
            try:
                with temporary.open("rb") as source, path.open("wb", buffering=0) as place:
                    shutil.copyfileobj(source, place)
            except OSError as error:
                raise _cannot_write(path, error) from error
        return
    if path.is_symlink():
        path = path.resolve()
    temporary = _temporary_name(path)
    _make_folder(path.parent, path)
    try:
        temporary.touch(exist_ok=False)
    except OSError as error:
        raise _cannot_write(path, error) from error
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Fill a folder under a temporary name next to its place and rename it when the block ends well.

    Args:
        path: the final name; an older folder there is replaced as a whole.

    Yields:
        The temporary folder, empty.

    Raises:
        OSError: the parent folder cannot be written, or `path` is a file.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"cannot write the folder {path}: there is a file of that name")
    temporary = _temporary_name(path)
    _make_folder(path.parent, path)
    try:
        temporary.mkdir()
    except OSError as error:
        raise _cannot_write(path, error) from error
    try:
        yield temporary
        if path.exists():
            # rename(2) does not replace a folder that holds something.
            older = _temporary_name(path)
            path.rename(older)
            try:
                temporary.rename(path)
            except BaseException:
                older.rename(path)
                raise
            shutil.rmtree(older)
        else:
            temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_file(path: str | os.PathLike[str], hint: str) -> Path:
    """A path that leads to a file.

    Raises:
        FileNotFoundError: there is nothing; the message ends with the hint.
        IsADirectoryError: it is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: {hint}")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: {hint}")
    return path


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a UTF-8 file, also of one packed by gzip; a byte order mark at its start is no part of it.

    Line ends of other systems become ``\\n``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no UTF-8 text, or a damaged gzip file; the message names file and line.
        OSError: it cannot be read.
    """
    path = Path(path)
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: the gzip file is damaged: {error}") from error
    wide = data[:2] in (b"\xff\xfe", b"\xfe\xff")
    try:
        text = data.decode("utf-8-sig")
        place = text.find("\0")
        bad, line = "a zero byte" if place >= 0 else "", text.count("\n", 0, max(place, 0)) + 1
    except UnicodeDecodeError as error:
        bad = f"byte {data[error.start]:#04x} at offset {error.start}"
        line = data.count(b"\n", 0, error.start) + 1
    if bad:
        kind = " (it looks like UTF-16)" if wide else ""
        raise ValueError(f"{path}:{line}: the file is not UTF-8 text{kind}: {bad}; save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: str | os.PathLike[str]) -> list[tuple[int, str]]:
    """The lines of a text file with their numbers from 1, without line ends; errors are those of `read_text`.

    Nothing but line ends divides lines: form feeds and the line separators of Unicode may stand in a name.
    """
    return list(enumerate(read_text(path).removesuffix("\n").split("\n"), 1))


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.stem}.{secrets.token_hex(4)}.tmp{path.suffix}")


def _make_folder(folder: Path, path: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> OSError:
    return type(error)(f"cannot write {path}: {error.strerror}; choose another place")
