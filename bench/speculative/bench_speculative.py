"""Speculative verification beside plain torch loops on CPU: `pytest bench/speculative --benchmark-json=out.json`.

A batch of 64 rows over 16384 tokens, one thread, process CPU time. The peers are what decoders run today: a Python loop
over rows and positions whose steps are torch calls over the vocabulary, with `torch.multinomial` for draws
("loop"), and the same loop with one uniform number, a cumulative sum and a binary search per draw ("loop_cdf"), which
no released code has. Both get the probabilities of the proposals from one gather for the whole batch. Before it is
timed, an op is compared with its reference on eight rows, and a loop with the op's mean number of accepted tokens.

The floor of an op is reading once the rows that its result depends on: bytes and the share of the read bandwidth that
was measured in the same run are printed.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from measure import cpu_seconds
from torch import Tensor

from arcore import ops

BATCH, VOCAB, NEIGHBOURS = 64, 16384, 1000
CHAIN = (-1, 0, 1, 2, 3)
TREE = (-1, -1, -1, -1, 0, 0, 0, 1, 1, 2, 4, 4, 4, 7, 10, 10)

Draw = Callable[[Tensor], int]


@dataclass(frozen=True)
class Drafts:
    target: Tensor
    draft: Tensor
    tokens: Tensor
    parents: tuple[int, ...]

    @property
    def children(self) -> dict[int, list[int]]:
        return {n: [i for i, p in enumerate(self.parents) if p == n] for n in range(-1, len(self.parents))}

    def head(self, rows: int) -> Drafts:
        return Drafts(self.target[:rows], self.draft[:rows], self.tokens[:rows], self.parents)


@cache
def drafts(parents: tuple[int, ...], chosen: bool, dtype: torch.dtype = torch.float32) -> Drafts:
    """Target rows of some 20 likely tokens; drafts drawn from a disturbed copy, or the target's likeliest tokens."""
    nodes = len(parents)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(BATCH, nodes + 1, VOCAB, generator=generator) * 3.5
    target = logits.softmax(-1)
    noise = torch.randn(BATCH, nodes, VOCAB, generator=generator)
    draft = (logits[:, :nodes] + 0.8 * noise).softmax(-1)
    tokens = torch.zeros(BATCH, nodes, dtype=torch.int64)
    for i, parent in enumerate(parents):
        weights = (target if chosen else draft)[:, parent + 1].clone()
        for j in range(i):
            if parents[j] == parent:
                weights.scatter_(1, tokens[:, j : j + 1], 0.0)
        drawn = weights.argmax(1) if chosen else torch.multinomial(weights, 1, generator=generator)[:, 0]
        tokens[:, i] = drawn
    return Drafts(target.to(dtype), draft.to(dtype), tokens, parents)


@cache
def neighbours() -> Tensor:
    codebook = torch.randn(VOCAB, 8, generator=torch.Generator().manual_seed(1))
    return ops.codebook_neighbours(codebook, NEIGHBOURS)


def multinomial(weights: Tensor) -> int:
    return int(torch.multinomial(weights, 1))


def by_cumulative_sum(weights: Tensor) -> int:
    cumulative = weights.cumsum(0)
    return int(torch.searchsorted(cumulative, random.random() * float(cumulative[-1]), right=True))


def of_proposals(rows: Tensor, d: Drafts) -> list[list[float]]:
    """The probability of every proposal in its parent's row."""
    parent = torch.tensor(d.parents) + 1
    return rows[:, parent].gather(2, d.tokens.unsqueeze(2)).squeeze(2).tolist()


def loop_chain(d: Drafts, draw: Draw) -> float:
    p, q, accepted, nodes = of_proposals(d.target, d), of_proposals(d.draft, d), 0, len(d.parents)
    for b in range(BATCH):
        for i in range(nodes):
            if random.random() * q[b][i] < p[b][i]:
                accepted += 1
                continue
            residual = (d.target[b, i] - d.draft[b, i]).clamp_(min=0)
            draw(residual / residual.sum())
            break
        else:
            draw(d.target[b, nodes])
    return accepted / BATCH


def loop_jacobi(d: Drafts, draw: Draw) -> float:
    p, q, accepted, nodes = of_proposals(d.target, d), of_proposals(d.draft, d), 0, len(d.parents)
    for b in range(BATCH):
        row = nodes
        for i in range(nodes):
            if random.random() * q[b][i] < p[b][i]:
                accepted += 1
                continue
            residual = (d.target[b, i] - d.draft[b, i]).clamp_(min=0)
            draw(residual / residual.sum())
            row = i + 1
            break
        for fresh in range(row, nodes + 1):
            draw(d.target[b, fresh])
    return accepted / BATCH


