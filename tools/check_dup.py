"""Fails when two files of the model zoo share more than 55 % of their lines.

A zoo of one file per system stays readable only while each file holds what is its own; a block that two systems
need belongs into `arcore/nn`. Comments, docstrings, imports and blank lines do not count, and names of classes and
their lower-case forms are masked, so that a copy with other names is still a copy.

    python tools/check_dup.py [FOLDER ...]      (default: python/arcore/zoo)
"""

from __future__ import annotations

import argparse
import ast
import itertools
import re
import sys
from collections import Counter
from difflib import SequenceMatcher
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = [ROOT / "python/arcore/zoo"]
LIMIT = 0.55
# Below this many lines a common shape (a config and a constructor) is no copy.
MINIMUM_LINES = 15


def significant_lines(source: str) -> list[str]:
    """The lines of code of `source`, without layout, comments, docstrings and imports, class names masked.

    Raises:
        SyntaxError: `source` is not Python.
    """
    tree = ast.parse(source)
    classes = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            classes.add(node.name)
        body = getattr(node, "body", None)
        if isinstance(body, list):
            kept = [child for child in body if not _is_noise(child)]
            node.body = kept or [ast.Pass()]  # type: ignore[attr-defined]
    text = ast.unparse(tree)
    stem = _common_stem(classes)
    for name in sorted(classes, key=len, reverse=True):
        text = re.sub(rf"\b{re.escape(name)}\b", "_CLASS", text)
    if stem:
        text = re.sub(rf"(?i)(?<![a-z]){re.escape(stem)}(?![a-z])", "_name", text)
    return [line for line in text.splitlines() if line.strip()]


def _is_noise(node: ast.AST) -> bool:
    string = (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
    return string or isinstance(node, ast.Import | ast.ImportFrom)


def _common_stem(classes: set[str]) -> str:
    """The system's name: the shortest class name of which another class name is a continuation (VAR, VARConfig)."""
    stems = [name for name in classes if any(other != name and other.startswith(name) for other in classes)]
    return min(stems, key=lambda name: (len(name), name), default="")


def shared(first: list[str], second: list[str]) -> float:
    """Fraction of the shorter file's lines that the longer one has in the same order; up to `LIMIT` in any order."""
    shorter = min(len(first), len(second))
    if shorter < MINIMUM_LINES:
        return 0.0
    # Whatever the order, and much faster: most pairs have less in common than would matter.
    anywhere = sum((Counter(first) & Counter(second)).values()) / shorter
    if anywhere <= LIMIT:
        return anywhere
    matcher = SequenceMatcher(None, first, second, autojunk=False)
    return sum(block.size for block in matcher.get_matching_blocks()) / shorter


def near_copies(files: list[Path], limit: float = LIMIT) -> list[tuple[float, Path, Path]]:
    """Pairs of `files` that share more than `limit` of their lines, worst first."""
    lines = {path: significant_lines(path.read_text(encoding="utf-8")) for path in files}
    pairs = ((shared(lines[a], lines[b]), a, b) for a, b in itertools.combinations(files, 2))
    return sorted((pair for pair in pairs if pair[0] > limit), key=lambda pair: -pair[0])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folders", nargs="*", type=Path, default=FOLDERS, help="folders with one file per system"
    )
    folders = parser.parse_args(argv).folders
    missing = [str(folder) for folder in folders if not folder.is_dir()]
    if missing:
        print(f"check_dup: no such folder: {', '.join(missing)}", file=sys.stderr)
        return 2
    files = sorted(path for folder in folders for path in folder.rglob("*.py"))
    found = near_copies(files)
    for fraction, first, second in found:
        print(
            f"check_dup: {first.name} and {second.name} share {fraction:.0%} of their lines (limit {LIMIT:.0%}); "
            "move what they share to arcore/nn, or derive one class from the other where the paper says so",
            file=sys.stderr,
        )
    print(f"check_dup: {len(files)} files, {len(found)} near copies")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
