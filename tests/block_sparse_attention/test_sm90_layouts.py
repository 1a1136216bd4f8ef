"""Register and shared-memory coordinates of the sm_90a kernel against CuTe's own layout algebra."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import cutlass
import pytest

from tests.cuda_host.build import cuda_include

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ was not found"),
    pytest.mark.skipif(cuda_include() is None, reason="the CUDA toolkit's headers were not found"),
    pytest.mark.skipif(cutlass.include_folder() is None, reason=cutlass.ABSENT),
]


def test_cute_agrees(tmp_path: Path) -> None:
    toolkit = cuda_include()
    includes = [cutlass.include_folder(), toolkit, Path(str(toolkit)) / "cccl"]
    command = ["g++", "-std=c++20", "-O1", f"-I{ROOT / 'csrc'}"]
    for include in includes:
        command += ["-isystem", str(include)]
    source = Path(__file__).with_name("sm90_layouts.cpp")
    subprocess.run([*command, str(source), "-o", str(tmp_path / "layouts")], check=True)
    result = subprocess.run([str(tmp_path / "layouts")], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    assert result.stdout.endswith("0 errors\n")
