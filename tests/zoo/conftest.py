"""Finds what drives each system through the contract of its kind. Nothing here lists systems.

A network is driven by the class `Protocol` of `tests/zoo/protocol_<recipe>.py`, or of the system's own test file where
its recipe is its own. Systems of other kinds bring a class `Contract` in their test file; where they train a network
too, a class `Protocol` with its `loss` (`tests/training/test_devices.py` shards it).
"""

from __future__ import annotations

import contextlib
import importlib
from types import ModuleType
from typing import Any

import pytest
from torch import nn

import arcore
from arcore.catalog import catalog, find, get_config
from arcore.catalog.claims import shaken as shaken


def stem(system: str) -> str:
    """What the system's file or folder is called."""
    return catalog()[system].place.module.split(".")[3]


def test_module(system: str) -> ModuleType:
    """The system's test file, `tests/zoo/<topic>/test_<system>.py`."""
    return importlib.import_module(f"tests.zoo.{catalog()[system].system.topic}.test_{stem(system)}")


def protocol(preset: str) -> Any:
    """What drives a preset of a network."""
    system = find(preset).entry.system
    if system.recipe in (None, "own"):
        module = test_module(system.name)
    else:
        module = importlib.import_module(f"tests.zoo.protocol_{system.recipe}")
    if not hasattr(module, "Protocol"):
        raise AttributeError(
            f"{module.__name__} has no class Protocol, which drives {preset} through the model contract "
            "(tests/zoo/protocol_language.py is an example)"
        )
    return module.Protocol(preset)


def contracts(kind: str, *doubles: Any) -> list[Any]:
    """What drives the systems of a kind, and test doubles of that kind, as parameters of tests."""
    found = [pytest.param(double, id=double.__name__) for double in doubles]
    for name, entry in catalog().items():
        if entry.system.kind == kind:
            module = test_module(name)
            if not hasattr(module, "Contract"):
                raise AttributeError(
                    f"{module.__name__} has no class Contract, which drives {name} through tests/zoo/contract_{kind}.py"
                )
            found.append(pytest.param(module.Contract, id=name))
    return found


@pytest.fixture(params=arcore.list_models("*_tiny", kind="model"))
def preset(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def adapter(preset: str) -> Any:
    return protocol(preset)


@pytest.fixture
def shallow(preset: str) -> nn.Module:
    """The preset with two layers where its config counts them: tracing takes as long as there are layers, all alike."""
    config = get_config(preset)
    for name in ("depth", "num_layers", "n_layer"):
        if getattr(config, name, 0) > 2:
            with contextlib.suppress(ValueError):  # of a system that counts in sixes, or names its layers
                return shaken(arcore.create_model(preset, **{name: 2}))
    return shaken(arcore.create_model(preset))


@pytest.fixture
def model(preset: str) -> nn.Module:
    """The preset with random weights, away from initialisation, in evaluation mode."""
    return shaken(arcore.create_model(preset)).eval()
