"""`arcore env`: every line true, and what is missing said with the command that mends it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import arcore
from arcore import _C, env


def test_report_names_versions_isa_and_threads():
    text = env.report()
    for part in (arcore.__version__, torch.__version__, torch.ops.arcore.cpu_isa(), sys.executable):
        assert part in text
    assert str(torch.get_num_threads()) in text
    assert f"{torch.ops.arcore.cpu_bf16()} in use; this CPU has" in text
    assert _C.build_info()["compiler"] in text


def test_report_says_how_to_get_what_is_missing(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else real(name))
    wanted = 'missing  scikit-learn: `pip install scikit-learn`, or in arcore\'s source folder `pip install ".[train]"`'
    assert wanted in env.report()


@pytest.mark.parametrize("built", ["", "8.0+PTX 9.0a"])
@pytest.mark.parametrize("torch_cuda", [None, "13.0"])
def test_cuda_lines(monkeypatch, built, torch_cuda):
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    lines, missing = env._cuda_lines(built)
    if built:
        built = "built for 8.0+PTX 9.0a; no result of a GPU is committed yet"
        assert lines == [("CUDA kernels", built), ("GPU", "none visible to torch")]
        assert not missing
    else:
        assert lines == [("CUDA kernels", "not built")]
        assert ("CPU build" if torch_cuda is None else "ARCORE_CUDA=on") in missing[0]


def _import_from(folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(
        [sys.executable, "-c", "import arcore"], env=environment, capture_output=True, text=True, timeout=120
    )


def test_import_without_the_extension_is_one_clear_sentence(tmp_path):
    source = Path(arcore.__file__).parent
    shutil.copytree(source, tmp_path / "arcore", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    result = _import_from(tmp_path)
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1
    assert "ImportError: arcore's compiled extension is missing" in last
    assert "build it with `pip install .`" in last


def test_import_with_a_damaged_extension_is_one_clear_sentence(tmp_path):
    source = Path(arcore.__file__).parent
    shutil.copytree(source, tmp_path / "arcore", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "arcore" / "_ops.so").write_bytes(b"not a library")
    result = _import_from(tmp_path)
    last = result.stderr.strip().splitlines()[-1]
    assert "ImportError: arcore's compiled extension does not load with torch" in last
    assert "build it with `pip install .`" in last


def test_an_extension_older_than_the_sources_is_one_clear_sentence():
    """As after an update that was not built: the compiled part lacks an op that Python's part asks for."""
    program = (
        "import torch\n"
        "space = type(torch.ops.arcore)\n"
        "found = space.__getattr__\n"
        "def lacking(self, name):\n"
        "    if self.name == 'arcore' and name == 'decoder_step':\n"
        "        raise AttributeError(f\"'_OpNamespace' 'arcore' object has no attribute '{name}'\")\n"
        "    return found(self, name)\n"
        "space.__getattr__ = lacking\n"
        "from arcore.recipes import recipe_for\n"
    )
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=120
    )
    last = result.stderr.strip().splitlines()[-1]
    assert "is older than arcore's Python files" in last, result.stderr
    assert "`make build`" in last
