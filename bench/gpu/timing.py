"""How GPU benchmarks are timed: events, rotating inputs, graphs for what launches in microseconds; the ceilings.

On the CPU, for trying the benchmarks out, a clock stands in for events and plain calls for graphs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial

import torch

Run = Callable[[], object]

L2_FACTOR = 3  # rotating inputs together are this many times the L2 cache


@dataclass(frozen=True)
class Timing:
    seconds: float  # median
    low: float  # 20th percentile
    high: float  # 80th percentile
    rounds: int
    method: str  # "events", "graph" or "clock"


@dataclass(frozen=True)
class Ceilings:
    """What this machine reaches at its best, measured in the same run as what is compared with it."""

    matmul_tflops: float  # bfloat16, 8192 x 8192 x 8192, random values
    copy_gb_per_s: float  # device to device, bytes read and written
    launch_seconds: float  # one small kernel inside a graph

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def l2_bytes(device: str) -> int:
    if device != "cuda":
        return 1 << 20
    return int(torch.cuda.get_device_properties(0).L2_cache_size)


def copies_for(size: int, device: str) -> int:
    """How many input sets of `size` bytes must take turns so that none is left in the cache."""
    return max(2, min(64, -(-L2_FACTOR * l2_bytes(device) // max(size, 1))))


def _timing(times: Sequence[float], method: str) -> Timing:
    ordered = sorted(times)
    at = lambda share: ordered[min(len(ordered) - 1, int(share * len(ordered)))]  # noqa: E731
    return Timing(statistics.median(ordered), at(0.2), at(0.8), len(ordered), method)


def time_calls(
    runs: Sequence[Run], device: str, budget: float = 0.3, least: int = 5, most: int = 200
) -> Timing:
    """Median time of one call; `runs` are the same work on different inputs, taken in turn."""
    for run in runs[:2]:
        run()
    if device != "cuda":
        times = []
        for i in range(least):
            start = time.perf_counter()
            runs[i % len(runs)]()
            times.append(time.perf_counter() - start)
        return _timing(times, "clock")
    torch.cuda.synchronize()
    start = time.perf_counter()
    for run in runs[:2]:
        run()
    torch.cuda.synchronize()
    each = (time.perf_counter() - start) / len(runs[:2])
    rounds = max(least, min(most, int(budget / max(each, 1e-6))))
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)
    ]
    for i, (before, after) in enumerate(events):
        before.record()
        runs[i % len(runs)]()
        after.record()
    torch.cuda.synchronize()
    return _timing([before.elapsed_time(after) / 1e3 for before, after in events], "events")


@cache
def _capture_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


@contextmanager
def where_graphs_are_captured(device: str) -> Iterator[None]:
    """The stream of `time_graph`. A backward runs on its forward's stream, so forwards belong here too."""
    if device != "cuda":
        yield
        return
    side, outside = _capture_stream(), torch.cuda.current_stream()
    side.wait_stream(outside)
    with torch.cuda.stream(side):
        yield
    outside.wait_stream(side)


def time_graph(runs: Sequence[Run], device: str, rounds: int = 30) -> Timing:
    """Median time of one call inside a captured graph of all `runs`: no gaps between launches."""
    if device != "cuda":
        return time_calls(runs, device)
    with where_graphs_are_captured(device):
        for run in runs[:2]:
            run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=_capture_stream()):
        kept = [run() for run in runs]
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(rounds):
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        graph.replay()
        after.record()
        after.synchronize()
        times.append(before.elapsed_time(after) / 1e3 / len(runs))
    del kept
    return _timing(times, "graph")


def measure_ceilings(device: str) -> Ceilings:
    """On a GPU the sizes that fill it; elsewhere small ones."""
    gpu = device == "cuda"
    n, size, launches = (8192, 2 << 30, 1000) if gpu else (256, 1 << 22, 10)
    pairs = [[torch.randn(n, n, device=device).bfloat16() for _ in range(2)] for _ in range(2)]
    product = time_calls([lambda p=p: p[0] @ p[1] for p in pairs], device, budget=0.5, least=10)
    del pairs
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = time_calls([partial(target.copy_, source)], device, least=10)
    cell = torch.zeros(1, device=device)
    launch = time_graph([lambda: cell.add_(1.0)] * launches, device)
    return Ceilings(2 * n**3 / product.seconds / 1e12, 2 * size / copy.seconds / 1e9, launch.seconds)
