"""Whole packages whose public functions say which argument is wrong, without a decorator at each.

`guard_package(__name__)` in a package's `__init__.py` guards what its modules define, present and future, when they are
imported: public functions, and constructors and public methods of public classes. What is called for every layer,
`forward`, is looked at only where a call fails (`explain_kinds`); everything else before (`check_kinds`).
"""

from __future__ import annotations

import dataclasses
import enum
import importlib.abc
import importlib.machinery
import inspect
import re
import sys
from collections.abc import Sequence
from types import FunctionType, ModuleType
from typing import Any

from torch import autograd, nn

from arcore._failures import ids_of
from arcore._kinds import check_kinds, check_record, explain_kinds

# What such dataclasses hold is asked for; others hold results, whose numbers may be NaN.
_SETTINGS = re.compile(r"(Config|Options|Settings|Sampling|Erasing|Specials)$")
_PACKAGES: set[str] = set()


def guard_package(name: str) -> None:
    """Guard the modules of a package that are imported from now on.

    Args:
        name: of the package.
    """
    _PACKAGES.add(f"{name}.")
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Finds what Python finds, and has it guarded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(tuple(_PACKAGES)):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or type(spec.loader) is not importlib.machinery.SourceFileLoader:
            return None
        spec.loader = _Loader(fullname, spec.loader.path)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        guard_module(module)


def guard_module(module: ModuleType) -> None:
    """Guard what a module defines under public names.

    Args:
        module: that was executed; functions are replaced in it, classes are changed.
    """
    for name, value in list(vars(module).items()):
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if isinstance(value, FunctionType):
            if not _is_guarded(value) and _takes_arguments(value):
                setattr(module, name, check_kinds(value))
        elif isinstance(value, type):
            _guard_class(value)


def _guard_class(owner: type) -> None:
    if issubclass(owner, enum.Enum | BaseException | autograd.Function) or getattr(
        owner, "_is_protocol", False
    ):
        return
    for name, value in list(vars(owner).items()):
        if name.startswith("_") and name not in ("__init__", "__call__"):
            continue
        inner = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        if not isinstance(inner, FunctionType) or _is_guarded(inner) or not _takes_arguments(inner):
            continue
        if name == "__init__" and dataclasses.is_dataclass(owner) and not _SETTINGS.search(owner.__name__):
            setattr(owner, name, check_record(inner))
        elif name == "__init__":
            check_kinds(owner)
        else:
            # Ids with fractions would be cut off silently, so they are looked at before.
            often = name in ("forward", "__call__") and issubclass(owner, nn.Module) and not ids_of(inner)
            made = explain_kinds(inner) if often else check_kinds(inner)
            setattr(owner, name, type(value)(made) if inner is not value else made)


def _is_guarded(function: FunctionType) -> bool:
    return hasattr(function, "kinds_before") or hasattr(function, "kinds_after")


def _takes_arguments(function: Any) -> bool:
    return any(name not in ("self", "cls") for name in inspect.signature(function).parameters)
