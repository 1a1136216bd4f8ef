"""The checks that a GPU has to pass (tests/<op>/gpu_cases.py), in small, with the sm_80 kernels run on the CPU.

What only a GPU has, such as graphs and waiting for the device, is not checked here.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from tests.cuda_host.build import ROOT, installed, unavailable

reason = unavailable()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(reason is not None, reason=reason or "")]

OPS = sorted(path.parent.name for path in ROOT.glob("tests/*/gpu_cases.py"))
# What a GPU does in PyTorch or by another op, and a CPU by kernels that have no counterpart among those run here.
NO_KERNELS = ("check_trees_and_biases", "check_cross_entropy", "check_many_gradients")


@pytest.fixture
def cuda_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules that look at the device to know a result's shape are told that of the kernels that run."""
    scan = importlib.import_module("arcore.ops.selective_scan")
    monkeypatch.setattr(scan, "CHUNK", scan.CUDA_CHUNK)


def checks() -> list[Any]:
    return [
        pytest.param(op, check, id=f"{op}-{check.__name__.removeprefix('check_')}")
        for op in OPS
        for check in importlib.import_module(f"tests.{op}.gpu_cases").CHECKS
        if check.__name__ not in NO_KERNELS
    ]


@pytest.mark.parametrize(("op", "check"), checks())
def test_check(op: str, check: Any, cuda_shapes: None) -> None:
    with installed(op) as host:
        torch.manual_seed(0)
        check("cpu", True)
        assert host.statistics()["blocks"] > 0 or check.__name__ == "check_constants"
