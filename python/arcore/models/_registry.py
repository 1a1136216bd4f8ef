"""Looks systems and presets up by name."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import importlib
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from arcore.nn.registry import SYSTEMS, Check, Preset, System

# Sorted. A preset's name starts with its system's, so that one lookup imports one file.
_MODULES = {
    "acdit": "arcore.models.acdit",
    "ar_diffusion": "arcore.models.ar_diffusion",
    "diffusion_forcing": "arcore.models.diffusion_forcing",
    "dit": "arcore.models.dit",
    "mamba": "arcore.models.mamba",
    "mamba2": "arcore.models.mamba2",
    "mar": "arcore.models.mar",
    "msvq": "arcore.tokenizers.multi_scale_vq",
    "roma": "arcore.models.roma",
    "roma_classifier": "arcore.models.roma_classifier",
    "var": "arcore.models.var",
}
# First parts of names under which presets of a system are published, where that is not the system's name.
_ALIASES = {"arm": "roma"}


@dataclass(frozen=True)
class PresetInfo:
    """A named configuration.

    Attributes:
        name: what `create_model` takes.
        parameters: number of parameters.
        summary: one sentence.
        config: the configuration.
        tokenizer: preset of the tokenizer that the model was made for, or None.
    """

    name: str
    parameters: int
    summary: str
    config: Any
    tokenizer: str | None

    @property
    def size(self) -> str:
        """The number of parameters for people, e.g. `"1.2 M"`."""
        for unit, factor in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
            if self.parameters >= factor:
                value = self.parameters / factor
                return f"{value:.1f} {unit}" if value < 100 else f"{value:.0f} {unit}"
        return str(self.parameters)


@dataclass(frozen=True)
class ModelInfo:
    """What there is to know about a system.

    Attributes:
        name: e.g. `"var"`.
        title: as the paper writes it.
        paper: e.g. `"arXiv:2404.02905"`.
        family: kind of system.
        ops: ops of `arcore.ops` that it runs on.
        summary: one sentence.
        check: the test of the paper's claim.
        model: the class; called with a config.
        path: source file.
        line: line of the class.
        presets: in the order of the file.
    """

    name: str
    title: str
    paper: str
    family: str
    ops: tuple[str, ...]
    summary: str
    check: Check
    model: type[nn.Module]
    path: Path
    line: int
    presets: tuple[PresetInfo, ...]

    @property
    def url(self) -> str:
        """Address of the paper."""
        kind, _, number = self.paper.partition(":")
        return f"https://arxiv.org/abs/{number}" if kind == "arXiv" else self.paper


def create_model(name: str, *, weights: str | os.PathLike[str] | None = None, **overrides: Any) -> nn.Module:
    """Make a model or tokenizer of the zoo.

    Args:
        name: a preset, e.g. `"var_tiny"`; `list_models()` has them all. With weights that have a config.json beside
            them also a system, e.g. `"mamba"`: then the config is read from there.
        weights: file or folder to load, see `arcore.models.load_weights`; None leaves random weights.
        **overrides: fields of the preset's config to change, e.g. `num_classes=5`.

    Returns:
        The module, on the CPU, in training mode.

    Raises:
        ValueError: unknown name (the message suggests close ones), unknown or unfit override, unfit weights.
        FileNotFoundError: `weights` does not exist.
    """
    if weights is not None and name in _MODULES:
        from arcore.models._builder import config_beside

        config = _replace(name, config_beside(find_system(name), weights), overrides)
    else:
        config = get_config(name, **overrides)
    model: Any = find_system(name).model
    if weights is None:
        module: nn.Module = model(config)
        return module
    from arcore.models._builder import load_weights

    # Random initial weights of a large model take long and would be thrown away.
    with torch.device("meta"):
        module = model(config)
    load_weights(module, weights)
    return module


def get_config(name: str, **overrides: Any) -> Any:
    """The config of a preset, with some fields replaced.

    Raises:
        ValueError: unknown preset, unknown field (the message suggests close ones), or a value that the config refuses.
    """
    return _replace(name, find_preset(name).config(), overrides)


def _replace(name: str, config: Any, overrides: dict[str, Any]) -> Any:
    known = {field.name for field in dataclasses.fields(config)}
    for field in overrides:
        if field not in known:
            raise ValueError(f"{name} has no setting {field!r}{_hint(field, known)}")
    return dataclasses.replace(config, **overrides)


def list_models(pattern: str = "*", *, family: str | None = None) -> list[str]:
    """Names of presets, sorted.

    Args:
        pattern: with shell wildcards, e.g. `"*_tiny"`.
        family: only systems of this family, e.g. `"next-scale"` or `"tokenizer"`.
    """
    names = [
        preset.name
        for system in all_systems().values()
        if family in (None, system.family)
        for preset in system.presets.values()
    ]
    return sorted(fnmatch.filter(names, pattern))


def model_info(name: str) -> ModelInfo:
    """What there is to know about a system.

    Args:
        name: of a system (`"var"`) or of one of its presets.

    Raises:
        ValueError: unknown name (the message suggests close ones).
    """
    return _system_info(find_system(name).name)


@cache
def _system_info(name: str) -> ModelInfo:
    system = SYSTEMS[name]
    facts = {field.name: getattr(system, field.name) for field in dataclasses.fields(ModelInfo)}
    facts["presets"] = tuple(_preset_info(system, preset) for preset in system.presets.values())
    return ModelInfo(**facts)


def list_systems() -> list[str]:
    """Names of systems, sorted."""
    return sorted(_MODULES)


def all_systems() -> dict[str, System]:
    """Import every file of the zoo."""
    for module in _MODULES.values():
        importlib.import_module(module)
    return {name: SYSTEMS[name] for name in _MODULES}


def find_system(name: str) -> System:
    """The system of that name, or of the preset of that name."""
    if name in _MODULES:
        importlib.import_module(_MODULES[name])
        return SYSTEMS[name]
    return SYSTEMS[find_preset(name).system]


def find_preset(name: str) -> Preset:
    """The preset of that name."""
    for first, system in ({system: system for system in _MODULES} | _ALIASES).items():
        if name.startswith(f"{first}_"):
            importlib.import_module(_MODULES[system])
            if name in SYSTEMS[system].presets:
                return SYSTEMS[system].presets[name]
    names = list_models()
    if name in _MODULES:
        names = [other for other in names if other.startswith(f"{name}_")]
        raise ValueError(f"{name!r} is a system, not a preset: choose one of {', '.join(names)}")
    raise ValueError(f"there is no model {name!r}{_hint(name, [*names, *_MODULES])}")


def _preset_info(system: System, preset: Preset) -> PresetInfo:
    config = preset.config()
    model: Any = system.model
    with torch.device("meta"):
        module = model(config)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return PresetInfo(preset.name, parameters, preset.summary, config, preset.tokenizer)


def _hint(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.5)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; choose one of {', '.join(sorted(known))}"
