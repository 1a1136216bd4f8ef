from __future__ import annotations

from pathlib import Path

import pytest
import zoo_table

import arcore


def test_every_system_and_preset_is_listed() -> None:
    table, pages = zoo_table.table("{source}"), zoo_table.pages()
    for preset in arcore.list_models():
        assert f"`{preset}` (" in table
        info = arcore.model_info(preset)
        assert f"| `{preset}` |" in pages[f"zoo/{info.name}.md"]
        assert f"({info.name}.md)" in pages["zoo/index.md"]


def test_links_of_the_table_lead_to_the_source() -> None:
    for info in zoo_table.infos():
        lines = (zoo_table.ROOT / zoo_table.source(info)).read_text().splitlines()
        assert lines[info.line - 1].startswith("class ")


def test_stale_table_is_found_and_mended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- zoo:begin -->\n| old |\n<!-- zoo:end -->\nb\n")
    assert zoo_table.main(["--check"], root=tmp_path) == 1
    assert "README.md is out of date" in capsys.readouterr().out
    assert zoo_table.main([], root=tmp_path) == 0
    assert zoo_table.main(["--check"], root=tmp_path) == 0
    assert "old" not in readme.read_text()


def test_missing_markers_are_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "README.md").write_text("nothing")
    assert zoo_table.main([], root=tmp_path) == 2
    assert "expected one <!-- zoo:begin" in capsys.readouterr().err
