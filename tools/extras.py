"""Prints the requirements of the named extras of pyproject.toml, one a line, for `pip install --requirement`.

`pip install -e .[test]` would build the extension again for every extra; the Makefile builds it once.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent


def requirements(extras: list[str]) -> list[str]:
    """The requirements of `extras`; a mention of arcore's own extras (`arcore[zoo]`) is replaced by what it holds."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    table: dict[str, list[str]] = project["optional-dependencies"]
    own = re.compile(rf"{re.escape(project['name'])}\[([^\]]+)\]")
    found: dict[str, None] = {}
    todo, done = list(extras), set[str]()
    while todo:
        extra = todo.pop(0)
        if extra in done:
            continue
        done.add(extra)
        if extra not in table:
            raise SystemExit(
                f"extras.py: unknown extra {extra!r}; pyproject.toml has {', '.join(sorted(table))}"
            )
        for requirement in table[extra]:
            match = own.fullmatch(requirement)
            if match:
                todo += [name.strip() for name in match[1].split(",")]
            else:
                found[requirement] = None
    return list(found)


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1:])))
