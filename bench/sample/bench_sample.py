"""Sampling against transformers' processors with torch.multinomial: one thread, CPU time, all in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from measure import cpu_seconds
from torch import Tensor

from arcore.ops import filter_probs, sample

lp = pytest.importorskip("transformers.generation.logits_process")


class Case(NamedTuple):
    rows: int
    vocab: int
    settings: dict[str, Any]
    guided: bool
    floor: float  # times the peer's CPU time


CASES = {
    "var_680x2": Case(1360, 4096, {"top_k": 900, "top_p": 0.96, "temperature": 0.9}, False, 45),
    "var_680_guided": Case(680, 4096, {"top_k": 900, "top_p": 0.96, "temperature": 0.9}, True, 45),
    "llm_8_k50_p90": Case(8, 128256, {"top_k": 50, "top_p": 0.9}, False, 120),
    "llm_8_p90": Case(8, 128256, {"top_p": 0.9}, False, 50),
    "llm_8_plain": Case(8, 128256, {}, False, 50),
}
CFG = 2.5


@cache
def inputs(name: str) -> tuple[Tensor, Tensor | None]:
    case = CASES[name]
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(case.rows, case.vocab, generator=generator)
    uncond = 3 * torch.randn(case.rows, case.vocab, generator=generator) if case.guided else None
    return logits, uncond


def ours(name: str) -> Callable[[], Tensor]:
    logits, uncond = inputs(name)
    seeds = torch.arange(len(logits))
    kw = CASES[name].settings | ({"uncond": uncond, "cfg_scale": CFG} if uncond is not None else {})
    return lambda: sample(logits, seed=seeds, **kw)


def processed(name: str) -> Tensor:
    """The logits after transformers' processors, in the order of generate()."""
    logits, uncond = inputs(name)
    s = CASES[name].settings
    if uncond is not None:
        logits = CFG * logits + (1 - CFG) * uncond
    chain = [
        make(s[setting])
        for setting, make in (
            ("temperature", lp.TemperatureLogitsWarper),
            ("top_k", lp.TopKLogitsWarper),
            ("top_p", lp.TopPLogitsWarper),
        )
        if setting in s
    ]
    for processor in chain:
        logits = processor(None, logits)
    return logits


def transformers(name: str) -> Callable[[], Tensor]:
    return lambda: processed(name).softmax(-1).multinomial(1).squeeze(-1)


IMPLEMENTATIONS = {"arcore": ours, "transformers": transformers}


def moved_bytes(name: str) -> int:
    """The least traffic: every logit once, one token per row."""
    logits, uncond = inputs(name)
    return 4 * logits.numel() * (1 if uncond is None else 2) + 8 * len(logits)


@pytest.fixture(scope="module")
def read_bandwidth() -> float:
    """Bytes per second of one thread summing 256 MiB that are in no cache."""
    x = torch.ones(64 * 2**20)
    return 4 * x.numel() / cpu_seconds(x.sum, rounds=3)


def _check(name: str) -> None:
    """Kept sets and probabilities before any time is taken."""
    logits, uncond = inputs(name)
    kw = CASES[name].settings | ({"uncond": uncond, "cfg_scale": CFG} if uncond is not None else {})
    probs = filter_probs(logits, **kw)
    expected = processed(name).softmax(-1)
    # Logits next to a nucleus' edge may fall on either side where float32 cumulative sums err.
    differ = ((probs > 0) != (expected > 0)).sum().item()
    assert differ <= len(logits) * 8, f"{differ} tokens of {len(logits)} rows differ: no number for it"
    assert (probs - expected).abs().max().item() < 1e-4


@pytest.mark.parametrize("impl", list(IMPLEMENTATIONS))
@pytest.mark.parametrize("name", list(CASES))
def bench_sample(benchmark, read_bandwidth, name, impl):
    _check(name)
    run = IMPLEMENTATIONS[impl](name)
    benchmark.group = f"sample {name}"
    benchmark._timer = time.process_time
    benchmark.pedantic(run, rounds=15 if impl == "arcore" else 3, iterations=1, warmup_rounds=1)
    seconds = statistics.median(benchmark.stats.stats.data)
    bandwidth = moved_bytes(name) / seconds
    benchmark.extra_info.update(
        op="sample", case=name, impl=impl, direction="forward", seconds=seconds,
        moved_mib=round(moved_bytes(name) / 2**20, 2), gb_per_s=round(bandwidth / 1e9, 2),
        fraction_of_bandwidth=round(bandwidth / read_bandwidth, 4),
        bandwidth_gb_per_s=round(read_bandwidth / 1e9, 2),
    )  # fmt: skip


def floors_report(records: list[dict]) -> list[str]:
    """Times, traffic, and one verdict per case that this run can judge."""
    mine = [r for r in records if r.get("op") == "sample"]
    times = {(r["case"], r["impl"]): r for r in mine}
    lines = [
        f"sample {r['case']:<16} {r['impl']:<13} {1e3 * r['seconds']:9.2f} ms  {r['moved_mib']:6.1f} MiB at least, "
        f"{r['gb_per_s']:6.2f} GB/s = {r['fraction_of_bandwidth']:6.1%} of {r['bandwidth_gb_per_s']} GB/s"
        for r in mine
    ]
    for name, case in CASES.items():
        if (name, "arcore") not in times or (name, "transformers") not in times:
            continue
        ratio = times[name, "transformers"]["seconds"] / times[name, "arcore"]["seconds"]
        verdict = "ok   " if ratio >= case.floor else "BELOW"
        lines.append(f"{verdict} sample {name}: {ratio:6.1f} x transformers, floor {case.floor:g}")
    return lines
