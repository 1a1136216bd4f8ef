from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
import zoo_table

from arcore.catalog import catalog, list_models, list_systems, model_info

README = zoo_table.ROOT / "README.md"
ROW = re.compile(r"^\| (?P<topic>[^|]+) \| +(?P<count>\d+) \| \[[^]]+\]\((?P<path>[^)]+)\)", re.MULTILINE)


def test_every_system_and_preset_has_its_page() -> None:
    pages = zoo_table.pages()
    for preset in list_models():
        assert f"| `{preset}` |" in pages[f"zoo/{model_info(preset).name}.md"]
    for name, entry in catalog().items():
        page = pages[f"zoo/{name}.md"]
        assert entry.system.claim in page
        assert entry.doc in page
        assert f"({name}.md)" in pages["zoo/index.md"]
        assert f"({name}.md)" in pages["zoo/papers.md"]
        assert "## Example" in page


def test_pages_show_measured_beside_required(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    row = {"what": "some error", "measured": 0.25, "required": "<= 1", "holds": False}
    entry = {
        "rows": [row],
        "error": None,
        "holds": False,
        "commit": "abc",
        "machine": "one",
        "seconds": 3,
        "date": "x",
    }
    (tmp_path / "claims.json").write_text(json.dumps({"var": entry}))
    monkeypatch.setattr(zoo_table, "CLAIMS", tmp_path / "claims.json")
    pages = zoo_table.pages()
    assert "| **does not hold** | 0.25 | <= 1 | some error |" in pages["zoo/var.md"]
    assert "does not hold" in pages["zoo/index.md"]
    assert "some error: 0.25 (required <= 1) **does not hold**" in zoo_table.table()
    assert "No full check is recorded yet." in pages["zoo/dit.md"]


def test_readmes_table_is_true() -> None:
    """New systems need no edit of README; what it says of the others holds."""
    topics = {zoo_table.topic_text(topic): entries for topic, entries in zoo_table.by_topic().items()}
    rows = list(ROW.finditer(README.read_text(encoding="utf-8")))
    assert len(rows) >= 5
    for row in rows:
        assert int(row["count"]) <= len(topics[row["topic"]])
        assert row["path"] in {zoo_table.source(entry) for entry in topics[row["topic"]]}


EXAMPLES = [(name, zoo_table.example(catalog()[name])) for name in list_systems()]


def test_every_system_has_an_example() -> None:
    """Of its own or of its recipe; a new one without either shows the command that checks its claim."""
    shown = {name for name, found in EXAMPLES if found}
    assert len(shown) >= 68
    strays = {path.stem for path in zoo_table.EXAMPLES.glob("*.py")} - set(list_systems())
    assert {name for name in strays if not name.startswith("recipe_")} == set()


@pytest.mark.parametrize(
    "found", [found for _, found in EXAMPLES if found], ids=[n for n, f in EXAMPLES if f]
)
def test_example_runs(
    found: tuple[Path, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, argument = found
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path), *argument.split()])
    with torch.random.fork_rng(devices=[]):
        runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.strip()
    assert list(tmp_path.iterdir()) == []


def test_stale_table_is_found_and_mended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- zoo:begin -->\n| old |\n<!-- zoo:end -->\nb\n")
    assert zoo_table.main(["--check"], root=tmp_path) == 1
    assert "README.md is out of date" in capsys.readouterr().out
    assert zoo_table.main([], root=tmp_path) == 0
    assert zoo_table.main(["--check"], root=tmp_path) == 0
    assert "| old |" not in readme.read_text()


def test_missing_markers_are_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "README.md").write_text("nothing")
    assert zoo_table.main([], root=tmp_path) == 2
    assert "expected one <!-- zoo:begin" in capsys.readouterr().err
