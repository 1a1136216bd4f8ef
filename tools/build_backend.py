"""PEP 517 backend that builds arcore against the torch that is already installed.

pip builds in an isolated environment that cannot see the installed torch. Declaring torch as a build requirement
would make pip download the newest one, gigabytes large and with another ABI than the one arcore will run with.
This backend keeps pip's interpreter, appends the site-packages of the environment it belongs to, and requests only
the build tools that are really missing. Without a torch, or without a C++ compiler, it stops with one sentence before
pip downloads anything. `ARCORE_ISOLATED=1` turns that off: pip then downloads every requirement, torch too.
"""

from __future__ import annotations

import importlib.metadata
import os
import shlex
import shutil
import site
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import build_tools

MINIMUM = {"torch": (2, 11), "setuptools": (77, 0)}
COMPILERS = ("c++", "g++", "clang++")


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


def _isolated() -> bool:
    return os.environ.get("ARCORE_ISOLATED") == "1"


def _see_installed_packages() -> None:
    if _isolated():
        return
    folders = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib")]
    # pip's isolation overrides sysconfig in no pip release known to us, but it hides the user site.
    folders.append(site.getusersitepackages())
    for folder in folders:
        if folder and Path(folder).is_dir() and folder not in sys.path:
            sys.path.append(folder)


def _obstacle() -> str | None:
    """What no build tool from PyPI could mend, and its way out, in one sentence."""
    named = os.environ.get("CXX")
    if not any(shutil.which(compiler.split()[0]) for compiler in ([named] if named else COMPILERS)):
        what = f"the compiler CXX={named} was not found" if named else "no C++ compiler was found"
        return f"{what}; install g++ >= 11 or clang++ >= 14, or name one with CXX=..."
    if _isolated():
        return None
    torch, least = _version("torch"), ".".join(map(str, MINIMUM["torch"]))
    if torch is None:
        return (
            f"torch>={least} must be installed before arcore is built, because arcore is compiled against it; "
            "run `pip install torch`, then the same command again"
        )
    if torch < MINIMUM["torch"]:
        return (
            f"torch {importlib.metadata.version('torch')} is installed but arcore needs torch>={least}; "
            f"run `pip install 'torch>={least}'`, then the same command again"
        )
    return None


def _stop_at_obstacle() -> None:
    obstacle = _obstacle()
    if obstacle is not None:
        sys.exit(f"arcore: {obstacle}")


def _missing() -> list[str]:
    """The build requirements that the environment lacks, as pip requirement strings."""
    _see_installed_packages()
    _stop_at_obstacle()
    wanted = []
    for name, minimum in MINIMUM.items():
        found = _version(name)
        if found is None or found < minimum:
            wanted.append(f"{name}>={'.'.join(map(str, minimum))}")
        elif name == "torch":
            origin = importlib.metadata.distribution("torch").locate_file("")
            print(f"arcore: using torch {importlib.metadata.version('torch')} from {origin}", file=sys.stderr)
    for tool in build_tools.TOOLS:
        try:
            build_tools.find(tool)
        except FileNotFoundError:
            wanted.append(build_tools.requirement(tool))
    return wanted


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    return _missing()


def get_requires_for_build_editable(config_settings: dict | None = None) -> list[str]:
    return _missing()


def get_requires_for_build_sdist(config_settings: dict | None = None) -> list[str]:
    _see_installed_packages()
    found = _version("setuptools")
    return [] if found is not None and found >= MINIMUM["setuptools"] else ["setuptools>=77"]


def _backend(*, compiles: bool = True):
    _see_installed_packages()
    if compiles:
        _stop_at_obstacle()
    found, least = _version("setuptools"), MINIMUM["setuptools"]
    if found is None or found < least:
        # Only under --no-build-isolation: otherwise pip has brought what get_requires_* asked for.
        has = f"setuptools {importlib.metadata.version('setuptools')} is" if found else "no setuptools is"
        sys.exit(
            f"arcore: {has} installed but the build needs setuptools>={least[0]}; "
            f"run `pip install 'setuptools>={least[0]}'`, or leave out --no-build-isolation"
        )
    for tool in build_tools.TOOLS if compiles else ():
        try:
            build_tools.find(tool)
        except FileNotFoundError as error:
            sys.exit(
                f"arcore: {error}; run `pip install {shlex.quote(build_tools.requirement(tool))}`, or leave out "
                "--no-build-isolation"
            )
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
    return _backend(compiles=False).build_sdist(sdist_directory, config_settings)
