"""Returns and advantages as one linear scan, beside Python loops over steps: `pytest bench/models/bench_returns.py`.

`loop`: the recurrence step by step, tensor operations for all rows at once. `loop over numbers`: the same on Python's
own numbers, row by row, lists and back; it has no floor. `scan` is the recurrence alone. A short batch is mostly what
a call costs, so the floor is that of the long ones. All results are compared before they are timed. One thread, process
CPU time, the implementations take turns.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from measure import interleaved_seconds
from torch import Tensor

from arcore.objectives import discounted_returns, gae
from arcore.ops import linear_scan

DISCOUNT, SMOOTHING = 0.99, 0.95
# Rows and steps: a batch of responses, a long episode, and the steps of many rooms.
CASES = {"16 x 512": (16, 512), "1 x 8192": (1, 8192), "8 x 4096": (8, 4096)}
# Times that arcore must be faster than the loop over tensors in the same run, from so many steps on.
FLOOR, LONG = 50.0, 4096


def inputs(case: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = CASES[case]
    done = torch.rand(shape, generator=generator) < 0.01
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator), done


def scan_by_loop(a: Tensor, b: Tensor) -> Tensor:
    found = torch.empty_like(b)
    after = torch.zeros(len(b))
    for t in range(b.shape[1] - 1, -1, -1):
        after = a[:, t] * after + b[:, t]
        found[:, t] = after
    return found


def scan_by_numbers(a: Tensor, b: Tensor) -> Tensor:
    rows = []
    for factors, added in zip(a.tolist(), b.tolist(), strict=True):
        found, after = [0.0] * len(added), 0.0
        for t in range(len(added) - 1, -1, -1):
            after = factors[t] * after + added[t]
            found[t] = after
        rows.append(found)
    return torch.tensor(rows)


def returns_by_loop(rewards: Tensor, done: Tensor) -> Tensor:
    found = torch.empty_like(rewards)
    after = torch.zeros(len(rewards))
    for t in range(rewards.shape[1] - 1, -1, -1):
        after = rewards[:, t] + DISCOUNT * (~done[:, t]) * after
        found[:, t] = after
    return found


def returns_by_numbers(rewards: Tensor, done: Tensor) -> Tensor:
    rows = []
    for row, ends in zip(rewards.tolist(), done.tolist(), strict=True):
        found, after = [0.0] * len(row), 0.0
        for t in range(len(row) - 1, -1, -1):
            after = row[t] + (0.0 if ends[t] else DISCOUNT * after)
            found[t] = after
        rows.append(found)
    return torch.tensor(rows)


def gae_by_loop(rewards: Tensor, values: Tensor, done: Tensor) -> Tensor:
    found = torch.empty_like(rewards)
    following = after = torch.zeros(len(rewards))
    for t in range(rewards.shape[1] - 1, -1, -1):
        go_on = ~done[:, t]
        delta = rewards[:, t] + DISCOUNT * go_on * following - values[:, t]
        after = delta + DISCOUNT * SMOOTHING * go_on * after
        found[:, t], following = after, values[:, t]
    return found


def gae_by_numbers(rewards: Tensor, values: Tensor, done: Tensor) -> Tensor:
    rows = []
    for row, worth, ends in zip(rewards.tolist(), values.tolist(), done.tolist(), strict=True):
        found, after, following = [0.0] * len(row), 0.0, 0.0
        for t in range(len(row) - 1, -1, -1):
            go_on = 0.0 if ends[t] else DISCOUNT
            after = row[t] + go_on * following - worth[t] + go_on * SMOOTHING * after
            found[t], following = after, worth[t]
        rows.append(found)
    return torch.tensor(rows)


@pytest.mark.parametrize("what", ["scan", "returns", "gae"])
@pytest.mark.parametrize("case", CASES)
def bench_returns(benchmark: Any, case: str, what: str) -> None:
    rewards, values, done = inputs(case)
    if what == "scan":
        factors = DISCOUNT * (~done).float()
        runs: dict[str, Any] = {
            "arcore": lambda: linear_scan(factors, rewards, reverse=True),
            "loop": lambda: scan_by_loop(factors, rewards),
            "loop over numbers": lambda: scan_by_numbers(factors, rewards),
        }
    elif what == "returns":
        runs = {
            "arcore": lambda: discounted_returns(rewards, discount=DISCOUNT, done=done),
            "loop": lambda: returns_by_loop(rewards, done),
            "loop over numbers": lambda: returns_by_numbers(rewards, done),
        }
    else:
        runs = {
            "arcore": lambda: (
                gae(rewards, values, discount=DISCOUNT, smoothing=SMOOTHING, done=done).advantages
            ),
            "loop": lambda: gae_by_loop(rewards, values, done),
            "loop over numbers": lambda: gae_by_numbers(rewards, values, done),
        }
    for run in runs.values():
        torch.testing.assert_close(run(), runs["arcore"](), rtol=1e-4, atol=1e-4)
    found = interleaved_seconds(runs)
    benchmark.extra_info.update(
        op="returns", case=f"{what} {case}", impl="arcore", direction="forward", seconds=found["arcore"],
        steps=CASES[case][1], peers={name: seconds for name, seconds in found.items() if name != "arcore"},
    )  # fmt: skip
    benchmark.pedantic(runs["arcore"], rounds=1)


def floors_report(records: list[dict[str, Any]]) -> list[str]:
    """Milliseconds, ratios and floors."""
    lines = []
    for record in records:
        if record.get("op") != "returns":
            continue
        told = ", ".join(f"{name} {s / record['seconds']:.0f}x" for name, s in record["peers"].items())
        lines.append(f"{record['case']:20} {record['seconds'] * 1e3:8.3f} ms   {told}")
        ratio = record["peers"]["loop"] / record["seconds"]
        if record["steps"] >= LONG and ratio < FLOOR:
            lines.append(f"floor {record['case']} vs loop: {ratio:.1f} (>= {FLOOR}) BELOW")
    return lines
