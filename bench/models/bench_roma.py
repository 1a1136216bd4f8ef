"""RoMA's encoder on CPU beside plain PyTorch: `pytest bench/models/bench_roma.py`.

`layers`: a training step of two layers of the base encoder (width 768, expand 1, 128 tokens) in the pretraining model,
against the same layers whose mixer runs transformers' loop over steps, or mambapy's parallel scan, after torch's own
convolution. `directions`: a training step of one four-direction mixer of the classifier (197 tokens), against the
same mixer that flips its inputs and results as the released code does, with the same ops.

One thread, process CPU time. The floor of a step is its matrix products at the machine's FMA peak, and its
exponentials, both measured in the same run. All implementations are compared before they are timed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from measure import cpu_seconds, exp_seconds
from torch import Tensor, nn

from arcore.models import FourDirectionMixer
from arcore.nn import MambaMixer, PreNormBlock, SelectiveSSM, SwiGLU
from arcore.zoo.representation.roma_classifier.model import column_order

WIDTH, STATES = 768, 16
LAYERS, BATCH, TOKENS = 2, 2, 128
SIDE = 14

# (case, peer, how many times faster arcore must be in the same run). Matrix products, which all share, are most of it.
FLOORS = [("layers", "transformers", 4.0), ("layers", "mambapy", 1.5), ("directions", "flips", 1.0)]


def loop_over_steps(u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The arithmetic of transformers' MambaMixer.slow_forward."""
    decay = torch.exp(a[None, :, None, :] * dt.transpose(1, 2)[..., None])  # [B, D, L, N]
    driven = dt.transpose(1, 2)[..., None] * b[:, None] * u.transpose(1, 2)[..., None]
    state, outs = u.new_zeros(len(u), u.shape[2], STATES), []
    for t in range(u.shape[1]):
        state = decay[:, :, t] * state + driven[:, :, t]
        outs.append(torch.matmul(state, c[:, t].unsqueeze(-1))[..., 0])
    return torch.stack(outs, dim=1)


