"""Recipes: how the systems of a protocol are trained, sampled and shown. One file per protocol.

A system names its recipe; `recipe_for` finds it. A system whose training is its own says `recipe="own"` and has its
recipe as `RECIPE` in its own file.

Needs the extra `train`. Names load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from arcore._guard import guard_package
from arcore._optional import require

if TYPE_CHECKING:
    from arcore.recipes._recipe import Recipe, Start, Work, ZooTask, recipe_for
    from arcore.recipes._run import train

__all__ = ["Recipe", "Start", "Work", "ZooTask", "recipe_for", "train"]

guard_package(__name__)
_HOMES = {"train": "_run"} | dict.fromkeys(("Recipe", "Start", "Work", "ZooTask", "recipe_for"), "_recipe")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'arcore.recipes' has no attribute {name!r}")
    for package in ("pytorch_lightning", "rich", "safetensors"):
        require(package, extra="train")
    return getattr(importlib.import_module(f"arcore.recipes.{_HOMES[name]}"), name)
