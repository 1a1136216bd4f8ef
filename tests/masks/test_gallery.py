"""The gallery page: every constructor is there, with its picture, its code and the true density."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="the plot extra is not installed")

import mask_gallery

from arcore import masks

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/masks.md").read_text(encoding="utf-8")
ENTRY = re.compile(
    r"!\[[^\]]+\]\(assets/masks/(?P<name>\w+)\.png\)\n\n"
    r"```python\n(?P<code>[^\n]+)\n```\n\n"
    r"Density (?P<density>\d\.\d+)\."
)
ENTRIES = {entry["name"]: entry for entry in ENTRY.finditer(PAGE)}
NOT_CONSTRUCTORS = {"from_bool", "from_block_mask", "reference_tile_plan"}


def test_page_shows_every_constructor() -> None:
    constructors = {name for name in masks.__all__ if name[0].islower()} - NOT_CONSTRUCTORS
    assert constructors == set(re.findall(r"^### (\w+)$", PAGE, re.MULTILINE))


def test_page_shows_every_picture() -> None:
    assert {name: entry["code"] for name, entry in ENTRIES.items()} == mask_gallery.GALLERY
    assert {p.stem for p in (ROOT / "docs/assets/masks").glob("*.png")} == set(ENTRIES)


@pytest.mark.parametrize("name", mask_gallery.GALLERY)
def test_density_is_true(name: str) -> None:
    assert ENTRIES[name]["density"] == f"{mask_gallery.build(mask_gallery.GALLERY[name]).density:.3f}"


def test_drawing_again(tmp_path: Path) -> None:
    drawn = {path.relative_to(tmp_path) for path in mask_gallery.draw(tmp_path)}
    committed = [*(ROOT / "docs/assets/masks").glob("*.png"), ROOT / "docs/assets/masks.png"]
    assert drawn == {path.relative_to(ROOT / "docs/assets") for path in committed}
    for path in (*committed, *(tmp_path / name for name in drawn)):
        assert 1000 < path.stat().st_size < 40 * 1024, path
