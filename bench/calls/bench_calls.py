"""What a call costs before any work is done: `pytest bench/calls --benchmark-json=out.json`.

Inputs so small that the kernels take less than a microsecond; no gradients. One thread, process CPU time, the best of
many rounds, since everything that disturbs a call makes it longer. Beside them torch's own smallest calls in the same
run: an addition, `scaled_dot_product_attention`, `multinomial` of a softmax. The time in additions says more than
microseconds on a machine that is shared.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from arcore import masks, ops

# Microseconds, on a machine with nothing else to do.
LIMITS = {"block_sparse_attention": 8.0, "selective_scan": 8.0, "causal_conv1d": 8.0, "sample": 15.0}


def tiny_calls() -> dict[str, Callable[[], Any]]:
    q, x, two = torch.randn(1, 1, 2, 8), torch.randn(1, 8, 2), torch.randn(2)
    mask = masks.causal(2)
    decay, b, weight = -torch.rand(8, 1), torch.randn(1, 1, 2), torch.randn(8, 4)
    logits, seed, offset = torch.randn(1, 16), torch.tensor([3]), torch.tensor([1])
    state, step = torch.zeros(1, 8, 4), torch.randn(1, 8)
    return {
        "block_sparse_attention": lambda: ops.block_sparse_attention(q, q, q, mask),
        "selective_scan": lambda: ops.selective_scan(x, x, decay, b, b, delta_softplus=True),
        "causal_conv1d": lambda: ops.causal_conv1d(x, weight, activation="silu"),
        "causal_conv1d_update": lambda: ops.causal_conv1d_update(step, state, weight),
        "sample": lambda: ops.sample(logits, temperature=0.8, top_k=5, top_p=0.9, seed=seed, offset=offset),
        "torch.add": lambda: two + two,
        "torch scaled_dot_product_attention": lambda: scaled_dot_product_attention(q, q, q),
        "torch softmax and multinomial": lambda: torch.multinomial(logits.softmax(-1), 1),
    }


def microseconds(run: Callable[[], Any], calls: int = 1000, rounds: int = 15) -> float:
    times = []
    for _ in range(rounds):
        start = time.process_time()
        for _ in range(calls):
            run()
        times.append(time.process_time() - start)
    return min(times) / calls * 1e6


@pytest.mark.parametrize("name", tiny_calls())
def bench_call(benchmark: Any, name: str) -> None:
    calls = tiny_calls()
    with torch.no_grad():
        calls[name]()
        benchmark.pedantic(calls[name], rounds=3, iterations=100)
        took, addition = microseconds(calls[name]), microseconds(calls["torch.add"])
    benchmark.extra_info.update(
        {
            "op": "calls",
            "name": name,
            "microseconds": took,
            "calls": took / addition,
            "limit": LIMITS.get(name),
        }
    )


def floors_report(records: list[dict[str, Any]]) -> list[str]:
    lines = []
    for r in records:
        if r.get("op") != "calls":
            continue
        limit = r["limit"]
        verdict = (
            ""
            if limit is None
            else f"  limit {limit:.0f} us: {'yes' if r['microseconds'] <= limit else 'no'}"
        )
        lines.append(f"{r['name']:36s} {r['microseconds']:6.1f} us  {r['calls']:5.1f} additions{verdict}")
    return lines
