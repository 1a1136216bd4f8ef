"""The zoo's register: systems (a paper, one file) and their presets (named configurations).

A system is a class decorated with `register`; its config is a frozen dataclass; a preset is a function decorated with
`preset` that returns one. Files are imported when one of their names is asked for.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

# Every system and the file that holds it, sorted; a test compares this with the folders.
SYSTEMS = {
    "msvq": "arcore.tokenizers.multi_scale_vq",
    "var": "arcore.models.var",
}


@dataclass(frozen=True)
class System:
    """One system of the zoo.

    Attributes:
        name: key, e.g. "var"; presets are named after it, e.g. "var_d16".
        title: the paper's name of it.
        paper: "arXiv:2404.02905" or another citation.
        family: what kind of model it is ("next-scale", "tokenizer", ...); decoding and training go by it.
        ops: arcore ops it runs on.
        summary: one sentence.
        claim: the paper's central claim that is checked here, one sentence.
        check: the test that checks it, as pytest names it.
        model: the class; called with a config.
        presets: functions that return a config, by name.
    """

    name: str
    title: str
    paper: str
    family: str
    ops: tuple[str, ...]
    summary: str
    claim: str
    check: str
    model: type[nn.Module]
    presets: dict[str, Callable[[], Any]] = field(default_factory=dict, compare=False)

    @property
    def location(self) -> tuple[Path, int]:
        """Source file and line of the class."""
        return Path(inspect.getsourcefile(self.model) or ""), inspect.getsourcelines(self.model)[1]


_REGISTERED: dict[str, System] = {}
_Model = TypeVar("_Model", bound=type[nn.Module])
_Preset = TypeVar("_Preset", bound=Callable[[], Any])


def register(name: str, **facts: Any) -> Callable[[_Model], _Model]:
    """Class decorator that enters a system; `facts` are the fields of `System`."""
    if name not in SYSTEMS:
        raise ValueError(f"register: {name!r} is not in arcore._registry.SYSTEMS; add it there with its module")

    def enter(model: _Model) -> _Model:
        _REGISTERED[name] = System(name=name, model=model, **facts)
        return model

    return enter


def preset(system: str) -> Callable[[_Preset], _Preset]:
    """Function decorator that enters a preset; its name must begin with the system's."""

    def enter(function: _Preset) -> _Preset:
        name = function.__name__
        if not name.startswith(f"{system}_"):
            raise ValueError(f"preset: expected a function name beginning with {system}_ but got {name}")
        _REGISTERED[system].presets[name] = function
        return function

    return enter


def systems() -> list[System]:
    """All systems, sorted by name; imports their files."""
    for module in SYSTEMS.values():
        importlib.import_module(module)
    return [_REGISTERED[name] for name in sorted(_REGISTERED)]


def list_models(pattern: str = "*", *, family: str | None = None) -> list[str]:
    """Names of presets that match a shell pattern (`"var_*"`), optionally of one family, sorted."""
    from fnmatch import fnmatchcase

    chosen = (s for s in systems() if family is None or s.family == family)
    return sorted(name for s in chosen for name in s.presets if fnmatchcase(name, pattern))


def model_info(name: str) -> System:
    """The system that a preset or system name belongs to.

    Raises:
        ValueError: there is no such name; the message suggests close ones.
    """
    # Names begin with their system's, so usually one file is enough.
    owners = [s for s in SYSTEMS if name == s or name.startswith(f"{s}_")]
    if owners:
        owner = max(owners, key=len)
        importlib.import_module(SYSTEMS[owner])
        if name == owner or name in _REGISTERED[owner].presets:
            return _REGISTERED[owner]
    known = [*SYSTEMS, *list_models()]
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(close)}?" if close else f"there are {', '.join(sorted(known))}"
    raise ValueError(f"unknown model {name!r}: {hint}")


def get_config(name: str, **overrides: Any) -> Any:
    """The config of a preset, with some fields replaced.

    Raises:
        ValueError: unknown preset, unknown field, or a value that the config refuses.
    """
    info = model_info(name)
    if name not in info.presets:
        raise ValueError(f"{name!r} is a system; choose one of its presets: {', '.join(sorted(info.presets))}")
    config = info.presets[name]()
    fields = {f.name for f in dataclasses.fields(config)}
    for key in overrides:
        if key not in fields:
            raise ValueError(f"{name} has no setting {key!r}; it has {', '.join(sorted(fields))}")
    return dataclasses.replace(config, **overrides)


def create_model(name: str, *, weights: str | os.PathLike[str] | None = None, **overrides: Any) -> nn.Module:
    """Builds a model of the zoo.

    Args:
        name: a preset, e.g. "var_d16"; `list_models()` lists them.
        weights: file (.safetensors, .pth, .pt) or checkpoint folder to load, strictly. Official checkpoints of the
            system are recognised.
        **overrides: fields of the preset's config to replace.

    Returns:
        The model, in training mode, float32, on the CPU.

    Raises:
        ValueError: unknown name or field, or a file that is damaged or does not fit.
        FileNotFoundError: `weights` does not exist.
    """
    config = get_config(name, **overrides)
    info = model_info(name)
    model = info.model(config)
    if weights is not None:
        from arcore._weights import load_weights

        load_weights(model, weights, name=info.name)
    return model


def count_parameters(name: str) -> int:
    """Number of trainable parameters of a preset, without allocating them."""
    import torch

    with torch.device("meta"):
        model = create_model(name)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
