from __future__ import annotations

import pytest

from arcore.models import list_models, model_info


def test_lists_every_preset_with_its_size(arcore):
    outcome = arcore("zoo")
    assert outcome.code == 0
    lines = {line.split()[0]: line for line in outcome.out.splitlines()[1:]}
    assert sorted(lines) == list_models()
    assert "310 M" in lines["var_d16"]
    assert "next_scale" in lines["var_d16"]


def test_filter(arcore, fails):
    names = [line.split()[0] for line in arcore("zoo", "--filter", "*_tiny").out.splitlines()[1:]]
    assert names == list_models("*_tiny")
    assert "no preset matches 'zzz*'" in fails("zoo", "--filter", "zzz*")


def test_shows_a_system(arcore):
    out = arcore("zoo", "var").out
    info = model_info("var")
    assert "arXiv:2404.02905" in out
    assert f"zoo/next_scale/var.py:{info.line}" in out
    assert info.claim in out
    assert "settings of" not in out


def test_shows_a_preset_with_its_settings(arcore):
    out = arcore("zoo", "var_tiny").out
    assert "settings of var_tiny" in out
    assert "patch_nums" in out
    assert "(1, 2, 3, 4)" in out


@pytest.mark.parametrize("name", ["var_tinny", "VAR_TINY", "nothing_like_it"])
def test_unknown_name_is_one_line(fails, name):
    assert f"there is no model {name!r}" in fails("zoo", name)
