"""selective_scan beside its peers on CPU: `pytest bench/selective_scan --benchmark-json=out.json`.

fp32, N=16, with z, D, bias and softplus, in the layout that transformers' Mamba passes: u and delta contiguous in
time, z contiguous in channels, B and C slices of one projection. One thread, process CPU time. A state update is one
(batch, channel, step, state); its floor is one exponential, measured in the same run. Peers: the loop over steps of
transformers' slow path, mambapy's parallel scan, the reference under torch.compile. Every implementation is compared
with a float64 result before it is timed; one that is wrong prints no number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from measure import cpu_seconds, exp_seconds, peak_extra_bytes
from torch import Tensor
from torch.nn.functional import silu, softplus

from arcore.ops import reference_selective_scan, selective_scan

STATE = 16


@dataclass(frozen=True)
class Case:
    name: str
    batch: int
    dim: int
    length: int
    # Peers whose loop over steps takes minutes are left out of the long backward.
    slow_backward: bool = True

    @property
    def updates(self) -> int:
        return self.batch * self.dim * self.length * STATE


CASES = {
    case.name: case
    for case in (
        Case("mamba_130m_1024", 1, 1536, 1024, slow_backward=False),
        Case("mamba_130m_128", 1, 1536, 128),
        Case("roma_base_4x128", 4, 768, 128),
    )
}


@cache
def inputs(name: str) -> dict[str, Tensor]:
    case = CASES[name]
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    shape = (case.batch, case.dim, case.length)
    projected = normal(case.batch, case.length, 48 + 2 * STATE)
    return {
        "u": normal(*shape),
        "delta": normal(*shape) * 0.5,
        "A": -torch.arange(1.0, STATE + 1).repeat(case.dim, 1),
        "B": projected[..., 48 : 48 + STATE].transpose(1, 2),
        "C": projected[..., 48 + STATE :].transpose(1, 2),
        "D": torch.ones(case.dim),
        "z": normal(case.batch, case.length, case.dim).transpose(1, 2),
        "delta_bias": normal(case.dim) * 0.1,
    }


def ours(x: dict[str, Tensor]) -> Tensor:
    return selective_scan(*x.values(), delta_softplus=True)


def transformers_loop(x: dict[str, Tensor]) -> Tensor:
    """The arithmetic of transformers' MambaMixer.slow_forward, on the same tensors."""
    u, dt = x["u"], softplus(x["delta"] + x["delta_bias"][:, None])
    decay = torch.exp(x["A"][None, :, None, :] * dt[..., None])  # [B, D, L, N]
    driven = dt[..., None] * x["B"].transpose(1, 2)[:, None].float() * u[..., None].float()
    c = x["C"].transpose(1, 2)  # [B, L, N]
    state, outs = u.new_zeros(u.shape[0], u.shape[1], STATE), []
    for t in range(u.shape[2]):
        state = decay[:, :, t] * state + driven[:, :, t]
        outs.append(torch.matmul(state, c[:, t].unsqueeze(-1))[..., 0])
    return (torch.stack(outs, dim=-1) + u * x["D"][None, :, None]) * silu(x["z"])


def mambapy(x: dict[str, Tensor]) -> Tensor:
    """mambapy's Blelloch scan, on the same tensors."""
    from mambapy.pscan import pscan

    u, dt = x["u"].transpose(1, 2), softplus(x["delta"] + x["delta_bias"][:, None]).transpose(1, 2)
    decay = torch.exp(dt[..., None] * x["A"])  # [B, L, D, N]
    driven = dt[..., None] * x["B"].transpose(1, 2)[:, :, None] * u[..., None]
    states = pscan(decay, driven)
    y = (states @ x["C"].transpose(1, 2)[..., None])[..., 0] + x["D"] * u
    return y.transpose(1, 2) * silu(x["z"])


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(reference_selective_scan, dynamic=False)


def compiled_reference(x: dict[str, Tensor]) -> Tensor:
    return _compiled()(*x.values(), delta_softplus=True)


IMPLEMENTATIONS: dict[str, Callable[[dict[str, Tensor]], Tensor]] = {
    "arcore": ours,
    "transformers": transformers_loop,
    "mambapy": mambapy,
    "compiled": compiled_reference,
}

# (case, direction, peer, how many times faster arcore must be in the same run).
FLOORS = [
    ("mamba_130m_1024", "forward", "transformers", 50.0),
    ("mamba_130m_1024", "forward", "mambapy", 100.0),
    ("mamba_130m_1024", "forward+backward", "mambapy", 80.0),
    ("mamba_130m_128", "forward+backward", "transformers", 300.0),
]
# State updates per second and core that are aimed at, in 1e9.
AIMS = {"forward": 2.0, "backward": 0.9}


