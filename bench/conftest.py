"""One thread, process CPU time, every peer in the same run; a summary with fractions and floors at the end."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

# What benchmarks share: measure.py, and parts of other models' benchmarks.
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "models"))

from measure import cpu_model, fma_peak_gflops

import arcore  # noqa: F401  (loads torch.ops.arcore)


def pytest_configure(config: pytest.Config) -> None:
    # Machines are shared: one thread, and CPU time instead of wall time.
    torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """What each bench module makes of the figures: its `floors_report(records)`, lines of text."""
    session = getattr(config, "_benchmarksession", None)
    records = [b.extra_info for b in session.benchmarks if b.extra_info] if session else []
    items = terminalreporter._session.items if records else []
    modules = {m.__name__: m for m in (item.module for item in items) if hasattr(m, "floors_report")}
    for name, module in modules.items():
        terminalreporter.section(f"{name.rpartition('.')[2]}: one thread, CPU time")
        terminalreporter.write_line(f"{cpu_model()}, {torch.ops.arcore.cpu_isa()}, torch {torch.__version__}")
        for line in module.floors_report(records):
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def peak_gflops() -> float:
    return fma_peak_gflops()


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    # Figures are public; whose machine they come from is not.
    machine_info["node"] = ""
    machine_info["release"] = ""
    machine_info["cpu_model"] = cpu_model()
    machine_info["torch"] = torch.__version__
    machine_info["isa"] = torch.ops.arcore.cpu_isa()
    machine_info["fma_peak_gflops"] = fma_peak_gflops()
    machine_info["threads"] = torch.get_num_threads()
