"""`make bench` begins: every benchmark is found and imports what it needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("target", ["bench", "bench/models/bench_bf16.py"])
def test_benchmarks_are_collected(target: str) -> None:
    """All at once as `make bench` does, and one file alone that takes a part from another."""
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", target]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    files = {line.split("::")[0] for line in done.stdout.splitlines() if "::" in line}
    wanted = {str(p.relative_to(ROOT)) for p in ROOT.glob("bench/**/bench_*.py")}
    assert files == (wanted if target == "bench" else {target})
