"""Training on PyTorch Lightning: `Task` and `fit`; `train` for presets of the zoo (`arcore.recipes`).

Needs the extra `train`. Names load on first use, so that importing this package does not import Lightning.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from arcore._optional import require
from arcore.training.config import TrainConfig

if TYPE_CHECKING:
    from arcore.recipes import train
    from arcore.training.engine import FitResult, fit
    from arcore.training.task import Task

__all__ = ["FitResult", "Task", "TrainConfig", "fit", "train"]

_HOMES = {"FitResult": "engine", "fit": "engine", "Task": "task"}


def __getattr__(name: str) -> Any:
    if name == "train":
        # Recipes stand above this room; the name stays here for those who look for it here.
        return importlib.import_module("arcore.recipes").train
    if name not in _HOMES:
        raise AttributeError(f"module 'arcore.training' has no attribute {name!r}")
    for package in ("pytorch_lightning", "rich", "safetensors"):
        require(package, extra="train")
    return getattr(importlib.import_module(f"arcore.training.{_HOMES[name]}"), name)
