"""Finds cmake and ninja: on PATH, or in the PyPI packages of those names."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
from pathlib import Path

TOOLS = ("cmake", "ninja")
# What CMakeLists.txt asks for.
LEAST_CMAKE = (3, 24)


def requirement(name: str) -> str:
    """A tool as pip takes it."""
    return f"{name}>={'.'.join(map(str, LEAST_CMAKE))}" if name == "cmake" else name


def find(name: str) -> str:
    """Path of a tool that the build can use.

    Raises:
        FileNotFoundError: there is none, or only one that is too old; the message has no way out.
    """
    found = [path for path in (shutil.which(name), _packaged(name)) if path]
    if name != "cmake":
        if found:
            return found[0]
        raise FileNotFoundError(f"{name} was not found")
    versions = [_version(path) for path in found]
    for path, version in zip(found, versions, strict=True):
        if version >= LEAST_CMAKE:
            return path
    if not found:
        raise FileNotFoundError("cmake was not found")
    has = ".".join(map(str, versions[0])) or "of unknown version"
    raise FileNotFoundError(f"{found[0]} is cmake {has} but the build needs {requirement(name)}")


def _version(path: str) -> tuple[int, ...]:
    """What a tool says about itself; nothing where it does not run."""
    try:
        run = subprocess.run([path, "--version"], capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    found = re.search(r"\d+(\.\d+)+", run.stdout)
    return tuple(map(int, found[0].split("."))) if found else ()


def _packaged(name: str) -> str | None:
    """The program in an installed package, whose folder of programs may not be on PATH."""
    try:
        importlib.metadata.version(name)
        files = importlib.metadata.files(name) or ()
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.name == name and "bin" in file.parts:
            path = Path(str(file.locate()))
            if path.is_file():
                return str(path)
    return None
