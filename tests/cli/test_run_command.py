from __future__ import annotations

import dataclasses
import math
import typing
from pathlib import Path
from typing import Any

import pytest

from arcore.catalog import catalog
from arcore.catalog.running import runnable


def test_help_shows_the_options_of_that_system(arcore):
    out = arcore("run", "reusable_holdout", "--help").out
    assert "--chosen" in out
    assert "--dim" not in out
    assert "reusable_holdout" in arcore("run", "--help").out


def test_bad_requests_are_one_line(fails):
    assert "name a system first; what can be run: " in fails("run")
    assert "var is not for `arcore run`: `arcore train var_tiny` trains it" in fails("run", "var")
    assert "did you mean reusable_holdout" in fails("run", "reusable_holdut")
    assert "--rows must be at least 1 but got 0" in fails("run", "reusable_holdout", "--rows", "0")
    assert "--colums" in fails("run", "reusable_holdout", "--colums", "3")


def test_numbers_that_mean_nothing_are_refused_before_the_run(fails):
    assert "--density must" in fails("run", "alpine", "--density", "nan")
    assert "--lr must" in fails("run", "alpine", "--lr", "nan")
    assert "--lr must be a finite number but got inf" in fails("run", "alpine", "--lr", "inf")
    assert "--steps must fit into 64 bits" in fails("run", "alpine", "--steps", "99999999999999999999")


@pytest.mark.parametrize(
    "name", sorted(name for name, entry in catalog().items() if "run" in entry.functions)
)
def test_no_system_runs_for_no_steps_or_learns_backwards(name: str):
    """Sizes below 1, rates below 0 and rates that are no number, in all systems that can be run."""
    options = runnable(name).options
    fields = dataclasses.fields(options)
    empty = (dataclasses.MISSING, dataclasses.MISSING)
    kinds = typing.get_type_hints(options)
    given: dict[Any, Any] = {int: 1, Path: Path("x"), tuple[float, ...]: (0.0, 1.0)}
    needed = {
        field.name: given.get(kinds[field.name], "x")
        for field in fields
        if (field.default, field.default_factory) == empty
    }
    for field in fields:
        if isinstance(field.default, bool) or not isinstance(field.default, (int, float)):
            continue
        values: list[float] = []
        if field.name in ("steps", "updates", "rounds", "batch", "group", "count", "layers", "heads", "dim"):
            values = [0, -1]
        elif field.name.endswith("lr"):
            values = [-1.0, math.nan]
        for value in values:
            with pytest.raises((ValueError, TypeError), match=field.name.replace("_", "[-_]")):
                options(**{**needed, field.name: value})


def test_what_a_function_must_take(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("arcore.catalog.running.load", lambda place, name: lambda options: None)
    with pytest.raises(TypeError, match=r"reusable_holdout\.py:\d+: expected `def run\(options: Options\)"):
        runnable("reusable_holdout")
