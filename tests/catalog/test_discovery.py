"""Systems are found by reading their files; a wrong declaration is one line that names file and line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from arcore.catalog import catalog
from arcore.catalog.discovery import ZOO, CatalogError, read, without_claim

FILE = '''"""A paper."""

from arcore.catalog import System, preset

SYSTEM = System(
    name="toy",
    title="Toy",
    paper="arXiv:2404.02905",
    topic="language",
    kind="model",
    model="Toy",
    summary="A toy.",
    claim="It holds.",
    checked_on="real data",
)


class ToyConfig: ...


class Toy: ...


class _Hidden: ...


@preset
def toy_tiny():
    """The smallest."""


@preset(tokenizer=None)
def toy_b():
    """The base."""


def claim(*, quick): ...
'''


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    (tmp_path / "language").mkdir()
    (tmp_path / "language/__init__.py").write_text('"""Texts."""\n')
    (tmp_path / "language/_common.py").write_text("SHARED = 1\n")
    (tmp_path / "language/toy.py").write_text(FILE)
    return tmp_path


def test_a_file_is_read_and_not_run(zoo: Path):
    path = zoo / "language/toy.py"
    path.write_text(FILE + "\nraise RuntimeError\n")
    entries, problems = read(zoo)
    assert problems == []
    entry = entries["toy"]
    assert (entry.system.title, entry.system.ops, entry.doc) == ("Toy", (), "A paper.")
    assert list(entry.presets) == ["toy_tiny", "toy_b"]
    assert entry.presets["toy_tiny"].summary == "The smallest."
    assert set(entry.classes) == {"ToyConfig", "Toy"}
    assert set(entry.functions) == {"claim"}
    assert entry.source.module == "arcore.zoo.language.toy"
    assert path.read_text().splitlines()[entry.source.line - 1] == "class Toy: ..."
    assert path.read_text().splitlines()[entry.place.line - 1] == "SYSTEM = System("


def test_a_folder_is_one_system(zoo: Path):
    (zoo / "language/toy.py").unlink()
    folder = zoo / "language/toy"
    folder.mkdir()
    head, rest = FILE.split("class ToyConfig")
    (folder / "__init__.py").write_text(head)
    (folder / "model.py").write_text("from arcore.catalog import preset\n\n\nclass ToyConfig" + rest)
    entries, problems = read(zoo)
    assert problems == []
    assert entries["toy"].source.module == "arcore.zoo.language.toy.model"
    assert entries["toy"].place.module == "arcore.zoo.language.toy"
    assert entries["toy"].doc == "A paper."
    (folder / "model.py").write_text(FILE)
    assert any("there is a second SYSTEM" in line for line in read(zoo)[1])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name="toy",', "name=NAME,", "toy.py:5: expected name to be a literal but got `NAME`"),
        ('name="toy",', 'name="Toy",', "toy.py:5: expected a name of lower-case letters"),
        ('name="toy",', "name=3,", "toy.py:5: expected name to be a text but got 3"),
        ('kind="model"', 'kind="network"', "toy.py:5: expected kind to be one of 'model', .*'network'"),
        ('"real data"', '"dreams"', "toy.py:5: expected checked_on to be one of .* but got 'dreams'"),
        ('    summary="A toy.",\n', "", "toy.py:5: SYSTEM missing 1 required .*'summary'"),
        ('summary="A toy."', 'summary=" "', "toy.py:5: expected summary to say something"),
        ('title="Toy"', 'titel="Toy"', "toy.py:5: SYSTEM got an unexpected keyword argument 'titel'"),
        ("arXiv:2404.02905", "arXiv:24.029", "toy.py:5: expected paper to be like"),
        ('topic="language"', 'topic="audio"', "toy.py:5: the topic 'audio' is not the folder's, 'language'"),
        ('model="Toy"', 'model="Tay"', "toy.py:5: there is no class Tay, which SYSTEM names"),
        ('    model="Toy",\n', "", "toy.py:5: a system of kind 'model' names its class"),
        ('model="Toy",', 'model="Toy", ops=("sing",),', "toy.py:5: ops names 'sing', which is no op"),
        (
            'model="Toy",',
            'model="Toy", recipe="language2",',
            "toy.py:5: recipe names 'language2', which is none of arcore.recipes; did you mean 'language'",
        ),
        ('model="Toy",', 'model="Toy", ops="ssd",', "toy.py:5: expected ops to be a tuple of names"),
        (
            'model="Toy",',
            'model="Toy", builds_on=("gone",),',
            "toy.py:5: builds_on names 'gone', which is no",
        ),
        (
            "SYSTEM = System(",
            "SYSTEM = dict(",
            r"toy.py:5: expected SYSTEM to be `System\(name=\.\.\., \.\.\.\)`",
        ),
        ("SYSTEM = System(", "THING = System(", "toy.py:1: there is no `SYSTEM"),
        ("class ToyConfig: ...", "class ToyConfig: (", "toy.py:18: "),
        ("def toy_tiny", "def tiny", r"toy.py:28: the preset 'tiny' must be named toy_\.\.\."),
        ('    """The base."""', "    return 1", "toy.py:33: the preset 'toy_b' has no docstring"),
        ("def toy_b", "def toy_tiny", "toy.py:33: the preset toy_tiny is there twice"),
        ('name="toy",', '"toy",', "toy.py:5: "),
        ("def claim", "def climb", "toy.py:5: there is no `def claim"),
    ],
)
def test_wrong_declarations(zoo: Path, old: str, new: str, message: str):
    path = zoo / "language/toy.py"
    assert old in FILE
    path.write_text(FILE.replace(old, new))
    entries, problems = read(zoo)
    problems += without_claim(entries)
    assert re.search(message, "\n".join(problems)), problems


def test_a_file_that_is_no_text_is_named(zoo: Path):
    (zoo / "language/toy.py").write_bytes(b"\xff\xfe" + FILE.encode())
    assert any("toy.py:1: the file cannot be read as Python" in line for line in read(zoo)[1])
    (zoo / "language/toy.py").write_bytes(FILE.encode() + b"\0")
    assert any("toy.py:1: " in line and "null bytes" in line for line in read(zoo)[1])


def test_names_are_taken_once(zoo: Path):
    (zoo / "audio").mkdir()
    (zoo / "audio/other.py").write_text(FILE.replace('topic="language"', 'topic="audio"'))
    _, problems = read(zoo)
    assert len(problems) == 3
    assert "toy.py:5: the name 'toy' is taken by" in problems[0]
    assert "other.py:5" in problems[0]


def test_a_preset_needs_a_system(zoo: Path):
    (zoo / "language/_common.py").write_text("@preset\ndef lost_tiny(): ...\n")
    _, problems = read(zoo)
    assert [
        line for line in problems if "_common.py:2: the preset lost_tiny stands in a file" in line
    ] == problems
    assert len(problems) == 1


def test_the_catalogue_says_all_that_is_wrong(zoo: Path, monkeypatch: pytest.MonkeyPatch):
    (zoo / "language/toy.py").write_text(FILE.replace('"real data"', '"dreams"'))
    monkeypatch.setattr("arcore.catalog.discovery.ZOO", zoo)
    catalog.cache_clear()
    try:
        with pytest.raises(
            CatalogError, match=r"declared wrongly: .*language/toy\.py:5: expected checked_on"
        ):
            catalog()
    finally:
        catalog.cache_clear()


def test_our_zoo_is_declared_well():
    entries, problems = read(ZOO)
    assert problems == []
    assert without_claim(entries) == []
    assert len(entries) >= 11
