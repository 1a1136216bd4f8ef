"""mamba_step beside the same layer by an op per part, and in PyTorch's ops, on a CPU: `pytest bench/mamba_step -s`.

The twenty-four layers of Mamba-130m, one token of 1 and of 8 rows, with weights in float32, bfloat16 and blocks of 8
bits, one thread, process CPU time, median of 7 steps taken in turns. `arcore` is the op, `arcore, op per part` is
`MambaMixer.step` behind its norm, `pytorch` is the layer in PyTorch's ops (blocks: as floats in float32, which they
would have to become). The floor is reading the weights once, at the speed at which torch sums them in the same run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from measure import interleaved_seconds
from torch import Tensor, nn

from arcore.nn import MambaMixer, RMSNorm, StateCache, quantise
from arcore.nn.block_weight import stored
from arcore.ops import block_values, mamba_step

LAYERS, DIM = 24, 768
IMPLEMENTATIONS = ("arcore", "arcore, op per part", "pytorch")
STORAGES = ("float32", "bfloat16", "q8_0")
MATRICES = ("in_proj", "x_proj", "dt_proj", "out_proj")
LEAST = 1.2


@cache
@torch.no_grad()
def layers(storage: str) -> nn.ModuleList:
    made = nn.ModuleList(
        nn.ModuleDict({"norm": RMSNorm(DIM), "mixer": MambaMixer(DIM)}) for _ in range(LAYERS)
    ).requires_grad_(False)
    if storage == "bfloat16":
        made.bfloat16()
    elif storage != "float32":
        quantise(made, storage)
    return made


def states(batch: int, mixer: MambaMixer) -> StateCache:
    return StateCache(
        num_layers=LAYERS,
        batch=batch,
        conv_shape=mixer.conv_shape,
        state_shape=mixer.state_shape,
        dtype=mixer.A_log.dtype,
    )


def numbers(weight: Tensor) -> Tensor:
    kept = stored(weight)
    return block_values(kept) if kept.dtype == torch.uint8 else kept


@cache
@torch.no_grad()
def step_runs(storage: str, batch: int) -> dict[str, Callable[[], object]]:
    """A step of each, and reading the weights."""
    network: Any = layers(storage)
    first: MambaMixer = network[0]["mixer"]
    x = torch.randn(batch, DIM)
    plans = [
        {"norm": layer["norm"].weight.float(), "eps": layer["norm"].eps, **layer["mixer"].step_weights()}
        for layer in network
    ]
    one, other, third = (states(batch, first) for _ in range(3))

    def op() -> None:
        y = x.clone()
        for i, plan in enumerate(plans):
            conv_state, state = one.layer(i)
            mamba_step(y, **plan, conv_state=conv_state, state=state)

    def parts() -> None:
        y = x
        for i, layer in enumerate(network):
            y = y + layer["mixer"].step(layer["norm"](y), other, i)

    matrices = [
        {name: numbers(layer["mixer"].get_submodule(name).weight) for name in MATRICES} for layer in network
    ]
    decays = [layer["mixer"].decay() for layer in network]

    def peer() -> None:
        y = x
        for i, layer in enumerate(network):
            mixer, w = layer["mixer"], matrices[i]
            conv_state, state = third.layer(i)
            h = layer["norm"](y)
            u, z = F.linear(h, w["in_proj"]).chunk(2, -1)
            inputs = torch.cat([conv_state, u.unsqueeze(1)], 1)
            conv_state.copy_(inputs[:, 1:])
            u = F.silu((inputs * mixer.conv1d.weight.squeeze(1).t()).sum(1) + mixer.conv1d.bias)
            dt, b, c = F.linear(u, w["x_proj"]).split([mixer.dt_rank, mixer.d_state, mixer.d_state], -1)
            delta = F.softplus(F.linear(dt, w["dt_proj"], mixer.dt_proj.bias)).float().unsqueeze(-1)
            state.mul_(torch.exp(delta * decays[i])).add_(delta * u.unsqueeze(-1) * b.unsqueeze(1))
            mixed = (state * c.unsqueeze(1)).sum(-1) + mixer.D * u
            y = y + F.linear((mixed * F.silu(z)).to(u.dtype), w["out_proj"])

    # As floats whatever they hold: torch sums bytes one by one.
    kept = [stored(layer["mixer"].get_submodule(name).weight) for layer in network for name in MATRICES]
    read = [weight.detach().view(-1).view(torch.float32) for weight in kept]
    return {
        "arcore": op,
        "arcore, op per part": parts,
        "pytorch": peer,
        "floor": lambda: [w.sum() for w in read],
    }


@cache
@torch.no_grad()
def step_times(storage: str, batch: int) -> dict[str, float]:
    return interleaved_seconds(step_runs(storage, batch), 7)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("storage", STORAGES)
@torch.no_grad()
def bench_mamba_step(storage: str, batch: int, impl: str, benchmark: Any) -> None:
    torch.set_num_threads(1)
    times = step_times(storage, batch)
    benchmark.extra_info |= {
        "op": "mamba_step", "case": f"mamba_130m_{storage}_batch_{batch}", "impl": impl, "direction": "step",
        "dtype": storage, "seconds": times[impl], "floor_seconds": times["floor"],
    }  # fmt: skip
    benchmark.pedantic(step_runs(storage, batch)[impl], rounds=1)


def floors_report(records: list[dict[str, Any]]) -> list[str]:
    own = [r for r in records if r.get("op") == "mamba_step"]
    lines = []
    for r in own:
        theirs = [p for p in own if p["case"] == r["case"] and p["impl"] != "arcore"]
        if r["impl"] != "arcore" or not theirs:
            continue
        best = min(theirs, key=lambda p: p["seconds"])
        ratio = best["seconds"] / r["seconds"]
        lines.append(
            f"{'ok   ' if ratio >= LEAST else 'BELOW'} {r['case']}: {r['seconds'] * 1e3:.1f} ms = {ratio:.2f} x "
            f"{best['impl']} ({best['seconds'] * 1e3:.1f}), floor {LEAST:g}; reading the weights "
            f"{r['floor_seconds'] * 1e3:.1f} ms"
        )
    return lines
