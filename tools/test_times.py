"""Measures what the quick tests of every system cost, and names those above the budget.

    python tools/test_times.py [--top N] [--budget SECONDS] [--json FILE] [pytest options ...]

Runs tests/zoo (or what the pytest options name) in this process on one thread. Counted is the process's CPU time of
set-up, test and tear-down with that of finished child processes, without imports: what a package costs to load falls
on whichever test needs it first. Processes beside it lengthen CPU time too, by a third where every core has three. A
test belongs to the system whose name its file carries; tests of the contracts and
of the claims belong to the system that they are called with. Exits with code 1 where a system is above the budget; its
claim, which `arcore check --quick` runs too, is shown beside it and does not count.
"""

from __future__ import annotations

import argparse
import builtins
import importlib
import json
import os
import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


class Imports:
    """Adds up the CPU time of imports, whichever test does them."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0

    def start(self) -> None:
        for owner, name in ((builtins, "__import__"), (importlib, "import_module")):
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, function: Any) -> Any:
        def load(*args: Any, **kwargs: Any) -> Any:
            if self._depth:
                return function(*args, **kwargs)
            self._depth, before = 1, cpu_seconds()
            try:
                return function(*args, **kwargs)
            finally:
                self._depth = 0
                self.seconds += cpu_seconds() - before

        return load


class Times:
    """A plugin of pytest: CPU seconds of every test."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.passed: set[str] = set()
        self.imports = Imports()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        before, loading = cpu_seconds(), self.imports.seconds
        try:
            return (yield)
        finally:
            self.seconds[item.nodeid] = cpu_seconds() - before - (self.imports.seconds - loading)


def owner(test: str, systems: dict[str, str]) -> tuple[str, str]:
    """The system that a test belongs to, and `"own"`, `"contract"` or `"claim"`.

    Args:
        test: pytest's name, `tests/zoo/next_scale/test_var.py::test_x[a]`.
        systems: by preset and by name.
    """
    file, _, name = test.partition("::")
    stem = Path(file).stem
    if Path(file).parent.name == "zoo":
        found = re.search(r"\[(.*)\]$", name)
        word = found[1] if found else ""
        for part in (word, *word.split("-")):
            if part in systems:
                return systems[part], "claim" if stem == "test_claims" else "contract"
        return stem, "contract"
    own = stem.removeprefix("test_")
    while own not in systems and "_" in own:
        own = own.rpartition("_")[0]
    return systems.get(own, stem), "own"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--top", type=int, default=15, help="rows of the table (default: 15)")
    parser.add_argument("--budget", type=float, default=5.0, help="seconds of a system (default: 5)")
    parser.add_argument("--tests", type=int, default=3, help="tests shown of a system above it (default: 3)")
    parser.add_argument("--json", type=Path, help="write the seconds of every test to this file")
    options, rest = parser.parse_known_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.chdir(ROOT)
    times = Times()
    times.imports.start()
    code = pytest.main(["-q", "-p", "no:cacheprovider", *(rest or ["tests/zoo"])], plugins=[times])

    from arcore.catalog import catalog, find, list_models

    systems = {name: find(name).entry.system.name for name in list_models()} | {n: n for n in catalog()}
    systems |= {entry.place.module.split(".")[3]: name for name, entry in catalog().items()}
    table: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    tests: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for test, seconds in times.seconds.items():
        system, kind = owner(test, systems)
        table[system][kind] += seconds
        if kind != "claim":
            tests[system].append((seconds, test))
    rows = sorted(table, key=lambda name: -(table[name]["own"] + table[name]["contract"]))
    print(f"\n{'system':28}{'own':>8}{'contract':>10}{'together':>10}{'claim':>8}  CPU seconds")
    above = 0
    for place, name in enumerate(rows):
        row = table[name]
        together = row["own"] + row["contract"]
        above += together > options.budget
        if place < options.top or together > options.budget:
            print(f"{name:28}{row['own']:8.1f}{row['contract']:10.1f}{together:10.1f}{row['claim']:8.1f}")
        if together > options.budget:
            for seconds, test in sorted(tests[name], reverse=True)[: options.tests]:
                print(f"    {seconds:6.1f}  {test}")
    print(f"{len(rows)} systems, {above} above {options.budget:g} s; imports {times.imports.seconds:.0f} s")
    if options.json:
        options.json.write_text(json.dumps(times.seconds, indent=1) + "\n", encoding="utf-8")
    return int(code) or int(above > 0)


if __name__ == "__main__":
    sys.exit(main())
