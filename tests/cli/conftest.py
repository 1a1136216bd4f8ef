from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest

from arcore.cli import COMMANDS, main


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def arcore(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Runs `arcore` inside this process; --help's SystemExit counts as its exit code."""
    monkeypatch.delenv("ARCORE_TRACEBACK", raising=False)
    monkeypatch.setenv("COLUMNS", "120")

    def run(*argv: object) -> Outcome:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in argv])
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture
def fails(arcore: Callable[..., Outcome]) -> Callable[..., str]:
    """Runs `arcore`, expects one error line and exit code 2, and returns the line."""

    def run(*argv: object) -> str:
        outcome = arcore(*argv)
        assert outcome.code == 2, outcome
        lines = outcome.err.splitlines()
        assert len(lines) == 1, outcome.err
        command = f"arcore {argv[0]}" if argv and argv[0] in COMMANDS else "arcore"
        assert lines[0].startswith(f"{command}: error: ")
        return lines[0]

    return run
