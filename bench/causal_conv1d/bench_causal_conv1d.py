"""causal_conv1d beside its peers on CPU: `pytest bench/causal_conv1d --benchmark-json=out.json`.

Width 4, bias, silu, fp32, D=1536: Mamba-130m's convolution, time-contiguous and channel-contiguous, and a decode step.
One thread, process CPU time. Peers: what transformers computes without the CUDA package (conv1d of the padded row, cut,
silu; per step a rolled state, a product and a sum), and the same under torch.compile. The floor is moving the row in
and out once: the copy of a tensor of the same size, measured in the same run. Every implementation is compared with
a float64 result before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from measure import cpu_seconds
from torch import Tensor

from arcore.ops import causal_conv1d, causal_conv1d_update, reference_causal_conv1d

DIM, WIDTH = 1536, 4
SHAPES = {"mamba_130m_1024": (1, 1024), "mamba_130m_128": (1, 128), "roma_base_4x128": (4, 128)}
# (peer, direction or step, how many times faster arcore must be in the same run).
FLOORS = {"forward": 6.0, "forward+backward": 2.0, "step": 6.0}


@cache
def inputs(name: str, layout: str) -> tuple[Tensor, Tensor, Tensor]:
    batch, length = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, DIM, length, generator=generator)
    if layout == "channel_last":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    return x, torch.randn(DIM, WIDTH, generator=generator) / 2, torch.randn(DIM, generator=generator)


def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return causal_conv1d(x, weight, bias, activation="silu")


def padded_conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.conv1d(x, weight[:, None], bias, padding=WIDTH - 1, groups=DIM)[..., : x.shape[2]])


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(padded_conv1d, dynamic=False)


def compiled(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _compiled()(x, weight, bias)


IMPLEMENTATIONS = {"arcore": ours, "transformers": padded_conv1d, "compiled": compiled}


def record(benchmark, case: str, direction: str, impl: str, seconds: float, **more: object) -> None:
    benchmark.extra_info.update(
        op="causal_conv1d", case=case, direction=direction, impl=impl, seconds=seconds, **more
    )
    benchmark.group = f"causal_conv1d {case} {direction}"


def floors_report(records: list[dict]) -> list[str]:
    own = [r for r in records if r.get("op") == "causal_conv1d"]
    seconds = {(r["case"], r["direction"], r["impl"]): r["seconds"] for r in own}
    lines = []
    for (case, direction, impl), theirs in seconds.items():
        mine = seconds.get((case, direction, "arcore"))
        if mine is None or impl != "transformers":
            continue
        least = FLOORS[direction]
        lines.append(
            f"{'ok   ' if theirs >= least * mine else 'BELOW'} {case} {direction}: {mine * 1e3:.3f} ms = "
            f"{theirs / mine:.1f} x faster than {impl} ({theirs * 1e3:.2f} ms), floor {least:g}"
        )
    for r in own:
        if r["impl"] == "arcore" and r.get("copy_seconds"):
            lines.append(
                f"{r['case']} forward: {r['copy_seconds'] / r['seconds']:.0%} of the speed of a copy"
            )
    return lines


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("layout", ["time_last", "channel_last"])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.filterwarnings("ignore")
def bench_conv(benchmark, name: str, layout: str, direction: str, impl: str):
    f, (x, weight, bias) = IMPLEMENTATIONS[impl], inputs(name, layout)
    exact = reference_causal_conv1d(x.double(), weight, bias, activation="silu")
    with torch.no_grad():
        error = (f(x, weight, bias).double() - exact).abs().max().item()
    assert error <= 1e-5 * exact.abs().max().item(), f"wrong result (error {error:.2e}): no number for it"
    grad = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1))
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]

    def forward() -> object:
        with torch.no_grad():
            return f(x, weight, bias)

    def both() -> object:
        return torch.autograd.grad(f(*leaves), leaves, grad)

    run = forward if direction == "forward" else both
    into = torch.empty_like(x)
    copy = cpu_seconds(lambda: into.copy_(x), rounds=25) if impl == "arcore" and run is forward else None
    seconds = cpu_seconds(run, rounds=25 if impl == "arcore" else 9)
    record(benchmark, f"{name}_{layout}", direction, impl, seconds, copy_seconds=copy)
    benchmark.pedantic(run, rounds=5)


def transformers_step(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The arithmetic of transformers' decode step: the state holds `width` inputs, the new one included."""
    state.copy_(torch.roll(state, shifts=-1, dims=-1))
    state[:, :, -1] = x
    return F.silu((state * weight).sum(-1) + bias)


def our_step(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return causal_conv1d_update(x, state, weight, bias, "silu")


@pytest.mark.parametrize("impl", ["arcore", "transformers"])
@pytest.mark.parametrize("batch", [1, 16])
def bench_step(benchmark, batch: int, impl: str):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, DIM, generator=generator)
    state = torch.randn(batch, DIM, WIDTH, generator=generator)
    weight, bias = torch.randn(DIM, WIDTH, generator=generator), torch.randn(DIM, generator=generator)
    f = our_step if impl == "arcore" else transformers_step
    torch.testing.assert_close(
        f(x, state.clone(), weight, bias),
        transformers_step(x, state.clone(), weight, bias),
        rtol=1e-5,
        atol=1e-5,
    )
    steps = 100

    def run() -> None:
        for _ in range(steps):
            f(x, state, weight, bias)

    seconds = cpu_seconds(run, rounds=9) / steps
    record(benchmark, f"batch_{batch}", "step", impl, seconds)
    benchmark.pedantic(run, rounds=3)
