"""How far a long drawing is, on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable

Progress = Callable[[int, int], None]


def drawing(what: str = "scale") -> Progress | None:
    """Something to call with the number of steps done and of all: one line on the terminal, gone at the end.

    Args:
        what: is drawn step by step.

    Returns:
        None where standard error is no terminal.
    """
    if not sys.stderr.isatty():
        return None

    def told(done: int, total: int) -> None:
        text = f"drawing: {what} {done} of {total}"
        print(f"\r{text if done < total else ' ' * len(text)}\r", end="", file=sys.stderr, flush=True)

    return told
