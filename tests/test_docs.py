"""The documentation builds without a warning and without reaching for anything on a network."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="the docs extra is not installed")
pytest.importorskip("material", reason="the docs extra is not installed")
pytest.importorskip("mkdocstrings", reason="the docs extra is not installed")

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *(
        "index",
        "install",
        "demo",
        "training",
        "masks",
        "architecture",
        "numerics",
        "benchmarks",
        "contributing",
    ),
    *(
        "ops/index",
        "ops/block_sparse_attention",
        "ops/speculative",
        "zoo/index",
        "zoo/var",
        "api/ops",
        "api/masks",
        "api/models",
        "api/data",
        "api/tokenizers",
        "api/objectives",
        "zoo/papers",
        "taxonomy/nar",
        "taxonomy/generative_rl",
    ),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    return folder


@pytest.mark.parametrize("page", PAGES)
def test_page_is_built(site: Path, page: str) -> None:
    assert (site / f"{page}.html").stat().st_size > 2000


def test_a_sentence_of_two_lines_is_one_return_value(site: Path) -> None:
    text = (site / "api/ops.html").read_text()
    tables = re.findall(r"Returns:</span>.*?</table>", text, re.S)
    assert len(tables) >= 10
    assert [table for table in tables if table.count('<tr class="doc-section-item">') > 1] == []


def test_search_finds_a_paper_by_its_number(site: Path) -> None:
    index = json.loads((site / "search/search_index.json").read_text())
    words = re.compile(index["config"]["separator"])
    assert "2404.02905" in words.split("paper arXiv:2404.02905 (VAR)")
    assert "block_sparse_attention" in words.split("`arcore.ops.block_sparse_attention`")
    [page] = [entry for entry in index["docs"] if entry["location"] == "zoo/var.html"]
    assert "2404.02905" in words.split(page["text"])


def test_commands_in_tables_go_on_between_words(site: Path) -> None:
    text = (site / "install.html").read_text()
    command = "<span>pip</span> <span>install</span> <span>--no-build-isolation</span> <span>-e</span> <span>.</span>"
    assert f'<td><code class="words">{command}</code></td>' in text
    assert "<td><code>pip install .</code></td>" in text


def test_reference_shows_docstrings(site: Path) -> None:
    text = (site / "api/ops.html").read_text()
    assert "reference_block_sparse_attention" in text
    assert "return_lse" in text


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    loads = re.compile(
        r'<(?:script|img|iframe)[^>]+src="(https?:[^"]+)"|<link[^>]+rel="stylesheet"[^>]+href="(https?:[^"]+)"'
    )
    found = {
        (page.name, match[0]) for page in site.rglob("*.html") for match in loads.finditer(page.read_text())
    }
    assert found == set()
