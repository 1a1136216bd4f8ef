"""The folder of a run: what it was started with, and a lock so that two runs never write into one folder."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from arcore._files import atomic_path
from arcore._version import __version__
from arcore.training.ranks import is_first

RECORD = "run.json"
LOCK = ".lock"


@contextmanager
def run_folder(
    out: Path, facts: Mapping[str, Any], check: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Own a run folder while the block runs; entered again by the same process, it changes nothing.

    Writes `run.json` at once: the facts, versions, commit, command line and when and where the run was started. Where
    nothing was made when the block fails, the record goes again, and so does a folder that was not there.

    Args:
        out: the folder.
        facts: what to remember, ready for JSON.
        check: called when the folder is this process's alone, before anything is written; raises to refuse it.

    Raises:
        ValueError: another process writes into the folder.
        OSError: the folder cannot be written.
    """
    if not is_first():
        yield
        return
    new = _make(out)
    before = {path.name for path in out.iterdir()}
    lock = FileLock(out / LOCK, timeout=0, is_singleton=True)
    nested = lock.is_locked
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"another run is writing into {out}: wait for it, or choose another --out ({out / LOCK} is locked)"
        ) from None
    try:
        if not nested:
            check()
            _write_record(out, facts)
            _OURS.add(out.resolve())
        yield
    except BaseException:
        if not nested and out.is_dir() and {path.name for path in out.iterdir()} - before <= {RECORD, LOCK}:
            # Nothing was made: the same command, mended, shall not find a run here.
            if RECORD not in before:
                (out / RECORD).unlink(missing_ok=True)
            if new:
                shutil.rmtree(out)
        raise
    finally:
        if not nested:
            # While it is held, so that nobody locks a file that is about to go.
            (out / LOCK).unlink(missing_ok=True)
        lock.release()


def read_record(out: Path) -> dict[str, Any] | None:
    """What `run.json` of a run folder says; None where there is none.

    Raises:
        ValueError: it is damaged.
    """
    path = out / RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise TypeError("it holds no table")
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"the file {path} is damaged ({error}): start the run anew in another folder"
        ) from error
    return record


def _make(out: Path) -> bool:
    """Make the folder; whether it was not there."""
    new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(
            f"cannot write into the folder {out}: {error.strerror}; choose another --out"
        ) from error
    return new


def _write_record(out: Path, facts: Mapping[str, Any]) -> None:
    record = {
        **facts,
        "command": shlex.join(_command()),
        "folder": os.getcwd(),
        "machine": socket.gethostname(),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {
            "arcore": __version__,
            "commit": _commit(),
            "torch": torch.__version__,
            "lightning": importlib.metadata.version("pytorch-lightning"),
            "python": platform.python_version(),
        },
    }
    with atomic_path(out / RECORD) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _command() -> list[str]:
    """The command line of this process, as it can be typed."""
    words = list(getattr(sys, "orig_argv", sys.argv))
    if words and Path(sys.argv[0]).name in ("arcore", "__main__.py"):
        return ["arcore", *sys.argv[1:]]
    return words


def _commit() -> str | None:
    """Commit of the source checkout that this package runs from."""
    here = Path(__file__).resolve().parent
    try:
        words = ["git", "-C", str(here), "rev-parse", "HEAD"]
        found = subprocess.run(words, capture_output=True, text=True, check=False, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None


def started_here(out: Path) -> bool:
    """Whether this process started the run in the folder, or went on with it."""
    return out.resolve() in _OURS


_OURS: set[Path] = set()
