"""The zoo's door: make, look up, save and load models. Their classes are here too, loaded on first use.

import arcore

arcore.list_models()                                          # names of all presets
model = arcore.create_model("var_tiny")                       # with random weights
model = arcore.create_model("var_d16", weights="var_d16.pth")
arcore.model_info("var")                                      # paper, presets, claim
arcore.models.VAR                                             # a public class of a system's file
"""

from __future__ import annotations

from typing import Any

from arcore.catalog import ModelInfo as ModelInfo
from arcore.catalog import PresetInfo as PresetInfo
from arcore.catalog import build as build
from arcore.catalog import create_model as create_model
from arcore.catalog import describe as describe
from arcore.catalog import from_pretrained as from_pretrained
from arcore.catalog import get_config as get_config
from arcore.catalog import list_models as list_models
from arcore.catalog import load_checkpoint as load_checkpoint
from arcore.catalog import load_weights as load_weights
from arcore.catalog import model_info as model_info
from arcore.catalog import save_checkpoint as save_checkpoint
from arcore.catalog import save_pretrained as save_pretrained
from arcore.catalog.lookup import class_named, class_names


def __getattr__(name: str) -> Any:
    return class_named(name, __name__)


def __dir__() -> list[str]:
    return sorted({*globals(), *class_names()})
