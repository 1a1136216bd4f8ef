"""The promises of docs/numerics.md: each has tests that are named there, and these exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/numerics.md").read_text()


def promises() -> list[str]:
    part = PAGE.partition("## Promises")[2].partition("\n## ")[0]
    return [" ".join(text.split()).rstrip(".") for text in re.findall(r"^- \*\*(.+?)\*\*", part, re.M | re.S)]


def rows() -> dict[str, list[str]]:
    part = PAGE.partition("## Which test holds which promise")[2]
    lines = re.findall(r"^\| (.+?) \| (`.+`) \|$", part, re.M)
    return {promise: re.findall(r"`([^`]+)`", tests) for promise, tests in lines}


def test_every_promise_has_a_row_and_every_row_a_promise() -> None:
    assert len(promises()) >= 10
    assert sorted(promises()) == sorted(rows())


def test_the_named_tests_exist() -> None:
    for promise, names in rows().items():
        assert names, promise
        for name in names:
            path, _, function = name.partition("::")
            file = ROOT / "tests" / path
            assert file.is_file(), name
            found = {n.name for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.FunctionDef)}
            assert not function or (function in found and function.startswith("test_")), name