def parallel_scan(u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """mambapy's Blelloch scan."""
    from mambapy.pscan import pscan

    states = pscan(torch.exp(dt[..., None] * a), dt[..., None] * b[:, :, None] * u[..., None])
    return (states @ c[..., None])[..., 0]


def plain_scan(kernel: Callable[..., Tensor], ssm: SelectiveSSM, u: Tensor, z: Tensor, **_: object) -> Tensor:
    """What `SelectiveSSM.scan` computes, with torch's convolution and another scan."""
    length = u.shape[1]
    u = F.conv1d(u.transpose(1, 2), ssm.conv1d.weight, ssm.conv1d.bias, padding=3, groups=u.shape[2])
    u = F.silu(u[..., :length]).transpose(1, 2)
    delta, b, c = ssm.select(u)
    y = kernel(u, F.softplus(delta + ssm.dt_proj.bias), ssm.decay(), b, c)
    return (y + ssm.D * u) * F.silu(z)


def flipped(mixer: Any, x: Tensor, order: Tensor) -> Tensor:
    """The four directions as the released code runs them: backward scans read and write flipped copies."""
    xz = mixer.in_proj(x)
    total: Tensor | float = 0.0
    for k, ssm in enumerate(mixer.directions):
        seen = xz if k < 2 else xz[:, order]
        seen = seen.flip(1) if k % 2 else seen
        y = ssm.scan(*seen.chunk(2, dim=-1))
        y = y.flip(1) if k % 2 else y
        total = total + (y if k < 2 else y[:, order])
    out: Tensor = mixer.out_proj(total / 4)
    return out


@cache
def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(
            PreNormBlock(WIDTH, mixer=MambaMixer(WIDTH, expand=1), mlp=SwiGLU(WIDTH, WIDTH * 8 // 3))
            for _ in range(LAYERS)
        )
    )


@cache
def mixer() -> FourDirectionMixer:
    torch.manual_seed(0)
    return FourDirectionMixer(WIDTH, STATES)


def linear_products(module: nn.Module) -> int:
    """Multiplications of the linear layers per token."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def floors_report(records: list[dict]) -> list[str]:
    mine = [r for r in records if r.get("op") == "roma"]
    seconds = {(r["case"], r["impl"]): r["seconds"] for r in mine}
    lines = []
    for case, peer, least in FLOORS:
        ours, theirs = seconds.get((case, "arcore")), seconds.get((case, peer))
        if ours is not None and theirs is not None:
            verdict = "ok   " if theirs >= least * ours else "BELOW"
            lines.append(
                f"{verdict} {case}: {ours * 1e3:.1f} ms = {theirs / ours:.2f} x faster than {peer} "
                f"({theirs * 1e3:.1f} ms), floor {least:g}"
            )
    for r in mine:
        if r["impl"] == "arcore":
            products, floor = r["matmul_floor"], r["matmul_floor"] + r["exp_floor"]
            beyond = ", ".join(
                f"{impl} {(spent - products) * 1e3:.0f} ms"
                for (case, impl), spent in seconds.items()
                if case == r["case"]
            )
            lines.append(
                f"{r['case']}: matrix products at the FMA peak {products * 1e3:.1f} ms, exponentials "
                f"{r['exp_floor'] * 1e3:.1f} ms; {floor / r['seconds']:.0%} of the time is that floor; "
                f"beyond the products: {beyond}"
            )
    return lines


@pytest.mark.parametrize(
    ("case", "impl"),
    [("layers", impl) for impl in ("arcore", "transformers", "mambapy")]
    + [("directions", impl) for impl in ("arcore", "flips")],
)
@pytest.mark.filterwarnings("ignore")
def bench_roma(benchmark, monkeypatch, peak_gflops: float, case: str, impl: str):
    if impl == "mambapy":
        pytest.importorskip("mambapy")
    generator = torch.Generator().manual_seed(1)
    tokens = TOKENS if case == "layers" else SIDE * SIDE + 1
    x = torch.randn(BATCH, tokens, WIDTH, generator=generator)
    grad = torch.randn(x.shape, generator=generator)
    module: nn.Module = layers() if case == "layers" else mixer()
    order = column_order(SIDE)
    f: Callable[[Tensor], Tensor] = module if case == "layers" else partial(module, order=order)
    parameters = list(module.parameters())

    def run() -> tuple[Tensor, ...]:
        out = f(x)
        return (out, *torch.autograd.grad(out, parameters, grad))

    expected = run()
    if impl == "flips":
        f = partial(flipped, module, order=order)
    elif impl != "arcore":
        kernel = {"transformers": loop_over_steps, "mambapy": parallel_scan}[impl]
        monkeypatch.setattr(SelectiveSSM, "scan", lambda ssm, u, z, **_: plain_scan(kernel, ssm, u, z))
    for one, other in zip(run(), expected, strict=True):
        error = (one - other).abs().max() / other.abs().max()
        assert error <= 1e-3, f"wrong result (error {error:.2e}): no number for it"
    quick = impl in ("arcore", "flips")
    seconds = cpu_seconds(run, rounds=15 if quick else 2)
    scans, count = (LAYERS, linear_products(module)) if case == "layers" else (4, linear_products(module))
    benchmark.extra_info.update(
        op="roma",
        case=case,
        direction="forward+backward",
        impl=impl,
        seconds=seconds,
        # Forward and two products of the backward; the scan's backward recomputes its exponentials.
        matmul_floor=3 * 2 * count * BATCH * tokens / (peak_gflops * 1e9),
        exp_floor=2 * scans * BATCH * tokens * WIDTH * STATES * exp_seconds(),
    )
    benchmark.group = f"roma {case}"
    benchmark.pedantic(run, rounds=3 if quick else 1)
