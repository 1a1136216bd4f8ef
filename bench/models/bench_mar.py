"""Sampling with MAR's diffusion head on CPU beside a plain loop: `pytest bench/models/bench_mar.py`.

Both draw tokens with the same weights, noise, times and guidance, and must agree before they are timed. The plain loop
is how the published code samples: at each step it evaluates the network, time and condition embeddings and modulations
included, on all rows, and then takes the ancestral step from tables made ahead. `tiny` is the head of `mar_tiny`;
`base` is that of `mar_b` for the tokens of one image in one of 64 iterations.

One thread, process CPU time.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from measure import cpu_seconds
from torch import Tensor

from arcore.nn import DiffusionHead
from arcore.schedules import DDPM, VPSchedule

STEPS = 100
# case: channels, width of z, width, depth, tokens
CASES = {"tiny": (4, 96, 128, 3, 16), "base": (16, 768, 1024, 6, 4)}
# (case, how many times faster than the plain loop arcore must be in the same run).
FLOORS = [("tiny", 1.3), ("base", 2.0)]


class PlainLoop:
    """Respaced ancestral sampling with a learned variance, one network evaluation and one step after the other."""

    def __init__(self, head: DiffusionHead, times: Tensor) -> None:
        self.head, self.times = head, times[:-1].tolist()
        schedule: Any = head.schedule
        bars = [(schedule.alpha_bar(now), schedule.alpha_bar(then)) for now, then in pairwise(times)]
        self.tables = []
        for bar, before in bars:
            beta = 1 - bar / before
            posterior = beta * (1 - before) / (1 - bar)
            self.tables.append(
                tuple(
                    float(number)
                    for number in (
                        1 / bar.sqrt(),
                        (1 / bar - 1).sqrt(),
                        beta * before.sqrt() / (1 - bar),
                        (1 - before) * (1 - beta).sqrt() / (1 - bar),
                        posterior.clamp(min=1e-20).log(),
                        beta.log(),
                    )
                )
            )

    def network(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        head = self.head
        cond = head.time_embed(t) + F.linear(z, head.cond_embed.weight, head.cond_embed.bias)
        h = head.input_proj(x)
        for block in head.blocks:
            modulation = F.linear(F.silu(cond), block.modulation.weight, block.modulation.bias)
            shift, scale, gate = modulation.chunk(3, 1)
            inner = block.norm(h) * (1 + scale) + shift
            inner = F.silu(F.linear(inner, block.fc1.weight, block.fc1.bias))
            h = h + gate * F.linear(inner, block.fc2.weight, block.fc2.bias)
        shift, scale = F.linear(F.silu(cond), head.modulation.weight, head.modulation.bias).chunk(2, 1)
        out: Tensor = head.out(head.norm(h) * (1 + scale) + shift)
        return out

    @torch.no_grad()
    def __call__(self, z: Tensor, uncond: Tensor, noise: Tensor, cfg_scale: float) -> Tensor:
        both = torch.cat([z, uncond])
        x = noise[0]
        for k, (t, table) in enumerate(zip(self.times, self.tables, strict=True)):
            on_x, on_eps, of_x0, of_x, low, high = table
            out = self.network(torch.cat([x, x]), torch.full((len(both),), t), both)
            eps, variance = out.chunk(2, dim=1)
            wanted, other = eps.chunk(2)
            eps = other + cfg_scale * (wanted - other)
            x0 = on_x * x - on_eps * eps
            mean = of_x0 * x0 + of_x * x
            if k + 1 == len(self.times):
                return mean
            share = (variance[: len(x)] + 1) / 2
            x = mean + torch.exp(0.5 * (share * high + (1 - share) * low)) * noise[k + 1]
        return x


def floors_report(records: list[dict]) -> list[str]:
    mine = [r for r in records if r.get("op") == "mar"]
    seconds = {(r["case"], r["impl"]): r["seconds"] for r in mine}
    lines = []
    for case, least in FLOORS:
        ours, theirs = seconds.get((case, "arcore")), seconds.get((case, "loop"))
        if ours is not None and theirs is not None:
            verdict = "ok   " if theirs >= least * ours else "BELOW"
            lines.append(
                f"{verdict} diffusion head, {case}: {ours * 1e3:.1f} ms = {theirs / ours:.2f} x faster than a plain "
                f"loop ({theirs * 1e3:.1f} ms), floor {least:g}"
            )
    return lines


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("impl", ["arcore", "loop"])
def bench_mar(benchmark, case: str, impl: str):
    torch.manual_seed(0)
    channels, cond_dim, width, depth, tokens = CASES[case]
    head = DiffusionHead(
        channels, cond_dim, width, depth, schedule=VPSchedule("cosine"), prediction="eps", learn_variance=True
    )
    # Away from zero, where a new head lies; small, as a head with random weights lets values grow step by step.
    for part in (*(block.modulation for block in head.blocks), head.modulation, head.out):
        torch.nn.init.normal_(part.weight, std=0.2 * part.weight.shape[1] ** -0.5)
    schedule: Any = head.schedule
    times = schedule.grid(STEPS, "linspace")
    z, uncond = torch.randn(2, tokens, cond_dim)
    noise = torch.randn(STEPS, tokens, channels)
    solver = DDPM(schedule, "eps", variance="learned")
    loop = PlainLoop(head, times)

    def fast() -> Tensor:
        return head.sample(z, noise, solver=solver, times=times, uncond=uncond, cfg_scale=2.0)

    def plain() -> Tensor:
        return loop(z, uncond, noise, 2.0)

    ours, theirs = fast(), plain()
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error <= 1e-3, f"wrong result (error {error:.2e}): no number for it"
    run = fast if impl == "arcore" else plain
    seconds = cpu_seconds(run, rounds=15 if case == "tiny" else 5)
    benchmark.extra_info.update(op="mar", case=case, direction="sampling", impl=impl, seconds=seconds)
    benchmark.group = f"mar head {case}"
    benchmark.pedantic(run, rounds=1)
