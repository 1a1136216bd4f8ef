"""What tests of wrong kinds share: values that an annotation does not allow, and whether an error is ours."""

from __future__ import annotations

import ast
import functools
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import torch
from torch import Tensor, nn

import arcore
from arcore.nn.kinds import ARRAY, OPTIONAL_ARRAY, argument_kinds

ROOT = Path(arcore.__file__).parent


@functools.cache
def raises(file: str) -> list[tuple[int, int]]:
    """First and last lines of the `raise` statements of a file."""
    tree = ast.parse(Path(file).read_text())
    return [(node.lineno, node.end_lineno or 0) for node in ast.walk(tree) if isinstance(node, ast.Raise)]


def is_ours(error: BaseException) -> bool:
    """Whether a `raise` of arcore stands at the end of the traceback."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    if place is None or not place.tb_frame.f_code.co_filename.startswith(f"{ROOT}{os.sep}"):
        return False
    lines = raises(place.tb_frame.f_code.co_filename)
    return any(first <= place.tb_lineno <= end for first, end in lines)


def wrong_values(kind: Any) -> list[Any]:
    """Values that an annotation does not allow."""
    union = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    parts = [part for part in union if part is not type(None)]
    of = {
        Tensor: "tensor",
        int: "whole",
        float: "number",
        bool: "bool",
        str: "text",
        ARRAY: "array",
        OPTIONAL_ARRAY: "array",
    }
    kinds = {
        "choice" if get_origin(part) is Literal else of.get(get_origin(part) or part, "other")
        for part in parts
    }
    wrong: list[Any] = ["nope", {}, object()]
    if "tensor" not in kinds and "array" not in kinds:
        wrong.append(torch.zeros(2, 2))
    if not kinds & {"whole", "number", "array"}:
        wrong.append(3)
    if not kinds & {"number", "array"}:
        wrong.append(2.5)
    elif "number" in kinds:
        wrong.append(math.nan)
    if "bool" not in kinds and "array" not in kinds:
        wrong.append(True)
    if "text" in kinds:
        wrong.remove("nope")
    if "other" in kinds:
        # Sequences, tables, classes: their values are the business of each.
        wrong = (
            ["nope", 3] if not any(isinstance(p, type) and issubclass(p, int | str) for p in parts) else []
        )
        if "nope" in wrong and any(isinstance(p, type) and issubclass(p, os.PathLike) for p in parts):
            wrong.remove("nope")
        if any((get_origin(p) or p) in (dict, Mapping) for p in parts):
            wrong.append([1])
        if any(isinstance(p, type) and issubclass(p, nn.Module) and p is not nn.Module for p in parts):
            wrong.append(nn.Linear(1, 1))
    return wrong if type(None) in union or kind == OPTIONAL_ARRAY else [*wrong, None]


def other_values(value: Any) -> list[Any]:
    """Values of the right kind that may be refused, but in our words: negative ones, other shapes and dtypes."""
    if isinstance(value, bool):
        return []
    if isinstance(value, int):
        return [-3]
    if isinstance(value, float):
        return [-3.0, math.inf]
    if isinstance(value, Tensor):
        shapes = [value.unsqueeze(0), value.new_zeros(()), value[:0] if value.dim() else value]
        return [*shapes, value.to(torch.int64 if value.is_floating_point() else torch.float64)]
    return []


def faults(function: Callable[..., Any], right: Mapping[str, Any], *, values: bool = False) -> list[str]:
    """Wrong values that a function accepts, or refuses in other words than ours.

    Args:
        function: or a class.
        right: arguments of a right call, by name.
        values: try values of the right kind, too, which may be accepted.
    """
    kinds = argument_kinds(function.__init__ if isinstance(function, type) else function)
    found = []
    for argument, value in right.items():
        of_kind = wrong_values(kinds[argument]) if argument in kinds else ["nope", 3, None, nn.Linear(1, 1)]
        for wrong, must in [(one, True) for one in of_kind] + [
            (one, False) for one in (other_values(value) if values else [])
        ]:
            shown = f"{argument}={'tensor' + str(tuple(wrong.shape)) if isinstance(wrong, Tensor) else repr(wrong)}"
            try:
                function(**{**right, argument: wrong})
            except Exception as error:
                if not isinstance(error, TypeError | ValueError | OSError) or not is_ours(error):
                    found.append(f"{shown}: {type(error).__name__}: {str(error)[:120]}")
            else:
                # What looks at its arguments only where a call fails may take a value that serves.
                if must and not hasattr(function, "kinds_after"):
                    found.append(f"{shown}: accepted")
    return found
