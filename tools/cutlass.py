"""Unpacks the CuTe headers that the sm_90a kernels include, from the pinned nvidia-cutlass wheel.

    python tools/cutlass.py            # pip downloads the wheel
    python tools/cutlass.py WHEEL      # a wheel that is already here

The headers come to third_party/cutlass/include/; nothing else of the wheel is used, and nothing is installed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERSION = "4.2.0.0"
SHA256 = "f9599ada45c7bcb6bf53f7d3f0a7d154183e53451c01bfa59eecd37dd4a693f6"
TARGET = ROOT / "third_party" / "cutlass"
INSIDE = "cutlass_library/source/include/"
ABSENT = (
    "the CuTe headers of the sm_90a kernels are not in third_party/cutlass; run `python tools/cutlass.py`, "
    f"which takes them from nvidia-cutlass {VERSION}"
)


def include_folder() -> Path | None:
    """Where the pinned headers are, or None if they have not been unpacked."""
    pin = TARGET / "VERSION"
    return TARGET / "include" if pin.exists() and pin.read_text() == VERSION else None


def unpack(wheel: Path) -> Path:
    """Unpacks the headers of `wheel`, which must be the pinned one."""
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != SHA256:
        raise ValueError(f"expected nvidia-cutlass {VERSION} with sha256 {SHA256} but {wheel} has {digest}")
    TARGET.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=TARGET.parent, prefix="cutlass-") as folder:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if name.startswith(INSIDE)])
        fresh = Path(folder) / INSIDE
        (fresh.parent / "VERSION").write_text(VERSION)
        if TARGET.exists():
            shutil.rmtree(TARGET)
        os.replace(fresh.parent, TARGET)
    return TARGET / "include"


def download(folder: str) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*command, "--dest", folder, f"nvidia-cutlass=={VERSION}"], check=True)
    return next(Path(folder).glob("*.whl"))


def main(arguments: list[str]) -> int:
    if include_folder() is None:
        with tempfile.TemporaryDirectory() as folder:
            try:
                unpack(Path(arguments[0]) if arguments else download(folder))
            except (OSError, ValueError, subprocess.CalledProcessError) as error:
                print(f"cutlass: {error}", file=sys.stderr)
                return 1
    print(f"cutlass: nvidia-cutlass {VERSION}, headers in {include_folder()}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
