"""Argument checks that several data sets make, with one wording."""

from __future__ import annotations

import operator


def whole(name: str, value: object, least: int, unit: str = "") -> int:
    """`value` as an int.

    Raises:
        TypeError: it is no whole number; True and False are none.
        ValueError: it is below `least`.
    """
    unit = f" {unit}" if unit else ""
    try:
        number = operator.index(value) if not isinstance(value, bool) else None  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{name} must be a whole number{' of' + unit if unit else ''} but got {value!r}")
    if number < least:
        raise ValueError(f"{name} must be at least {least}{unit} but got {number}")
    return number
