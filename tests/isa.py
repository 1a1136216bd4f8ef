"""Runs a script under one instruction set, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ISAS = ("default", "avx2", "avx512")


def run_under(isa: str, script: str) -> None:
    """`script` must succeed and print the name of the instruction set in use first."""
    if ISAS.index(isa) > ISAS.index(torch.ops.arcore.cpu_isa_supported()):
        pytest.skip(f"this CPU has no {isa}")
    root = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": isa}
    environment["PYTHONPATH"] = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    run = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[0] == isa
