"""Replaces the part of a text file between two marker comments; shared by the tools that generate parts of README."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def replace_marked(text: str, name: str, body: str) -> str:
    """`text` with `body` between `<!-- NAME:begin ... -->` and `<!-- NAME:end -->`.

    Raises:
        ValueError: the markers are missing, doubled, or in the wrong order.
    """
    begin, end = f"<!-- {name}:begin", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected one {begin} ... --> and after it one {end}")
    head = text.index("-->", text.index(begin)) + len("-->")
    return f"{text[:head]}\n{body.strip()}\n{text[text.index(end) :]}"


def update(path: Path, content: str, check: bool) -> bool:
    """Whether `path` already held `content`; unless `check`, writes it."""
    current = path.read_text(encoding="utf-8") if path.exists() else None
    if current == content:
        return True
    if not check:
        fresh = path.with_name(f".{path.name}.new")
        fresh.write_text(content, encoding="utf-8")
        os.replace(fresh, path)
    return False
