"""Output places are tried before the work starts. Nothing is created until there is something to write."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def check_folder(folder: Path) -> None:
    """Make sure that a folder can be created, or written if it is there.

    Raises:
        OSError: it cannot; the message says why.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise OSError(
            f"cannot write into the folder {folder} ({there}: {error.strerror}): choose another --out"
        ) from error


def check_file(path: Path, option: str = "--out") -> None:
    """Make sure that a file can be written.

    Raises:
        OSError: it cannot; the message says why.
    """
    if path.is_dir():
        raise OSError(f"{path} is a folder but {option} must name a file")
    if path.exists() and not path.is_file() and os.access(path, os.W_OK):
        return  # a device or a pipe
    check_folder(path.parent)
