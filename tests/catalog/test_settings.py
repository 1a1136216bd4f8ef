"""Overrides of a preset's settings by values of another type."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, get_type_hints

import pytest
from torch import nn

from arcore.catalog import create_model, find, get_config, list_models
from arcore.catalog.lookup import model_class

WRONG: dict[Any, list[Any]] = {bool: ["yes", 1, None], int: [2.5, True, "4"], float: ["0.1", True], str: [3]}
TINY = [name for name in list_models("*_tiny")]


@pytest.mark.parametrize("preset", TINY)
def test_every_plain_setting_of_every_system_refuses_other_types(preset: str) -> None:
    config = get_config(preset)
    kinds = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        for value in WRONG.get(kinds[field.name], []):
            with pytest.raises((TypeError, ValueError)) as caught:
                get_config(preset, **{field.name: value})
            assert repr(value) in str(caught.value) or field.name in str(caught.value)


@pytest.mark.parametrize("preset", TINY)
def test_configs_and_models_made_directly_refuse_other_kinds(preset: str) -> None:
    config = get_config(preset)
    kinds = get_type_hints(type(config))
    wrong = {bool: ["yes", None], int: [None, "x", [1, 2], math.nan], float: [None, "x", [1, 2], math.nan]}
    for field in dataclasses.fields(config):
        for value in wrong.get(kinds[field.name], []):
            with pytest.raises((TypeError, ValueError), match=field.name):
                dataclasses.replace(config, **{field.name: value})
    model = model_class(find(preset).entry)
    for value in (None, 3, "x", [1, 2], math.nan, nn.Linear(1, 1)):
        with pytest.raises(TypeError, match=r"^arcore\.\w+: expected config to be "):
            model(value)


def test_the_message_says_what_was_expected() -> None:
    with pytest.raises(TypeError, match="learn_sigma must be True or False but got 'yes'"):
        create_model("dit_tiny", learn_sigma="yes")


def test_a_whole_number_is_a_number() -> None:
    floats = [f for f, kind in get_type_hints(type(get_config("llama_tiny"))).items() if kind is float]
    assert floats
    assert getattr(get_config("llama_tiny", **{floats[0]: 1}), floats[0]) == 1
