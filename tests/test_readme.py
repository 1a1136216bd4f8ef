"""README and docs tell the truth: their Python runs, their tables and figures are up to date, their links resolve."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import bench_table
import pytest

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(
    r"(?P<run><!-- run -->\n)?^```(?P<info>[^\n`]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
IMAGE = re.compile(r'<img src="([^"]+)"')
LINK = re.compile(r"(?<!`)\[[^\]]*\]\((?P<target>[^)#\s]+)(?:#[^)]*)?\)")
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "csrc").rglob("*.md")),
]


def snippets() -> Iterator[object]:
    """All Python of README.md; of the other pages what stands below `<!-- run -->`."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for fence in FENCE.finditer(text):
            if fence["info"].split()[:1] == ["python"] and (
                (page.name == "README.md" and page.parent == ROOT) or fence["run"]
            ):
                line = text.count("\n", 0, fence.start("code")) + 1
                name = f"{page.relative_to(ROOT)}:{line}"
                yield pytest.param("\n" * (line - 1) + fence["code"], page, id=name)


@pytest.mark.parametrize(("code", "page"), list(snippets()))
def test_snippet_runs(code: str, page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # torch.compile and dataclasses look the module of a function up.
    module = types.ModuleType("snippet")
    monkeypatch.setitem(sys.modules, "snippet", module)
    exec(compile(code, str(page), "exec"), module.__dict__)


def test_first_snippet_is_short_and_trains() -> None:
    first = next(f["code"] for f in FENCE.finditer((ROOT / "README.md").read_text()) if f["info"] == "python")
    lines = [line for line in first.splitlines() if line.strip()]
    assert len(lines) <= 10
    assert "backward()" in first


def test_first_screen_has_the_two_commands() -> None:
    head = "\n".join((ROOT / "README.md").read_text().splitlines()[:25])
    for command in ("make demo", "make test", "pip install ."):
        assert command in head


def test_op_table_and_figure_are_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    code = bench_table.main(["--check"])
    assert code == 0, capsys.readouterr()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_resolve(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    targets = [match["target"] for match in LINK.finditer(text)] + IMAGE.findall(text)
    relative = [target for target in targets if not target.startswith(("http://", "https://", "mailto:"))]
    made_at_build = {"docs/zoo/index.md", "docs/zoo/papers.md", "docs/benchmarks.md"}
    missing = [
        target
        for target in relative
        if not (page.parent / target).exists()
        and (page.parent / target).resolve().relative_to(ROOT).as_posix() not in made_at_build
    ]
    assert missing == []


def test_readme_commands_exist() -> None:
    """Every `make x` in the pages is a target of the Makefile."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        (page.name, name)
        for page in PAGES
        for name in re.findall(r"(?:`|^)make ([a-z-]+)", page.read_text(), re.MULTILINE)
    }
    assert {(page, name) for page, name in named if name not in targets} == set()
