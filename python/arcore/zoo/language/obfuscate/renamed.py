"""What every language's obfuscation shares: the result, and the new names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

KINDS = ("FUNC", "CLASS", "VAR", "IMPORT")
_WORD = re.compile(r"[^\W\d]\w*")


@dataclass(frozen=True)
class Obfuscated:
    """A file before and after.

    Attributes:
        source: without comments and docstrings; of Python as `ast.unparse` writes it.
        code: the same with other names.
        names: from names in `source` to those in `code`; no two go to the same.
        language: python, c, javascript, java or go.
    """

    source: str
    code: str
    names: Mapping[str, str]
    language: str = "python"


def numbered(kinds: Mapping[str, str], source: str) -> dict[str, str]:
    """New names FUNC_1, VAR_1 and so on, in the order of `kinds`, that do not stand in the source yet."""
    present = set(_WORD.findall(source))
    counts = dict.fromkeys(KINDS, 0)
    names: dict[str, str] = {}
    for name, kind in kinds.items():
        while True:
            counts[kind] += 1
            new = f"{kind}_{counts[kind]}"
            if new not in present:
                break
        names[name] = new
    return names