def floors_report(records: list[dict]) -> list[str]:
    seconds = {
        (r["case"], r["direction"], r["impl"]): r["seconds"]
        for r in records
        if r.get("op") == "selective_scan"
    }
    lines = []
    for case, direction, peer, least in FLOORS:
        ours_s, theirs = seconds.get((case, direction, "arcore")), seconds.get((case, direction, peer))
        if ours_s is None or theirs is None:
            continue
        verdict = "ok   " if theirs >= least * ours_s else "BELOW"
        lines.append(
            f"{verdict} {case} {direction}: {ours_s * 1e3:.2f} ms = {theirs / ours_s:.0f} x faster than {peer} "
            f"({theirs * 1e3:.0f} ms), floor {least:g}"
        )
    exponential = exp_seconds()
    for case in CASES.values():
        forward, both = (seconds.get((case.name, d, "arcore")) for d in ("forward", "forward+backward"))
        if forward is None or both is None:
            continue
        for direction, spent in (("forward", forward), ("backward", both - forward)):
            rate = case.updates / spent / 1e9
            lines.append(
                f"{'ok   ' if rate >= AIMS[direction] else 'BELOW'} {case.name} {direction}: {rate:.2f} G state "
                f"updates/s, {case.updates * exponential / spent:.0%} of the time would go into bare "
                f"exponentials, aim {AIMS[direction]}"
            )
    return lines


@cache
def exact(name: str) -> Tensor:
    x = {key: t.double() for key, t in inputs(name).items()}
    return reference_selective_scan(*x.values(), delta_softplus=True)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore")
def bench_scan(benchmark, name: str, direction: str, impl: str):
    case, x = CASES[name], inputs(name)
    if impl == "mambapy":
        pytest.importorskip("mambapy")
    loops = impl in ("transformers", "compiled")
    if impl == "compiled" and (name != "mamba_130m_128" or direction != "forward"):
        pytest.skip("unrolling the steps compiles for tens of minutes")
    if loops and direction != "forward" and not case.slow_backward:
        pytest.skip("minutes: each step's backward fills a tensor of [B, D, L, N]")
    f = IMPLEMENTATIONS[impl]
    grad = torch.randn(x["u"].shape, generator=torch.Generator().manual_seed(1))

    if direction == "forward":

        def run() -> object:
            with torch.no_grad():
                return f(x)

    else:
        leaves = {key: t.detach().requires_grad_() for key, t in x.items()}

        def run() -> object:
            return torch.autograd.grad(f(leaves), list(leaves.values()), grad)

    with torch.no_grad():
        error = (f(x).double() - exact(name)).abs().max().item()
    assert error <= 1e-5 * exact(name).abs().max().item(), (
        f"wrong result (error {error:.2e}): no number for it"
    )
    quick = impl == "arcore"
    seconds = cpu_seconds(run, rounds=25 if quick else 2)
    benchmark.extra_info.update(
        op="selective_scan",
        case=name,
        direction=direction,
        impl=impl,
        seconds=seconds,
        updates_per_second=case.updates / seconds,
        peak_extra_mib=round(peak_extra_bytes(run) / 2**20, 1) if quick else None,
    )
    benchmark.group = f"selective_scan {name} {direction}"
    benchmark.pedantic(run, rounds=5 if quick else 1)


@pytest.mark.parametrize("length", [1024, 16_384, 131_072, 1_048_576])
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def bench_long_rows(benchmark, length: int, direction: str):
    """The rate must not fall with the length: 64 channels, contiguous in time, without gate and skip."""
    generator = torch.Generator().manual_seed(0)
    u, b, c = (torch.randn(1, n, length, generator=generator) for n in (64, STATE, STATE))
    delta, a = (
        torch.rand(1, 64, length, generator=generator) * 0.1,
        -torch.arange(1.0, STATE + 1).repeat(64, 1),
    )
    leaves = [t.requires_grad_(direction != "forward") for t in (u, delta, a, b, c)]

    def run() -> object:
        out = selective_scan(*leaves)
        return out if direction == "forward" else torch.autograd.grad(out, leaves, u.detach())

    seconds = cpu_seconds(run, rounds=3)
    benchmark.extra_info.update(
        op="selective_scan",
        case=f"long_{length}",
        direction=direction,
        impl="arcore",
        seconds=seconds,
        updates_per_second=64 * length * STATE / seconds,
    )
    benchmark.group = f"selective_scan long rows {direction}"
    benchmark.pedantic(run, rounds=1)
