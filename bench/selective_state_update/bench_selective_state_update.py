"""selective_state_update beside its peers on CPU: `pytest bench/selective_state_update --benchmark-json=out.json`.

One decode step in fp32 at the sizes of Mamba-130m (1536 channels, 16 states) and of Mamba-2-130m (24 heads of 64
channels, 128 states), batch 1 and 16. One thread, process CPU time, mean of 100 steps. Peers: the arithmetic of
transformers' decode steps on the same tensors. The floors are one exponential per state (Mamba-1), measured in the same
run, and moving the states in and out once, at the speed at which torch adds a number to them in place in the same run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from measure import cpu_seconds, exp_seconds
from torch import Tensor
from torch.nn.functional import silu, softplus

from arcore.ops import reference_selective_state_update, selective_state_update

STEPS = 100
CASES = {
    "mamba_130m_batch_1": (1, None, 1536, 16),
    "mamba_130m_batch_16": (16, None, 1536, 16),
    "mamba2_130m_batch_1": (1, 24, 64, 128),
    "mamba2_130m_batch_16": (16, 24, 64, 128),
}
# How many times faster than transformers' step.
FLOOR = 10.0


@cache
def inputs(name: str) -> dict[str, Tensor]:
    batch, heads, dim, states = CASES[name]
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    if heads is None:
        decay = -torch.arange(1.0, states + 1).repeat(dim, 1)
        dt, bias, h, g = normal(batch, dim), normal(dim) * 0.1, (), ()
    else:
        decay = (-torch.rand(heads, 1, 1, generator=generator)).expand(heads, dim, states)
        dt, bias = normal(batch, heads, 1).expand(batch, heads, dim), normal(heads, 1).expand(heads, dim)
        h, g = (heads,), (1,)
    return {
        "state": normal(batch, *h, dim, states),
        "x": normal(batch, *h, dim),
        "dt": dt,
        "A": decay,
        "B": normal(batch, *g, states),
        "C": normal(batch, *g, states),
        "D": normal(*h, dim),
        "z": normal(batch, *h, dim) if heads is None else None,
        "dt_bias": bias,
    }


def ours(v: dict[str, Tensor]) -> Tensor:
    return selective_state_update(*v.values(), dt_softplus=True)


def transformers_mamba(v: dict[str, Tensor]) -> Tensor:
    """The arithmetic of a decode step in transformers' MambaMixer.slow_forward."""
    dt = softplus(v["dt"] + v["dt_bias"])
    decay = torch.exp(v["A"][None] * dt[..., None])
    drive = dt[..., None] * v["B"][:, None] * v["x"][..., None]
    v["state"].copy_(decay * v["state"] + drive)
    y = torch.matmul(v["state"], v["C"][..., None])[..., 0] + v["x"] * v["D"]
    return y * silu(v["z"])


def transformers_mamba2(v: dict[str, Tensor]) -> Tensor:
    """The arithmetic of a decode step in transformers' Mamba2Mixer.torch_forward (the gate comes later)."""
    heads = v["A"].shape[0]
    dt = softplus(v["dt"] + v["dt_bias"])
    decay = torch.exp(dt[..., None] * v["A"])
    b, c = (v[k].expand(-1, heads, -1) for k in ("B", "C"))
    drive = (dt[..., None] * b[..., None, :]) * v["x"][..., None]
    v["state"].copy_(v["state"] * decay + drive)
    flat = v["state"].reshape(-1, *v["state"].shape[2:])
    y = torch.bmm(flat, c.reshape(flat.shape[0], -1, 1)).view(v["x"].shape)
    return y + v["x"] * v["D"]


def floors_report(records: list[dict]) -> list[str]:
    own = {(r["case"], r["impl"]): r for r in records if r.get("op") == "selective_state_update"}
    exponential, lines = exp_seconds(), []
    for name, (batch, heads, dim, states) in CASES.items():
        mine, theirs = own.get((name, "arcore")), own.get((name, "transformers"))
        if mine is None or theirs is None:
            continue
        ratio = theirs["seconds"] / mine["seconds"]
        work = batch * dim * (states if heads is None else heads)
        lines.append(
            f"{'ok   ' if ratio >= FLOOR else 'BELOW'} {name}: {mine['seconds'] * 1e6:.1f} us = {ratio:.1f} x faster "
            f"than transformers ({theirs['seconds'] * 1e6:.0f} us), floor {FLOOR:g}; exponentials alone "
            f"{work * exponential * 1e6:.1f} us, moving the states {mine['move_seconds'] * 1e6:.1f} us"
        )
    return lines


@pytest.mark.parametrize("impl", ["arcore", "transformers"])
@pytest.mark.parametrize("name", CASES)
def bench_step(benchmark, name: str, impl: str):
    peer = transformers_mamba if CASES[name][1] is None else transformers_mamba2
    f: Callable[[dict[str, Tensor]], Tensor] = ours if impl == "arcore" else peer
    v = {key: None if t is None else t.clone() if key == "state" else t for key, t in inputs(name).items()}
    exact = {key: None if t is None else t.double() for key, t in inputs(name).items()}
    expected = reference_selective_state_update(*exact.values(), dt_softplus=True)
    error = (f(v).double() - expected).abs().max().item()
    assert error <= 1e-5 * expected.abs().max().item(), f"wrong result (error {error:.2e}): no number for it"

    def run() -> None:
        for _ in range(STEPS):
            f(v)

    def move() -> None:
        for _ in range(STEPS):
            v["state"].add_(0.0)

    seconds, moved = (cpu_seconds(g, rounds=9) / STEPS for g in (run, move))
    benchmark.extra_info.update(
        op="selective_state_update",
        case=name,
        direction="step",
        impl=impl,
        seconds=seconds,
        move_seconds=moved,
    )
    benchmark.group = f"selective_state_update {name}"
    benchmark.pedantic(run, rounds=3)
