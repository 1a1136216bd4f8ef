"""The zoo: one file per published system, loaded on first use.

import arcore

arcore.list_models()                                          # names of all presets
model = arcore.create_model("var_tiny")                       # with random weights
model = arcore.create_model("var_d16", weights="var_d16.pth")
arcore.model_info("var")                                      # paper, presets, the check of its claim
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from arcore.models._builder import build, describe, load_checkpoint, load_weights, save_checkpoint
from arcore.models._registry import ModelInfo, PresetInfo, create_model, get_config, list_models, model_info

if TYPE_CHECKING:
    from arcore.models.acdit import ACDiT, ACDiTConfig
    from arcore.models.ar_diffusion import ARDiffusion, ARDiffusionConfig
    from arcore.models.diffusion_forcing import DiffusionForcing, DiffusionForcingConfig
    from arcore.models.dit import DiT, DiTConfig
    from arcore.models.mamba import Mamba, MambaConfig, MambaLayer, StateSpaceConfig
    from arcore.models.mamba2 import Mamba2, Mamba2Config
    from arcore.models.mar import MAR, MARConfig
    from arcore.models.roma import RoMA, RoMACache, RoMAConfig
    from arcore.models.roma_classifier import FourDirectionMixer, RoMAClassifier, RoMAClassifierConfig
    from arcore.models.var import VAR, VARConfig

_FILES = {
    "acdit": ("ACDiT", "ACDiTConfig"),
    "ar_diffusion": ("ARDiffusion", "ARDiffusionConfig"),
    "diffusion_forcing": ("DiffusionForcing", "DiffusionForcingConfig"),
    "dit": ("DiT", "DiTConfig"),
    "mamba": ("Mamba", "MambaConfig", "MambaLayer", "StateSpaceConfig"),
    "mamba2": ("Mamba2", "Mamba2Config"),
    "mar": ("MAR", "MARConfig"),
    "roma": ("RoMA", "RoMACache", "RoMAConfig"),
    "roma_classifier": ("FourDirectionMixer", "RoMAClassifier", "RoMAClassifierConfig"),
    "var": ("VAR", "VARConfig"),
}

__all__ = [
    "MAR",
    "VAR",
    "ACDiT",
    "ACDiTConfig",
    "ARDiffusion",
    "ARDiffusionConfig",
    "DiT",
    "DiTConfig",
    "DiffusionForcing",
    "DiffusionForcingConfig",
    "FourDirectionMixer",
    "MARConfig",
    "Mamba",
    "Mamba2",
    "Mamba2Config",
    "MambaConfig",
    "MambaLayer",
    "ModelInfo",
    "PresetInfo",
    "RoMA",
    "RoMACache",
    "RoMAClassifier",
    "RoMAClassifierConfig",
    "RoMAConfig",
    "StateSpaceConfig",
    "VARConfig",
    "build",
    "create_model",
    "describe",
    "get_config",
    "list_models",
    "load_checkpoint",
    "load_weights",
    "model_info",
    "save_checkpoint",
]


def __getattr__(name: str) -> Any:
    for file, names in _FILES.items():
        if name in names:
            return getattr(importlib.import_module(f"arcore.models.{file}"), name)
    raise AttributeError(f"module 'arcore.models' has no attribute {name!r}")
