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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    records = [b.extra_info for b in session.benchmarks if "gflops" in b.extra_info] if session else []
    if not records:
        return
    write = terminalreporter.write_line
    terminalreporter.section("GFLOP/s of allowed pairs, one thread, CPU time")
    write(f"{cpu_model()}, {torch.ops.arcore.cpu_isa()}, torch {torch.__version__}")
    write(f"measured FMA peak of one core: {records[0]['peak_gflops']} GFLOP/s")
    for r in records:
        name = f"{r['case']} {r['direction']} {r['dtype']}"
        write(
            f"{name:<44} {r['impl']:<14} {r['gflops']:7.1f}  {r['fraction_of_peak']:6.1%} of peak"
            f"  +{r['peak_extra_mib']:.1f} MiB (q, k, v, out: {r['qkvo_mib']} MiB)"
        )
    for module in {
        item.module for item in terminalreporter._session.items if hasattr(item.module, "floors_report")
    }:
        for line in module.floors_report(records):
            write(line)


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
