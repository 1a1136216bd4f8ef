"""One thread, process CPU time, every peer in the same run; a summary with fractions and floors at the end."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from measure import cpu_model, fma_peak_gflops

import arcore  # noqa: F401  (loads torch.ops.arcore)


def pytest_configure(config: pytest.Config) -> None:
    # Machines are shared: one thread, and CPU time instead of wall time.
    torch.set_num_threads(1)
    config.addinivalue_line("markers", "floor: a benchmark with a required ratio to a peer")


@pytest.fixture(scope="session")
def peak_gflops() -> float:
    return fma_peak_gflops()


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info["node"] = "redacted"
    machine_info["cpu_model"] = cpu_model()
    machine_info["torch"] = torch.__version__
    machine_info["isa"] = torch.ops.arcore.cpu_isa()
    machine_info["fma_peak_gflops"] = fma_peak_gflops()
    machine_info["threads"] = torch.get_num_threads()
