"""Names, presets and what the registry says about systems."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

import arcore
from arcore.models import _registry
from arcore.nn.registry import SYSTEMS, Check, preset, register

ROOT = Path(arcore.__file__).parent


@pytest.mark.parametrize("room", ["models", "tokenizers"])
def test_lazy_tables_name_every_file_and_what_is_in_it(room: str):
    package = importlib.import_module(f"arcore.{room}")
    files = sorted(path.stem for path in (ROOT / room).glob("*.py") if not path.stem.startswith("_"))
    assert list(package._FILES) == files
    for file, names in package._FILES.items():
        module = importlib.import_module(f"arcore.{room}.{file}")
        assert list(names) == sorted(names)
        for name in names:
            assert getattr(package, name) is getattr(module, name)
            assert name in package.__all__
        # Each system of the file can be had from the package.
        systems = [s.model.__name__ for s in SYSTEMS.values() if s.model.__module__ == module.__name__]
        assert set(systems) <= set(names)


def test_registry_names_every_file_with_a_system():
    assert list(_registry._MODULES) == sorted(_registry._MODULES)
    named = set(_registry._MODULES.values())
    for room in ("models", "tokenizers"):
        for path in (ROOT / room).glob("*.py"):
            decorated = re.search(r"^@register\($", path.read_text(), re.MULTILINE) is not None
            assert decorated == (f"arcore.{room}.{path.stem}" in named), path
    for name, system in _registry.all_systems().items():
        assert name == system.name
        assert system.presets, f"{name} has no preset"


def test_the_zoo_loads_nothing_before_it_is_asked():
    code = (
        "import sys, arcore.models, arcore.tokenizers\n"
        "assert 'arcore.models.var' not in sys.modules\n"
        "assert 'arcore.tokenizers.multi_scale_vq' not in sys.modules\n"
        "arcore.models.VAR\n"
        "assert 'arcore.models.var' in sys.modules\n"
        "assert 'arcore.tokenizers.multi_scale_vq' not in sys.modules\n"
        "arcore.create_model('msvq_tiny')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", sorted(_registry._MODULES))
def test_information_is_true(name: str):
    info = arcore.model_info(name)
    assert info.path.read_text().splitlines()[info.line - 1 :][0].startswith(("@register(", "class "))
    assert info.model.__module__ == _registry._MODULES[name]
    assert re.fullmatch(r"arXiv:\d{4}\.\d{5}", info.paper)
    assert info.url == f"https://arxiv.org/abs/{info.paper.removeprefix('arXiv:')}"
    for op in info.ops:
        assert callable(getattr(arcore.ops, op))
    for sentence in (info.summary, info.check.claim, *(p.summary for p in info.presets)):
        assert len(sentence) > 20
        assert sentence.endswith((".", "pth"))
    file, _, test = info.check.test.partition("::")
    tree = ast.parse((ROOT.parent.parent / file).read_text())
    assert test in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    for entry in info.presets:
        assert entry.tokenizer is None or entry.tokenizer in arcore.list_models(family="tokenizer")
        assert arcore.model_info(entry.name) == info


def test_a_model_and_its_tokenizer_agree():
    pairs = [
        (entry.config, arcore.models.get_config(entry.tokenizer))
        for name in _registry._MODULES
        for entry in arcore.model_info(name).presets
        if entry.tokenizer
    ]
    assert pairs
    for model, tokenizer in pairs:
        for field in ("patch_nums", "vocab_size", "z_channels"):
            assert getattr(model, field) == getattr(tokenizer, field)


def test_lists_are_sorted_and_filtered():
    names = arcore.list_models()
    assert names == sorted(names)
    assert {"msvq_tiny", "var_d16", "var_tiny"} <= set(names)
    assert "msvq_tiny" not in arcore.list_models(family="next-scale")
    assert arcore.list_models("var_d*") == ["var_d16", "var_d20", "var_d24", "var_d30"]
    assert arcore.list_models(family="nothing") == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("var_tini", "there is no model 'var_tini'; did you mean var_tiny"),
        ("varr_d16", "did you mean var_d16"),
        ("var", r"'var' is a system, not a preset: choose one of var_d16, .*var_tiny"),
        ("zzzz", "there is no model 'zzzz'; choose one of acdit, .*arm_base_pz16, .*msvq, .*var_tiny"),
        ("", "there is no model ''"),
    ],
)
def test_unknown_names(name: str, message: str):
    with pytest.raises(ValueError, match=message):
        arcore.create_model(name)


def test_unknown_system():
    with pytest.raises(ValueError, match="did you mean var"):
        arcore.model_info("vra")


def test_overrides():
    model = arcore.create_model("var_tiny", num_classes=3, patch_nums=[1, 2])
    assert model.config.num_classes == 3
    assert model.patch_nums == (1, 2)
    with pytest.raises(ValueError, match="var_tiny has no setting 'num_class'; did you mean num_classes"):
        arcore.create_model("var_tiny", num_class=3)
    with pytest.raises(ValueError, match="expected depth to be at least 1 but got 0"):
        arcore.create_model("var_tiny", depth=0)


def test_registering_twice_or_under_a_foreign_name():
    facts = {"title": "x", "paper": "x", "family": "x", "ops": (), "summary": "x", "check": Check("x", "x")}
    _registry.all_systems()
    with pytest.raises(ValueError, match="the system 'var' is registered twice"):
        register("var", **facts)(nn.Module)
    with pytest.raises(ValueError, match=r"the preset 'tiny' of the system 'var' must be named var_\.\.\."):

        @preset("var")
        def tiny():
            pass

    assert "tiny" not in SYSTEMS["var"].presets


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        (950, "950"),
        (9_500, "9.5 k"),
        (735_432, "735 k"),
        (1_234_567, "1.2 M"),
        (310_000_000, "310 M"),
        (2_040_000_000, "2.0 B"),
    ],
)
def test_sizes_are_short(parameters: int, text: str) -> None:
    assert _registry.PresetInfo("x", parameters, "", None, None).size == text


def test_presets_may_carry_a_published_name():
    for first, system in _registry._ALIASES.items():
        assert first in arcore.models._registry.find_system(system).aliases
        assert arcore.list_models(f"{first}_*")
        assert {arcore.model_info(name).name for name in arcore.list_models(f"{first}_*")} == {system}
    assert {alias for s in SYSTEMS.values() for alias in s.aliases} == set(_registry._ALIASES)
    assert not set(_registry._ALIASES) & set(_registry._MODULES)
    with pytest.raises(ValueError, match="did you mean arm_base_pz16"):
        arcore.create_model("arm_base_pz61")
