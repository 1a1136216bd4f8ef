"""Output places are tried before the work starts."""

from __future__ import annotations

import tempfile
from pathlib import Path


def writable_folder(folder: Path) -> Path:
    """Create the folder if need be and make sure that files can be written into it.

    Raises:
        OSError: it cannot be created or written; says which folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"cannot write into the folder {folder} ({error.strerror}): choose another --out"
        ) from error
    return folder


def writable_file(path: Path) -> Path:
    """The same for the folder of a file.

    Raises:
        OSError: the file cannot be written.
    """
    if path.is_dir():
        raise OSError(f"{path} is a folder but --out must be a file")
    writable_folder(path.parent)
    return path
