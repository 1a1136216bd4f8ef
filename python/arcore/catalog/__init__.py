"""The catalogue of the zoo: what systems there are, and how they are made, saved and loaded.

Systems declare themselves (`System`, `preset`); nothing lists them. `arcore.models` offers the same functions to users.
"""

from arcore.catalog.checkpoints import build, describe, load_checkpoint, load_weights, save_checkpoint
from arcore.catalog.discovery import CatalogError, Entry, catalog
from arcore.catalog.lookup import (
    ModelInfo,
    PresetInfo,
    create_model,
    find,
    get_config,
    list_models,
    list_systems,
    model_info,
    search,
)
from arcore.catalog.system import CHECKED_ON, KINDS, System, preset

__all__ = [
    "CHECKED_ON",
    "KINDS",
    "CatalogError",
    "Entry",
    "ModelInfo",
    "PresetInfo",
    "System",
    "build",
    "catalog",
    "create_model",
    "describe",
    "find",
    "get_config",
    "list_models",
    "list_systems",
    "load_checkpoint",
    "load_weights",
    "model_info",
    "preset",
    "save_checkpoint",
    "search",
]