def loop_block(d: Drafts, draw: Draw) -> float:
    p, q, accepted, nodes = of_proposals(d.target, d), of_proposals(d.draft, d), 0, len(d.parents)
    for b in range(BATCH):
        weights = [1.0]
        for i in range(nodes):
            weights.append(min(1.0, weights[-1] * p[b][i] / q[b][i]))
        stand = 0
        for i in range(1, nodes + 1):
            h = weights[i]
            if i < nodes:
                beyond = float((weights[i] * d.target[b, i] - d.draft[b, i]).clamp_(min=0).sum())
                h = beyond / (beyond + 1.0 - weights[i])
            if random.random() < h:
                stand = i
        accepted += stand
        if stand == nodes:
            draw(d.target[b, nodes])
        else:
            residual = (weights[stand] * d.target[b, stand] - d.draft[b, stand]).clamp_(min=0)
            draw(residual / residual.sum())
    return accepted / BATCH


def loop_tree_drawn(d: Drafts, draw: Draw) -> float:
    tokens, children, accepted = d.tokens.tolist(), d.children, 0
    for b in range(BATCH):
        node, changed = -1, False
        while children[node]:
            p, q, changed = d.target[b, node + 1], d.draft[b, node + 1], False
            for child in children[node]:
                token = tokens[b][child]
                if random.random() * float(q[token]) < float(p[token]):
                    node, accepted = child, accepted + 1
                    break
                p = (p - q).clamp_(min=0)
                p /= p.sum()
                q = q.clone()
                q[token] = 0
                q /= q.sum()
                changed = True
            else:
                break
            changed = False
        draw(p if changed else d.target[b, node + 1])
    return accepted / BATCH


def loop_tree_chosen(d: Drafts, draw: Draw) -> float:
    tokens, children, accepted = d.tokens.tolist(), d.children, 0
    for b in range(BATCH):
        node = -1
        p = d.target[b, 0]
        while children[node]:
            for child in children[node]:
                token = tokens[b][child]
                if random.random() < float(p[token]):
                    node, accepted, p = child, accepted + 1, d.target[b, child + 1]
                    break
                p = p.clone()
                p[token] = 0
                p /= p.sum()
            else:
                break
        draw(p)
    return accepted / BATCH


def loop_relaxed(d: Drafts, draw: Draw) -> float:
    """With the residual of the relaxed target, as the op has it by default."""
    tokens, children, near, accepted = d.tokens.tolist(), d.children, neighbours(), 0
    for b in range(BATCH):
        node = -1
        p = d.target[b, 0]
        while children[node]:
            for child in children[node]:
                token = tokens[b][child]
                mass = p[near[token]].cumsum(0)
                count = int((mass <= 0.1).sum())
                boosted = float(p[token]) + (float(mass[count - 1]) if count else 0.0)
                if random.random() < boosted:
                    node, accepted, p = child, accepted + 1, d.target[b, child + 1]
                    break
                p = p.clone()
                p[token] = 0
                p[near[token, :count]] = 0
                p /= p.sum()
            else:
                break
        draw(p)
    return accepted / BATCH


def loop_typical(d: Drafts, draw: Draw) -> float:
    accepted, nodes = 0, len(d.parents)
    inner = sorted({p + 1 for p in d.parents})
    place = torch.tensor([inner.index(p + 1) for p in d.parents])
    for b in range(BATCH):
        p = d.target[b, inner]
        entropy = -(p * (p + 1e-5).log()).sum(-1)
        threshold = torch.minimum(torch.full_like(entropy, 0.09), torch.exp(-entropy) * 0.3)
        own = p[place, d.tokens[b]]
        good, score = (own > threshold[place]).tolist(), own.log().tolist()
        best, keys = (0, 0.0), {-1: (0, 0.0)}
        last = -1
        for i in range(nodes):
            if good[i] and d.parents[i] in keys:
                depth, total = keys[d.parents[i]]
                keys[i] = (depth + 1, total + score[i])
                if keys[i] > best:
                    best, last = keys[i], i
        accepted += best[0]
        d.target[b, last + 1].argmax().item()
    return accepted / BATCH


def _rows_of_path(d: Drafts, step: ops.Verified) -> Iterable[list[int]]:
    """For every row of the batch the nodes at which something was decided."""
    for b in range(d.target.shape[0]):
        yield [-1, *step.path[b, : int(step.accepted[b])].tolist()]


def rows_read(name: str, d: Drafts, step: ops.Verified) -> int:
    """Rows of the vocabulary that the result depends on, each counted once."""
    children, count, nodes = d.children, 0, len(d.parents)
    for b, path in enumerate(_rows_of_path(d, step)):
        for i, node in enumerate(path):
            went_on = i + 1 < len(path)
            if name.startswith("typical"):
                count += 1  # the entropy, or the likeliest token
            elif name.endswith("drawn") or name.startswith(("chain", "jacobi", "block")):
                refused = (path[i + 1] != children[node][0]) if went_on else bool(children[node])
                count += 2 if refused else 0 if went_on else 1
            else:
                count += 1
        if name.startswith("jacobi"):
            count += nodes - int(step.accepted[b])
        if name.startswith("block"):
            count += 2 * max(0, nodes - 1 - int(step.accepted[b]))
    return count


