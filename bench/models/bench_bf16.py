"""Whole models in bfloat16 beside the same in float32: `pytest bench/models/bench_bf16.py`.

Random weights at the published sizes. Mamba-130m and Mamba-2-130m read 1024 tokens, the first also writes single ones;
SmolLM2-135M's shapes read 512 and write single tokens of one and of eight texts behind 16 others; ACDiT's training step
of bench_acdit.py runs under autocast. Each line says where the time goes, by the profiler: products of matrices, the
package's scans, convolutions and attention, all else. Products alone are what the weights' bytes and torch allow. One
thread, process CPU time, both types in turns.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import bench_acdit
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import arcore

CASES = {
    "mamba_130m prefill 1024": 1.8,
    "mamba_130m decode": 1.8,
    "mamba2_130m prefill 1024": 1.8,
    "smollm2_135m prefill 512": 1.8,
    "smollm2_135m decode": 1.8,
    "smollm2_135m decode of 8": 1.8,
    "acdit_b training step": 1.8,
}
TYPES = (torch.float32, torch.bfloat16)
PRODUCTS = (
    "mm",
    "addmm",
    "bmm",
    "linear_step",
    "_linear_pointwise",
    "mkldnn",
    "decoder_step",
    "mamba_step",
    "linear",
)
STEPS = 8


@cache
def model(name: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    return arcore.create_model(name).eval().requires_grad_(False).to(dtype)


def runner(case: str, dtype: torch.dtype) -> tuple[Callable[[], Any], int]:
    """What to time, and how many steps of it one call takes."""
    if case.startswith("acdit"):
        network = bench_acdit.model()

        def step() -> Any:
            if dtype == torch.float32:
                return bench_acdit.step(network)
            # As `arcore train --precision bf16-mixed`.
            with torch.autocast("cpu", torch.bfloat16), arcore.half_matmul():
                return bench_acdit.step(network)

        return step, 1
    name, kind, *rest = case.split()
    network = model(name, dtype)
    rows, length = int(rest[1]) if rest[:1] == ["of"] else 1, int(rest[0]) if kind == "prefill" else 16
    ids = torch.randint(40000, (rows, length), generator=torch.Generator().manual_seed(1))
    room = () if name.startswith("mamba") else (1024,)

    def read() -> Any:
        cache = network.make_cache(rows, *room)
        return network.prefill(ids, cache), cache

    if kind == "prefill":
        return read, 1
    _, cache = read()
    token = ids[:, -1]

    def write() -> None:
        for _ in range(STEPS):
            network.step(token, cache)

    return write, STEPS


def shares(run: Callable[[], Any]) -> dict[str, float]:
    """Where the time goes: parts of the whole."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run()
    parts = {"products": 0.0, "scans, convolutions, attention": 0.0, "all else": 0.0}
    for event in seen.key_averages():
        space, _, op = event.key.partition("::")
        own = event.self_cpu_time_total
        if op in PRODUCTS:
            parts["products"] += own
        elif space == "arcore":
            parts["scans, convolutions, attention"] += own
        else:
            parts["all else"] += own
    whole = sum(parts.values())
    return {name: round(part / whole, 3) for name, part in parts.items()}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def bench_bf16(benchmark: Any, case: str) -> None:
    trains = case.startswith("acdit")
    with contextlib.nullcontext() if trains else torch.inference_mode():
        runs = {dtype: runner(case, dtype) for dtype in TYPES}
        times: dict[torch.dtype, list[float]] = {dtype: [] for dtype in TYPES}
        for turn in range(4):
            for dtype, (run, steps) in runs.items():
                start = time.process_time()
                run()
                if turn:
                    times[dtype].append((time.process_time() - start) / steps)
        where = {dtype: shares(run) for dtype, (run, _) in runs.items()}
        benchmark.pedantic(lambda: None, rounds=1)
    seconds = {dtype: statistics.median(found) for dtype, found in times.items()}
    benchmark.extra_info.update(
        op="bf16", case=case, impl="arcore", direction="forward+backward" if trains else "forward",
        seconds=seconds[torch.bfloat16], float32_seconds=seconds[torch.float32],
        where={str(dtype).removeprefix("torch."): parts for dtype, parts in where.items()},
        unit=torch.ops.arcore.cpu_bf16(),
    )  # fmt: skip


def floors_report(records: list[dict[str, Any]]) -> list[str]:
    lines = []
    for r in records:
        if r.get("op") != "bf16":
            continue
        ratio, least = r["float32_seconds"] / r["seconds"], CASES[r["case"]]
        where = "; ".join(
            f"{name}: " + ", ".join(f"{part} {share:.0%}" for part, share in parts.items())
            for name, parts in r["where"].items()
        )
        lines.append(
            f"{'ok   ' if ratio >= least else 'BELOW'} {r['case']:<26} float32 {r['float32_seconds'] * 1e3:8.1f} ms, "
            f"bfloat16 {r['seconds'] * 1e3:8.1f} ms, {ratio:.2f} x (floor {least}); {where}"
        )
    return lines
