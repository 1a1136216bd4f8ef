"""Fails when a system of the zoo is declared wrongly; each line names file and line.

    python tools/check_zoo.py [FOLDER]      (default: python/arcore/zoo)

It reads the files and runs none of them, and needs neither torch nor the extension.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import types
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python/arcore"


def discovery() -> Any:
    """The module `arcore.catalog.discovery`, imported without its packages' `__init__`, which need torch."""
    if "arcore" not in sys.modules:
        for name, folder in (("arcore", PACKAGE), ("arcore.catalog", PACKAGE / "catalog")):
            package = types.ModuleType(name)
            package.__path__ = [str(folder)]
            sys.modules[name] = package
    return importlib.import_module("arcore.catalog.discovery")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=PACKAGE / "zoo", help="folder of the topics")
    folder = parser.parse_args(argv).folder
    if not folder.is_dir():
        print(f"check_zoo: no such folder: {folder}", file=sys.stderr)
        return 2
    reader = discovery()
    entries, problems = reader.read(folder)
    problems += reader.without_claim(entries)
    for problem in problems:
        print(f"check_zoo: {problem}", file=sys.stderr)
    print(f"check_zoo: {len(entries)} systems, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
