"""A decorator that refuses arguments of another kind than a function's annotations say, in arcore's words."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import os
from collections.abc import Callable, Mapping
from types import UnionType
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints, overload

import torch
from torch import Tensor

from arcore.nn.checks import came, check_choice, check_whole

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
Made = TypeVar("Made")
# What `argument_kinds` says of numpy's arrays, whose annotations hold too little to be looked at.
ARRAY, OPTIONAL_ARRAY = "array", "array or None"


@overload
def check_kinds(function: type[Made]) -> type[Made]: ...


@overload
def check_kinds(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]: ...


def check_kinds(function: Any) -> Any:
    """Check the kinds of a function's arguments before it runs: a tensor where a tensor is meant, and so on.

    Looks at annotations of tensors, numbers, texts, paths, choices (`Literal`), sequences, tables, arrays
    (`ArrayLike`), functions and classes, each of them or None where the annotation says so. Sizes and values are the
    function's own to check. Inside `torch.compile` nothing is checked.

    Args:
        function: a function or a method; or a class, whose `__init__` is meant. A dataclass also refuses NaN.
    """
    if isinstance(function, type):
        settings = dataclasses.is_dataclass(function)
        function.__init__ = _checked(function.__init__, settings=settings)  # type: ignore[misc]
        return function
    return _checked(function)


def _checked(function: Any, *, settings: bool = False) -> Any:
    """Settings refuse NaN, too, which passes comparisons that look for what is out of range.

    What they say themselves about values of the right kind comes first.
    """
    names = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        late: ValueError | None = None
        if not torch.compiler.is_compiling():
            kinds = _kinds(function)
            for name, value in (*zip(names, args, strict=False), *kwargs.items()):
                if name not in kinds:
                    continue
                try:
                    _check(function, name, value, kinds[name])
                    if settings and isinstance(value, float) and math.isnan(value):
                        raise ValueError(f"{_where(function)}: expected {name} to be a number but got nan")
                except ValueError as error:
                    if not settings:
                        raise
                    late = late or error
        result = function(*args, **kwargs)
        if late is not None:
            raise late
        return result

    return checked


def argument_kinds(function: Any) -> dict[str, Any]:
    """What the annotations of a function or method say, by argument; `ARRAY` for numpy's arrays.

    Args:
        function: with or without the decorator, bound or not.
    """
    return _kinds(inspect.unwrap(getattr(function, "__func__", function)))


@functools.cache
def _kinds(function: Any) -> dict[str, Any]:
    """See `argument_kinds`."""
    written = dict(function.__annotations__)
    written.pop("return", None)
    try:
        hints = get_type_hints(function)
    except NameError:
        # Names that only a type checker imports.
        hints = {name: _evaluated(function, text) for name, text in written.items()}
    numpy_names = ("ArrayLike", "NDArray", "Vector", "Array")
    arrays = {
        name: OPTIONAL_ARRAY if "None" in str(text) else ARRAY
        for name, text in written.items()
        if str(text).startswith(numpy_names)
    }
    variadic = {
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    kinds = {**{name: kind for name, kind in hints.items() if name in written and kind is not Any}, **arrays}
    return {name: kind for name, kind in kinds.items() if name not in variadic}


def _evaluated(function: Any, text: Any) -> Any:
    try:
        return eval(text, function.__globals__) if isinstance(text, str) else text
    except NameError:
        return Any


def _check(function: Any, name: str, value: object, kind: Any) -> None:
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if any(_fits(part, value) for part in parts):
        return
    where = f"{_where(function)}: "
    for part in parts:
        if get_origin(part) is Literal:
            try:
                check_choice(name, value, get_args(part))
            except ValueError as error:
                raise ValueError(f"{where}{error}") from None
    wanted = " or ".join(dict.fromkeys(_words(part) for part in parts if part is not type(None)))
    none = " or None" if type(None) in parts else ""
    raise TypeError(f"{where}expected {name} to be {wanted}{none} but got {came(value)}")


def _where(function: Any) -> str:
    return f"arcore.{function.__qualname__.removesuffix('.__init__')}"


def _fits(kind: Any, value: object) -> bool:
    if kind is Any or isinstance(kind, TypeVar):
        return True
    if kind is None or kind is type(None):
        return value is None
    if kind in (ARRAY, OPTIONAL_ARRAY):
        return _is_array(value) or (value is None and kind == OPTIONAL_ARRAY)
    origin = get_origin(kind) or kind
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in get_args(kind))
    if kind is int:
        return _is_whole(value)
    if kind is float:
        return _is_number(value)
    if kind is bool or kind is str:
        return isinstance(value, kind)
    if not isinstance(origin, type):
        return True
    if issubclass(origin, os.PathLike):
        return isinstance(value, str | os.PathLike)
    if origin.__module__ == "collections.abc" and origin.__name__ == "Callable":
        return callable(value)
    if issubclass(origin, Mapping):
        return isinstance(value, Mapping)
    if origin.__module__ == "collections.abc" or origin in (list, tuple):
        # What is iterated over; a text would be taken letter by letter.
        return not isinstance(value, str | bytes | Mapping) and hasattr(value, "__iter__")
    # What torch.compile makes of a module stands for it.
    value = getattr(value, "_orig_mod", value)
    if getattr(origin, "_is_protocol", False) and not getattr(origin, "_is_runtime_protocol", False):
        return True
    return isinstance(value, origin)


def _is_whole(value: object) -> bool:
    try:
        check_whole("", value, -(2**63))
    except (TypeError, ValueError):
        return False
    return True


def _is_number(value: object) -> bool:
    """Infinity and NaN are numbers; what they mean is the function's to say."""
    if isinstance(value, bool | str | bytes) or not hasattr(value, "__float__"):
        return False
    size = value.numel() if isinstance(value, Tensor) else getattr(value, "size", 1)
    return bool(size == 1)


def _is_array(value: object) -> bool:
    import numpy as np

    if value is None or isinstance(value, str | bytes | Mapping):
        return False
    try:
        return np.asarray(value).dtype.kind in "biufc"
    except (TypeError, ValueError, RuntimeError):
        return False


def _words(kind: Any) -> str:
    origin = get_origin(kind) or kind
    known: dict[Any, str] = {
        Tensor: "a tensor",
        int: "a whole number",
        float: "a number",
        bool: "True or False",
        str: "a text",
        ARRAY: "an array of numbers",
        OPTIONAL_ARRAY: "an array of numbers or None",
    }
    if kind in known:
        return known[kind]
    if issubclass(origin, os.PathLike):
        return "a path"
    if issubclass(origin, Mapping):
        return "a table of names and values"
    if origin.__module__ == "collections.abc" and origin.__name__ == "Callable":
        return "a function"
    if origin.__module__ == "collections.abc" or origin in (list, tuple):
        return "a sequence"
    article = "an" if origin.__name__[0] in "AEIO" else "a"
    return f"{article} {origin.__name__}"
