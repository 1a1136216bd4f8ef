"""PEP 517 backend that builds arcore against the torch that is already installed.

pip builds in an isolated environment that cannot see the installed torch. Declaring torch as a build requirement
would make pip download the newest one, gigabytes large and with another ABI than the one arcore will run with.
This backend keeps pip's interpreter, appends the site-packages of the environment it belongs to, and requests only
the build tools that are really missing. `ARCORE_ISOLATED=1` turns that off: pip then downloads every requirement.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import site
import sys
import sysconfig
from pathlib import Path

MINIMUM = {"torch": (2, 11), "setuptools": (77, 0)}


def _version(name: str) -> tuple[int, ...] | None:
    try:
        text = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    numbers = []
    for part in text.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def _see_installed_packages() -> None:
    if os.environ.get("ARCORE_ISOLATED") == "1":
        return
    folders = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib")]
    # pip's isolation overrides sysconfig in no pip release known to us, but it hides the user site.
    folders.append(site.getusersitepackages())
    for folder in folders:
        if folder and Path(folder).is_dir() and folder not in sys.path:
            sys.path.append(folder)


def _missing() -> list[str]:
    """The build requirements that the environment lacks, as pip requirement strings."""
    _see_installed_packages()
    wanted = []
    for name, minimum in MINIMUM.items():
        found = _version(name)
        if found is None or found < minimum:
            wanted.append(f"{name}>={'.'.join(map(str, minimum))}")
        elif name == "torch":
            origin = importlib.metadata.distribution("torch").locate_file("")
            print(f"arcore: using torch {importlib.metadata.version('torch')} from {origin}", file=sys.stderr)
    for tool in ("cmake", "ninja"):
        if shutil.which(tool) is None and _version(tool) is None:
            wanted.append(tool)
    return wanted


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    return _missing()


def get_requires_for_build_editable(config_settings: dict | None = None) -> list[str]:
    return _missing()


def get_requires_for_build_sdist(config_settings: dict | None = None) -> list[str]:
    _see_installed_packages()
    found = _version("setuptools")
    return [] if found is not None and found >= MINIMUM["setuptools"] else ["setuptools>=77"]


def _backend():
    _see_installed_packages()
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from setuptools import build_meta

    return build_meta


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: dict | None = None) -> str:
    return _backend().prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory: str, config_settings: dict | None = None) -> str:
    return _backend().prepare_metadata_for_build_editable(metadata_directory, config_settings)


def build_wheel(
    wheel_directory: str, config_settings: dict | None = None, metadata_directory: str | None = None
) -> str:
    return _backend().build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: dict | None = None, metadata_directory: str | None = None
) -> str:
    return _backend().build_editable(wheel_directory, config_settings, metadata_directory)


def build_sdist(sdist_directory: str, config_settings: dict | None = None) -> str:
    return _backend().build_sdist(sdist_directory, config_settings)
