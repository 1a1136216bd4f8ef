from __future__ import annotations

import pytest

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


def test_what_a_function_must_take(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("arcore.catalog.running.load", lambda place, name: lambda options: None)
    with pytest.raises(TypeError, match=r"reusable_holdout\.py:\d+: expected `def run\(options: Options\)"):
        runnable("reusable_holdout")
