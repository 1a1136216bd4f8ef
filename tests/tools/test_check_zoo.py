from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).resolve().parents[2] / "tools/check_zoo.py"


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = (
        f"import runpy, sys; sys.modules['torch'] = None; runpy.run_path({str(TOOL)!r}, run_name='__main__')"
    )
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)


def test_our_zoo_is_declared_well_and_needs_no_torch() -> None:
    run = check()
    assert run.returncode == 0, run.stderr
    assert "systems, 0 problems" in run.stdout


def test_wrong_declarations_name_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "language").mkdir()
    (tmp_path / "language/bad.py").write_text("import os\n\nSYSTEM = System(name='bad')\n")
    (tmp_path / "language/_shared.py").write_text("@preset\ndef bad_tiny(): ...\n")
    run = check(str(tmp_path))
    assert run.returncode == 1
    assert "language/bad.py:3: SYSTEM missing 7 required" in run.stderr
    assert "language/_shared.py:2: the preset bad_tiny stands in a file that is no system" in run.stderr
    assert check(str(tmp_path / "gone")).returncode == 2
