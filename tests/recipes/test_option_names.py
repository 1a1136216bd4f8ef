"""Options of a recipe share no name with those of every run, or of every model that is drawn from: the command line
has one flag for each."""

from __future__ import annotations

import dataclasses

import pytest

from arcore.catalog import catalog
from arcore.cli.sample import ModelOptions
from arcore.cli.train import RunOptions
from arcore.recipes import recipe_for
from arcore.training.config import TrainConfig


def names(*kinds: type) -> set[str]:
    return {field.name for kind in kinds for field in dataclasses.fields(kind)}


@pytest.mark.parametrize("name", [name for name, entry in catalog().items() if entry.system.recipe])
def test_flags_differ(name: str) -> None:
    recipe = recipe_for(name)
    assert not names(recipe.options) & names(RunOptions, TrainConfig)
    if recipe.sampling is not None:
        assert not names(recipe.sampling) & names(ModelOptions)
