"""Checks of what callers give: names and kinds, with the way out in the message."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


def refuse_unknown(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise unless every name is known.

    Args:
        what: what has these names, for the message, e.g. `"the settings of a run"`.
        given: names from the caller.
        known: names that there are.

    Raises:
        ValueError: a name is unknown; the message suggests close ones.
    """
    known = sorted(known)
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(close)}?" if close else f"choose from {', '.join(known)}"
            raise ValueError(f"{what} have no {name!r}; {hint}")


def number(name: str, value: Any, *, whole: bool, least: float, most: float = float("inf")) -> None:
    """Raise unless `value` is a number of that kind in [least, most]; True and False are no numbers.

    Raises:
        TypeError: it is no number, or a fraction where a whole number is wanted.
        ValueError: it is out of range, infinite or NaN.
    """
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise TypeError(
            f"{name} must be a {'whole ' if whole else ''}number but got {value!r} ({type(value).__name__})"
        )
    if not least <= value <= most or value in (float("inf"), float("-inf")):
        if value >= least and most < float("inf"):
            raise ValueError(f"{name} must be at most {most:g} but got {value}")
        raise ValueError(f"{name} must be at least {least:g} but got {value}")
