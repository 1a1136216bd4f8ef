"""Shared by the benchmarks: CPU time, the machine's ceiling, peak memory."""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def cpu_seconds(run: Callable[[], object], rounds: int = 5, warm_up: bool = True) -> float:
    """Median process CPU time of `run` after one warm-up call."""
    if warm_up:
        run()
    times = []
    for _ in range(rounds):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return statistics.median(times)


def fma_peak_gflops() -> float:
    """GFLOP/s of register-to-register fused multiply-adds on one core, in the instruction set in use; best of five."""
    iterations, best = 4_000_000, 0.0
    for _ in range(5):
        start = time.process_time()
        flops = torch.ops.arcore.run_fma(iterations)
        best = max(best, flops / (time.process_time() - start) / 1e9)
    return best


def exp_seconds() -> float:
    """Seconds per exponential on one core, in the kernels' own vector code; best of five."""
    best = float("inf")
    for _ in range(5):
        start = time.process_time()
        count = torch.ops.arcore.run_exp(4_000_000)
        best = min(best, (time.process_time() - start) / count)
    return best


def peak_extra_bytes(run: Callable[[], object]) -> int:
    """How far `run` raises the resident memory of this process at its highest, result included (Linux, glibc)."""
    run()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(
        0
    )  # give back what earlier calls freed, else it would be reused unseen
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status_kib("VmRSS")
    result = run()
    peak = _status_kib("VmHWM")
    del result
    return max(0, peak - before) * 1024


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return os.uname().machine


def interleaved_seconds(runs: dict[str, Callable[[], object]], rounds: int = 5) -> dict[str, float]:
    """Median process CPU time of each of several runs that take turns, so that a machine's moods reach all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for turn in range(rounds):
        for name in list(runs) if turn % 2 == 0 else list(runs)[::-1]:
            start = time.process_time()
            runs[name]()
            times[name].append(time.process_time() - start)
    return {name: statistics.median(found) for name, found in times.items()}
