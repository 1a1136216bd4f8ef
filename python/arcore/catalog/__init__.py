"""The catalogue of the zoo: what systems there are, and how they are made, saved and loaded.

Systems declare themselves (`System`, `preset`); nothing lists them. `arcore.models` offers the same functions to users.
"""

from arcore.catalog.checkpoints import (
    build,
    describe,
    from_pretrained,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    save_pretrained,
)
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
from arcore.catalog.system import CHECKED_ON, KINDS, NOT_PUBLIC, Published, System, preset

__all__ = [
    "CHECKED_ON",
    "KINDS",
    "NOT_PUBLIC",
    "CatalogError",
    "Entry",
    "ModelInfo",
    "PresetInfo",
    "Published",
    "System",
    "build",
    "catalog",
    "create_model",
    "describe",
    "find",
    "from_pretrained",
    "get_config",
    "list_models",
    "list_systems",
    "load_checkpoint",
    "load_weights",
    "model_info",
    "preset",
    "save_checkpoint",
    "save_pretrained",
    "search",
]
