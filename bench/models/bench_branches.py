"""Sixteen branches of one prompt, packed behind it or in rows of their own: attention and head, forward and backward.

A training step's shape, P = 2048, G = 16, L = 512, at a quarter of each length; one thread, float32. The head is
`linear_logprobs` over every token of the rows, as in trainers that do not pack. `score` computes it for response tokens
alone, which both ways have as many of; that is the case "attention".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from measure import cpu_seconds

from arcore.masks import causal
from arcore.nn import pack_branches
from arcore.ops import block_sparse_attention, linear_logprobs

PROMPT, BRANCHES, LENGTH = 512, 16, 128
HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 9, 3, 64, 8192
# (case, how many times faster than separate rows the packed ones must be in the same run).
FLOORS = {"attention+head": 2.5}
TOKENS = {"packed": PROMPT + BRANCHES * LENGTH, "separate": BRANCHES * (PROMPT + LENGTH)}


def floors_report(records: list[dict[str, Any]]) -> list[str]:
    found = {(r["case"], r["impl"]): r["seconds"] for r in records if r.get("op") == "branches"}
    lines = [
        f"tokens: {TOKENS['separate']} in separate rows, {TOKENS['packed']} packed, "
        f"{TOKENS['separate'] / TOKENS['packed']:.2f} x"
    ]
    for case in ("attention", "attention+head"):
        if (case, "packed") in found and (case, "separate") in found:
            ours, theirs = found[case, "packed"], found[case, "separate"]
            word = ("ok" if theirs >= FLOORS[case] * ours else "BELOW") if case in FLOORS else ""
            lines.append(
                f"{word:<6}{case}: {ours * 1e3:.0f} ms packed, {theirs * 1e3:.0f} ms separate, {theirs / ours:.2f} x"
            )
    return lines


def step(impl: str, head: bool) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(0)
    rows, length = (1, TOKENS["packed"]) if impl == "packed" else (BRANCHES, PROMPT + LENGTH)
    if impl == "packed":
        whole = torch.full((BRANCHES,), PROMPT + LENGTH)
        tokens = torch.zeros(BRANCHES, PROMPT + LENGTH, dtype=torch.int64)
        mask = pack_branches(tokens, whole, whole - LENGTH, torch.zeros_like(whole)).mask
    else:
        mask = causal(length)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    q = random(rows, HEADS, length, HEAD_DIM)
    k, v = (random(rows, KV_HEADS, length, HEAD_DIM) for _ in range(2))
    weight = random(VOCABULARY, HEADS * HEAD_DIM)
    target = torch.randint(VOCABULARY, (rows, length), generator=generator)

    def run() -> None:
        out = block_sparse_attention(q, k, v, mask)
        if head:
            hidden = out.transpose(1, 2).reshape(rows, length, -1)
            loss = linear_logprobs(hidden, weight, target).logp.sum()
        else:
            loss = out.sum()
        torch.autograd.grad(loss, (q, k, v, weight) if head else (q, k, v))

    return run


@pytest.mark.parametrize("impl", ["packed", "separate"])
@pytest.mark.parametrize("case", ["attention", "attention+head"])
def bench_branches(benchmark, case: str, impl: str):
    run = step(impl, case == "attention+head")
    seconds = cpu_seconds(run, rounds=3)
    benchmark.extra_info.update(
        op="branches",
        case=case,
        impl=impl,
        direction="forward+backward",
        seconds=seconds,
        tokens=TOKENS[impl],
    )
    benchmark.pedantic(run, rounds=1)
