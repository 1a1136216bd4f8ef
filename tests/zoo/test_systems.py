"""What holds for every system, whatever its kind: a test file of its own, and true words about itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from arcore.catalog import catalog, list_systems

from .conftest import stem

HERE = Path(__file__).resolve().parent


@pytest.mark.parametrize("name", list_systems())
def test_a_system_has_its_test_file(name: str):
    assert (HERE / catalog()[name].system.topic / f"test_{stem(name)}.py").is_file()


def test_test_files_belong_to_systems():
    expected = {(entry.system.topic, f"test_{stem(name)}.py") for name, entry in catalog().items()}
    found = {(path.parent.name, path.name) for path in HERE.glob("*/test_*.py")}
    stray = {
        (topic, file)
        for topic, file in found - expected
        if not any(topic == t and file.startswith(f"{own.removesuffix('.py')}_") for t, own in expected)
    }
    assert stray == set()


@pytest.mark.parametrize("name", list_systems())
def test_a_system_says_what_it_is(name: str):
    entry = catalog()[name]
    number = entry.system.paper.rpartition(":")[2]
    assert number in entry.doc or entry.system.paper.startswith(("doi", "http"))
    assert len(entry.doc.splitlines()) >= 3
    assert entry.system.builds_on == tuple(dict.fromkeys(entry.system.builds_on))
