"""ACDiT on CPU beside plain PyTorch: `pytest bench/models/bench_acdit.py`.

`step`: a training step (forward, backward) of two layers of the base model, 4 blocks of 256 tokens, against the same
model whose attention is PyTorch's with the same mask as a dense bool tensor, over all 2048 tokens as the paper has them
(`sdpa`) or without the dead last clean block (`sdpa, 1792 tokens`).

`generation`: four blocks in eight steps each with guidance, against recomputing the clean blocks in every step, with
the same op (`recompute`), and against a cache for each of the two copies (`two caches`).

One thread, process CPU time. All implementations are compared before they are timed. The floor of a step is its matrix
products and allowed pairs at the machine's FMA peak.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from measure import cpu_seconds
from torch import Tensor
from torch.nn.functional import mse_loss, scaled_dot_product_attention

import arcore.nn.dit
from arcore import masks
from arcore.decoding import generate_blocks
from arcore.decoding.draws import RowNormals
from arcore.models import ACDiT, ACDiTConfig
from arcore.schedules import DPMSolver2M

BLOCKS, TOKENS, WIDTH, LAYERS = 4, 256, 768, 2
STEPS, WEIGHT, SEEDS = 8, 1.5, [3]

# (case, peer, how many times faster arcore must be in the same run)
FLOORS = [("step", "sdpa", 1.6), ("generation", "recompute", 2.0), ("generation", "two caches", 0.9)]


@cache
def model(drop_last_clean: bool = True) -> ACDiT:
    torch.manual_seed(0)
    config = ACDiTConfig(
        depth=LAYERS, embed_dim=WIDTH, num_heads=WIDTH // 64, class_drop=0.0, drop_last_clean=drop_last_clean
    )
    network = ACDiT(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return network


@cache
def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    clean, noisy, eps = torch.randn(3, 1, BLOCKS, TOKENS, 4, generator=generator)
    return clean, noisy, torch.tensor([[10, 300, 600, 900]]), torch.tensor([7]), eps


@contextmanager
def dense_attention() -> Iterator[None]:
    """Let `DiTAttention` run on PyTorch's attention with a bool mask, made once."""
    dense: dict[masks.IntervalMask, Tensor] = {}

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: masks.IntervalMask) -> Tensor:
        if mask not in dense:
            dense[mask] = mask.to_bool()
        return scaled_dot_product_attention(q, k, v, attn_mask=dense[mask])

    layer: Any = arcore.nn.dit
    original = layer.block_sparse_attention
    layer.block_sparse_attention = attend
    try:
        yield
    finally:
        layer.block_sparse_attention = original


def step(network: ACDiT) -> tuple[Tensor, Tensor]:
    clean, noisy, t, labels, eps = inputs()
    network.zero_grad()
    loss = mse_loss(network(clean, noisy, t, labels), eps)
    loss.backward()
    return loss.detach(), network.embed.weight.grad


def with_dense(network: ACDiT) -> tuple[Tensor, Tensor]:
    with dense_attention():
        return step(network)


@torch.no_grad()
def generate() -> Tensor:
    network = model()
    return generate_blocks(
        network, torch.tensor([7]), times=network.schedule.grid(STEPS), cfg_scale=WEIGHT, seed=SEEDS
    )


@torch.no_grad()
def generate_without_sharing(recompute: bool) -> Tensor:
    """Conditional and unconditional rows in one batch, each with its own cache; or without a cache: clean blocks and
    the noisy one in one pass per step, the clean ones as they stand."""
    network = model()
    network.eval()
    solver, times = DPMSolver2M(network.schedule), network.schedule.grid(STEPS)
    labels = torch.tensor([[7], [network.null_class]])
    normals, done = RowNormals(torch.tensor(SEEDS)), []
    cache = network.make_cache(2)
    for _ in range(BLOCKS):
        x, history = normals.draw(*network.block_shape), None
        for t, s in pairwise(times):
            if recompute:
                cache = network.make_cache(2)
                for block in done:
                    network.commit(block.expand(2, -1, -1), cache)
            rows = x.expand(2, -1, -1).unsqueeze(1)
            out, _ = network.denoise(rows, t.expand(2, 1), labels, cache)
            c, u = out[:, 0].split(1)
            x, history = solver.step(u + WEIGHT * (c - u), x, t, s, history=history)
        done.append(x)
        if not recompute and len(done) < BLOCKS:
            network.commit(x.expand(2, -1, -1), cache)
    return torch.stack(done, dim=1)


def step_flops(drop_last_clean: bool = True) -> float:
    """Multiply-adds count two; the backward costs twice the forward."""
    network = model(drop_last_clean)
    tokens, pairs = network.mask.nq, network.mask.density * network.mask.nq**2
    linear = 2 * tokens * 12 * WIDTH**2 * LAYERS
    return 3 * linear + (4 + 10) * WIDTH * pairs * LAYERS


CASES: dict[str, dict[str, Callable[[], Any]]] = {
    "step": {
        "arcore": lambda: step(model()),
        "sdpa": lambda: with_dense(model(False)),
        "sdpa, 1792 tokens": lambda: with_dense(model()),
    },
    "generation": {
        "arcore": generate,
        "two caches": lambda: generate_without_sharing(recompute=False),
        "recompute": lambda: generate_without_sharing(recompute=True),
    },
}
DIRECTION = {"step": "forward+backward", "generation": "sampling"}


@pytest.mark.parametrize(("case", "name"), [(case, name) for case in CASES for name in CASES[case]])
def bench_acdit(benchmark: Any, peak_gflops: float, case: str, name: str) -> None:
    torch.testing.assert_close(CASES[case][name](), CASES[case]["arcore"](), rtol=2e-3, atol=2e-3)
    seconds = cpu_seconds(CASES[case][name], rounds=3)
    benchmark.extra_info.update(op="acdit", case=case, direction=DIRECTION[case], impl=name, seconds=seconds)
    if case == "step" and name == "arcore":
        benchmark.extra_info.update(fraction=step_flops() / seconds / 1e9 / peak_gflops)
    if case == "generation":
        shared, double = model().make_cache(1, copies=2), model().make_cache(2)
        benchmark.extra_info.update(
            mib={"arcore": shared, "two caches": double}.get(name, double).nbytes / 2**20
        )
    benchmark.pedantic(CASES[case][name], rounds=1)


def floors_report(records: list[dict[str, Any]]) -> list[str]:
    """Milliseconds, ratios and floors."""
    times = {(r["case"], r["impl"]): r for r in records if r.get("op") == "acdit"}
    lines = []
    for (case, name), record in times.items():
        ours = times.get((case, "arcore"))
        ratio = f"{record['seconds'] / ours['seconds']:5.2f}x" if ours else ""
        extra = f"  {record['fraction']:.0%} of FMA peak" if "fraction" in record else ""
        extra += f"  cache {record['mib']:.1f} MiB" if "mib" in record else ""
        lines.append(f"{case:11} {name:18} {1e3 * record['seconds']:9.1f} ms  {ratio}{extra}")
    for case, peer, floor in FLOORS:
        if (case, peer) in times and (case, "arcore") in times:
            ratio = times[case, peer]["seconds"] / times[case, "arcore"]["seconds"]
            lines.append(
                f"floor {case} vs {peer}: {ratio:.2f} (>= {floor}) {'ok' if ratio >= floor else 'BELOW'}"
            )
    return lines
