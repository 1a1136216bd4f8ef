from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from arcore.catalog import catalog, list_models, list_systems, model_info, search

README = Path(__file__).resolve().parents[2] / "README.md"


def test_lists_every_preset_with_its_size_and_every_other_system(arcore):
    outcome = arcore("zoo")
    assert outcome.code == 0
    presets, _, others = outcome.out.partition("\n\n")
    lines = {line.split()[0]: line for line in presets.splitlines()[1:]}
    assert sorted(lines) == list_models()
    assert "310 M" in lines["var_d16"]
    assert "next_scale" in lines["var_d16"]
    assert [line.split()[0] for line in others.splitlines()[1:]] == [
        name for name in list_systems() if not model_info(name).presets
    ]


def test_filter(arcore, fails):
    names = [line.split()[0] for line in arcore("zoo", "--filter", "*_tiny").out.splitlines()[1:]]
    assert names == list_models("*_tiny")
    assert "no preset matches 'zzz*'" in fails("zoo", "--filter", "zzz*")
    assert "leave out the words" in fails("zoo", "--filter", "*", "var")


@pytest.mark.parametrize("words", [("var",), ("VAR",), ("var_d16",)])
def test_shows_a_system(arcore, words):
    out = arcore("zoo", *words).out
    info = model_info("var")
    assert "arXiv:2404.02905" in out
    assert f"zoo/next_scale/var.py:{info.line}" in out
    assert info.claim in out
    assert f"on {info.checked_on}; `arcore check var` repeats it" in out
    assert ("settings of var_d16" in out) is (words == ("var_d16",))


def test_shows_what_the_paper_reports(arcore):
    reported = model_info("dp_mobility").reported
    assert reported is not None
    assert f"paper's  {reported}" in arcore("zoo", "dp_mobility").out
    assert model_info("var").reported is None
    assert "paper's" not in arcore("zoo", "var").out


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("2404.02905",), {"var", "msvq"}),
        (("https://arxiv.org/abs/2412.07720",), {"acdit"}),
        (("arXiv:2412.07720v2",), {"acdit"}),
        (("https://arxiv.org/pdf/2412.07720v3.pdf",), {"acdit"}),
        (("arXiv:2503.10392",), {"roma", "roma_classifier"}),
        (("Multi-scale VQ",), {"msvq"}),
        (("multi-scale", "vq"), {"msvq"}),
        (("estimator",), {"reusable_holdout"}),
        (("state_space",), {"mamba", "mamba2"}),
        (("video", "frame"), {"ar_diffusion"}),
    ],
)
def test_finds_by_title_number_topic_kind_and_words(arcore, words, found):
    outcome = arcore("zoo", *words, "--json")
    assert {entry["name"] for entry in json.loads(outcome.out)} >= found
    text = arcore("zoo", *words).out
    for name in found:
        assert name in text
        assert f":{model_info(name).line}" in text


def test_every_name_title_and_number_finds_its_system():
    for name, entry in catalog().items():
        system = entry.system
        for words in (name, system.title, system.title.upper(), system.paper, system.url, *entry.presets):
            assert entry in search(words), (name, words)


def test_a_papers_title_finds_its_systems():
    """Whole, without its first word, in capitals, with a misprint, with the marks that a reference has."""
    for name, entry in catalog().items():
        title = entry.system.paper_title
        if title is None:
            continue
        same = {other for other, e in catalog().items() if e.system.paper_title == title}
        words = title.split()
        middle = len(words) // 2
        misprinted = " ".join(
            [*words[:middle], words[middle][::-1][:3] + words[middle][3:], *words[middle + 1 :]]
        )
        forms = [title, title.upper(), f'"{title}."', misprinted]
        forms += [" ".join(words[1:])] if len(words) > 4 else []
        for form in forms:
            found = {e.system.name for e in search(form)}
            assert name in found, form
            assert form == " ".join(words[1:]) or found == same, form


def test_systems_of_one_paper_have_its_one_title():
    titles: dict[str, set[str | None]] = {}
    for entry in catalog().values():
        titles.setdefault(entry.system.paper, set()).add(entry.system.paper_title)
        assert entry.system.paper_title or not entry.system.paper.startswith(("arXiv:", "doi:")), (
            entry.system.name
        )
    assert all(len(found) == 1 for found in titles.values())


def test_every_name_in_readmes_table_is_found():
    rows = re.findall(r"^\|[^|]+\|[^|]+\| \[([^]]+)\]\(python/", README.read_text(), re.MULTILINE)
    assert len(rows) >= 5
    assert all(search(title) for title in rows)


def test_json_has_what_programs_need(arcore):
    content = json.loads(arcore("zoo", "--json").out)
    assert [entry["name"] for entry in content] == list_systems()
    [var] = [entry for entry in content if entry["name"] == "var"]
    fields = {
        "name",
        "title",
        "paper",
        "paper_title",
        "topic",
        "kind",
        "summary",
        "claim",
        "checked_on",
        "reported",
        "path",
        "line",
        "presets",
    }
    assert fields <= var.keys()
    assert Path(var["path"]).read_text().splitlines()[var["line"] - 1].startswith("class VAR")
    assert "var_tiny" in var["presets"]


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("var_tinny",), "did you mean var_tiny"),
        (("Mutli-scale VQ",), "did you mean Multi-scale VQ"),
        (("2404.02950",), "did you mean arXiv:2404.02905"),
        (("medussa", "heads"), "did you mean medusa"),
        (("levensthein",), "did you mean levenshtein"),
        (("nothing_like_it_at_all",), "`arcore zoo` lists all"),
    ],
)
def test_unknown_words_are_one_line_with_suggestions(fails, words, hint):
    line = fails("zoo", *words)
    assert "nothing in the zoo fits" in line
    assert hint in line
