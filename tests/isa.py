"""Runs a script under one instruction set, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ISAS = ("default", "avx2", "avx512")


BF16_UNITS = ("none", "dot", "tiles")


def run_on_bf16_unit(unit: str, script: str) -> None:
    """`script` must succeed with the kernels of that bfloat16 unit, and print its name first."""
    if unit not in torch.ops.arcore.cpu_bf16_supported().split():
        pytest.skip(f"this CPU has no bfloat16 {unit}")
    run_with({"ARCORE_BF16": unit}, script, unit)


def run_under(isa: str, script: str) -> None:
    """`script` must succeed and print the name of the instruction set in use first."""
    if ISAS.index(isa) > ISAS.index(torch.ops.arcore.cpu_isa_supported()):
        pytest.skip(f"this CPU has no {isa}")
    run_with({"ATEN_CPU_CAPABILITY": isa}, script, isa)


def run_with(variables: dict[str, str], script: str, first: str) -> None:
    """`script` must succeed in a process with these environment variables, and print `first` first."""
    root = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, **variables}
    environment["PYTHONPATH"] = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    run = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[0] == first