@cache
def cases() -> dict:
    def call(name: str, *extra: str, **options: object) -> Callable[[Drafts, bool], ops.Verified]:
        def run(d: Drafts, reference: bool = False) -> ops.Verified:
            function = getattr(ops, ("reference_" if reference else "") + name)
            values = {
                "parents": torch.tensor(d.parents), "draft": d.draft, "near": neighbours() if "near" in extra else None,
                "none": None,
            }  # fmt: skip
            seeds = torch.arange(d.target.shape[0])
            return function(d.target, d.tokens, *(values[e] for e in extra), seed=seeds, offset=7, **options)

        return run

    return {
        "chain": (call("verify_chain", "draft"), loop_chain, drafts(CHAIN, False)),
        "chain_bf16": (call("verify_chain", "draft"), None, drafts(CHAIN, False, torch.bfloat16)),
        "block": (call("verify_chain", "draft", method="block"), loop_block, drafts(CHAIN, False)),
        "tree_drawn": (call("verify_tree", "parents", "draft"), loop_tree_drawn, drafts(TREE, False)),
        "tree_chosen": (call("verify_tree", "parents"), loop_tree_chosen, drafts(TREE, True)),
        "typical": (call("verify_typical", "parents"), loop_typical, drafts(TREE, True)),
        "relaxed_chain": (call("verify_relaxed", "near"), loop_relaxed, drafts(CHAIN, True)),
        "relaxed_tree": (call("verify_relaxed", "near", "parents"), loop_relaxed, drafts(TREE, True)),
        "jacobi": (call("verify_jacobi", "draft"), loop_jacobi, drafts(CHAIN, False)),
    }


NAMES = [
    "chain", "chain_bf16", "block", "tree_drawn", "tree_chosen", "typical", "relaxed_chain", "relaxed_tree", "jacobi",
]  # fmt: skip
DRAWS = {"loop": multinomial, "loop_cdf": by_cumulative_sum}

# CPU time of a loop over that of the op.
FLOORS = [(name, "loop", 20.0) for name in NAMES if name != "chain_bf16"]


def floors_report(records: list[dict]) -> list[str]:
    own = [r for r in records if r.get("op") == "speculative"]
    times = {(r["case"], r["impl"]): r["seconds"] for r in own}
    lines = []
    for r in own:
        more = (
            f"  reads {r['mib']:.1f} MiB, {r['fraction_of_read']:.0%} of {r['read_gbps']:.1f} GB/s"
            if "mib" in r
            else ""
        )
        lines.append(
            f"{r['case']:<14} {r['impl']:<10} {1e3 * r['seconds']:9.3f} ms  accepted {r['accepted']:.2f}{more}"
        )
    for case, peer, multiple in FLOORS:
        mine, other = times.get((case, "arcore")), times.get((case, peer))
        if mine is None or other is None:
            continue
        verdict = "ok   " if other >= multiple * mine else "BELOW"
        lines.append(f"{verdict} {case}: {other / mine:6.1f} x {peer}, floor {multiple:.0f}")
    return lines


@pytest.fixture(scope="module")
def read_gbps() -> float:
    """Bytes per second of CPU time that a sum over 256 MiB reads."""
    x = torch.ones(64 * 2**20)
    return x.numel() * 4 / cpu_seconds(lambda: x.sum()) / 1e9


def _parameters() -> list:
    chosen = [
        (n, i) for n in NAMES for i in ("arcore", *DRAWS)
        if i == "arcore" or (n != "chain_bf16" and not (n == "typical" and i == "loop_cdf"))
    ]  # fmt: skip
    return [pytest.param(*c, id="-".join(c)) for c in chosen]


@pytest.mark.parametrize(("case", "impl"), _parameters())
def bench_speculative(benchmark, read_gbps, case, impl):
    op, loop, d = cases()[case]
    step = op(d)
    accepted = step.accepted.double().mean().item()
    if impl == "arcore":
        got, expected = op(d.head(8)), op(d.head(8), reference=True)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), (
            "wrong ids: no number for it"
        )

        def run() -> object:
            return op(d)

    else:
        random.seed(0)
        torch.manual_seed(0)
        draw = DRAWS[impl]

        def run() -> object:
            return loop(d, draw)

        spread = step.accepted.double().std().item() / BATCH**0.5 + 0.02
        found = sum(loop(d, draw) for _ in range(3)) / 3
        assert abs(found - accepted) < 5 * spread, f"{found} accepted instead of {accepted}: no number for it"
        accepted = found

    benchmark.group = case
    benchmark._timer = time.process_time
    benchmark.pedantic(run, rounds=31 if impl == "arcore" else 5, iterations=1, warmup_rounds=2)
    seconds = benchmark.stats.stats.median
    benchmark.extra_info.update(
        op="speculative",
        case=case,
        impl=impl,
        direction="forward",
        seconds=seconds,
        accepted=round(accepted, 3),
        dtype=str(d.target.dtype).removeprefix("torch."),
    )
    if impl == "arcore":
        size = rows_read(case, d, step) * VOCAB * d.target.element_size()
        benchmark.extra_info.update(
            mib=round(size / 2**20, 2), read_gbps=round(read_gbps, 1),
            fraction_of_read=round(size / seconds / 1e9 / read_gbps, 3),
        )  # fmt: skip
