"""Names, presets and what the catalogue says about systems."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

import arcore
from arcore.catalog import catalog, list_systems
from arcore.catalog.lookup import PresetInfo


def test_the_zoo_loads_nothing_before_it_is_asked():
    code = (
        "import sys, arcore.models, arcore.tokenizers\n"
        "arcore.list_models()\n"
        "loaded = lambda: {name for name in sys.modules if name.startswith('arcore.zoo.')}\n"
        "assert loaded() == set(), loaded()\n"
        "arcore.models.VAR\n"
        "assert loaded() == {'arcore.zoo.next_scale', 'arcore.zoo.next_scale.var'}, loaded()\n"
        "arcore.create_model('msvq_tiny')\n"
        "assert 'arcore.zoo.continuous.dit' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_facades_have_the_classes_of_all_systems():
    for entry in catalog().values():
        if entry.system.model:
            assert getattr(arcore.models, entry.system.model).__module__ == entry.source.module
    with pytest.raises(AttributeError, match="several systems have a class 'Options': import it from"):
        _ = arcore.models.Options
    assert {"VAR", "VARConfig", "MambaLayer", "create_model"} <= set(dir(arcore.models))
    assert set(dir(arcore.tokenizers)) >= {"MultiScaleVQ", "MultiScaleVQConfig", "MultiScaleVQOutput"}
    assert "VAR" not in dir(arcore.tokenizers)
    with pytest.raises(AttributeError, match=r"'arcore\.models' has no attribute 'VARr'; did you mean VAR"):
        _ = arcore.models.VARr
    with pytest.raises(AttributeError, match=r"'arcore\.tokenizers' has no attribute '_x'"):
        _ = arcore.tokenizers._x


@pytest.mark.parametrize("name", list_systems())
def test_information_is_true(name: str):
    info = arcore.model_info(name)
    assert info.path.read_text().splitlines()[info.line - 1].startswith(("class ", "SYSTEM ="))
    if info.paper.startswith("arXiv:"):
        assert info.url == f"https://arxiv.org/abs/{info.paper.removeprefix('arXiv:')}"
    else:
        assert info.url.startswith("https://")
    for op in info.ops:
        # An op's file may hold functions of other names, as speculative's verify_chain.
        assert callable(getattr(arcore.ops, op)) or op == "speculative"
    for sentence in (info.summary, info.claim, *(p.summary for p in info.presets)):
        assert len(sentence) > 20
        assert sentence.endswith((".", "pth"))
    assert catalog()[name].doc
    for entry in info.presets:
        assert entry.tokenizer is None or entry.tokenizer in arcore.list_models()
        assert arcore.model_info(entry.name) == info


def test_declarations_are_what_the_files_say():
    for entry in catalog().values():
        module = sys.modules.get(entry.place.module) or __import__(entry.place.module, fromlist=["SYSTEM"])
        assert entry.system == module.SYSTEM


def test_a_model_and_its_tokenizer_agree():
    pairs = [
        (entry.config, arcore.models.get_config(entry.tokenizer))
        for name in list_systems()
        for entry in arcore.model_info(name).presets
        if entry.tokenizer
    ]
    # Models of other protocols take the number of codes from the tokenizer that they are trained with.
    pairs = [pair for pair in pairs if hasattr(pair[1], "patch_nums") and hasattr(pair[0], "vocab_size")]
    assert pairs
    for model, tokenizer in pairs:
        for field in ("patch_nums", "vocab_size", "z_channels"):
            assert getattr(model, field) == getattr(tokenizer, field)


def test_lists_are_sorted_and_filtered():
    names = arcore.list_models()
    assert names == sorted(names)
    assert {"msvq_tiny", "var_d16", "var_tiny"} <= set(names)
    assert "msvq_tiny" not in arcore.list_models(topic="next_scale")
    assert "msvq_tiny" in arcore.list_models(recipe="tokenizer", kind="model")
    assert arcore.list_models("var_d*") == ["var_d16", "var_d20", "var_d24", "var_d30", "var_d36"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topic": "next_scal"}, "there is no topic 'next_scal'; did you mean next_scale"),
        ({"kind": "modell"}, "there is no kind 'modell'; did you mean model"),
        ({"recipe": "next-scale"}, "there is no recipe 'next-scale'; did you mean next_scale"),
    ],
)
def test_unknown_filters(options: dict[str, str], message: str):
    with pytest.raises(ValueError, match=message):
        arcore.list_models(**options)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("var_tini", "there is no model 'var_tini'; did you mean var_tiny"),
        ("varr_d16", "did you mean var_d16"),
        ("var", r"'var' is a system, not a preset: choose one of var_d16, .*var_tiny"),
        ("zzzz", "there is no model 'zzzz'; `arcore zoo` lists"),
        ("", "there is no model ''"),
        ("arm_base_pz61", "did you mean arm_base_pz16"),
        ("Multi-Scale VQ", "Multi-scale VQ is the system 'msvq'"),
        ("2404.02905", "2404.02905 is the system '(var|msvq)'"),
    ],
)
def test_unknown_names(name: str, message: str):
    with pytest.raises(ValueError, match=message):
        arcore.create_model(name)


def test_unknown_system():
    with pytest.raises(ValueError, match="did you mean var"):
        arcore.model_info("vra")


@pytest.mark.parametrize("name", [None, 3, ["var_tiny"]])
def test_names_of_a_wrong_kind(name: object):
    for function in (arcore.create_model, arcore.model_info, arcore.models.get_config):
        with pytest.raises(TypeError, match="expected the name of a preset or system"):
            function(name)
    with pytest.raises(TypeError, match="expected pattern to be a text"):
        arcore.list_models(name)
    with pytest.raises(TypeError, match="expected topic to be a text"):
        arcore.list_models(topic=3)
    with pytest.raises(TypeError, match="expected weights to be the path"):
        arcore.create_model("var_tiny", weights=5)


def test_overrides():
    model = arcore.create_model("var_tiny", num_classes=3, patch_nums=[1, 2])
    assert model.config.num_classes == 3
    assert model.patch_nums == (1, 2)
    with pytest.raises(ValueError, match="var_tiny has no setting 'num_class'; did you mean num_classes"):
        arcore.create_model("var_tiny", num_class=3)
    with pytest.raises(ValueError, match="'zz'; `arcore zoo mamba_tiny` lists what there is"):
        arcore.create_model("mamba_tiny", zz=3)
    with pytest.raises(ValueError, match="expected depth to be at least 1 but got 0"):
        arcore.create_model("var_tiny", depth=0)


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
    assert PresetInfo("x", parameters, "", None, None).size == text


def test_presets_may_carry_a_published_name():
    assert {arcore.model_info(name).name for name in arcore.list_models("arm_*")} == {"roma"}
    for entry in catalog().values():
        for alias in entry.system.aliases:
            assert arcore.list_models(f"{alias}_*")
            assert alias not in catalog()


def test_a_paper_is_written_in_one_way():
    for entry in catalog().values():
        assert re.fullmatch(r"arXiv:\d{4}\.\d{4,5}|doi:\S+|https://\S+", entry.system.paper)
