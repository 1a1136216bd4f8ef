"""mamba3_scan beside its peers on CPU: `pytest bench/mamba3_scan --benchmark-json=out.json`.

The published sizes at d_model 768: 24 heads of 64 channels, 128 states, one group, 32 angles; one input per head (siso)
and four (mimo), with biases, D and a gate where there is one input. fp32, one thread, process CPU time. Peers are the
forms that the published tests compute, written in plain PyTorch: token by token (loop), as one masked product over the
row (whole_row), in chunks of 64 / R tokens (chunks); the last two also compiled. The loop keeps every token's state for
its gradients, so it reads rows of 128 tokens, and so does this package where they are compared; all others read 1024.
by_ssd is the road of this package before the op, through `ssd`. The floor is the FMA peak, measured in the same run.
Every implementation is compared with a float64 result before it is timed; gradients too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from measure import cpu_seconds, peak_extra_bytes
from torch import Tensor

from arcore.ops import Mamba3State, mamba3_scan, mamba3_update, reference_mamba3_scan
from arcore.ops._mamba3_by_ssd import Arguments, by_ssd, turned

HEADS, DIM, STATES, ANGLES = 24, 64, 128, 32
LENGTH, LOOP_LENGTH = 1024, 128
RANKS = {"siso": 1, "mimo": 4}
NAMES = ("x", "dt", "log_decay", "weight", "B", "C", "turn", "B_bias", "C_bias", "D", "z")

# How many times faster than a peer arcore must be in the same run (case, direction, peer, multiple).
FLOORS = [
    (case, direction, peer, multiple)
    for case in ("siso", "mimo")
    for direction in ("forward", "forward+backward")
    for peer, multiple in (("loop", 20.0), ("whole_row", 20.0), ("whole_row_compiled", 10.0))
]


@cache
def inputs(case: str, length: int = LENGTH) -> dict[str, Tensor | None]:
    generator, rank = torch.Generator().manual_seed(0), RANKS[case]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    dt = F.softplus(normal(1, length, HEADS) - 3)
    return {
        "x": normal(1, length, HEADS, rank, DIM) / rank,
        "dt": dt,
        "log_decay": -(1 + torch.rand(1, length, HEADS, generator=generator)) * dt,
        "weight": normal(1, length, HEADS).sigmoid(),
        "B": normal(1, length, rank, 1, STATES),
        "C": normal(1, length, rank, 1, STATES),
        "turn": math.pi * normal(1, length, 1, ANGLES).tanh() * dt[..., None],
        "B_bias": torch.ones(HEADS, rank, STATES),
        "C_bias": torch.ones(HEADS, rank, STATES),
        "D": normal(HEADS),
        "z": normal(1, length, HEADS, rank, DIM) if rank == 1 else None,
    }


def ours(v: dict[str, Any]) -> Tensor:
    return mamba3_scan(*v.values(), halves=v["x"].shape[3] > 1)


def loop(v: dict[str, Any]) -> Tensor:
    out: Tensor = reference_mamba3_scan(*v.values(), halves=v["x"].shape[3] > 1)
    return out


def _prepared(v: dict[str, Any]) -> tuple[Tensor, ...]:
    """Turned B and C ``[B, L, H, R, N]``, and the weights of what a step adds to later steps and to its own."""
    halves = v["x"].shape[3] > 1
    angle = v["turn"].cumsum(1).remainder(2 * math.pi)
    b, c = (
        turned(v[n].expand(-1, -1, -1, HEADS, -1).transpose(2, 3) + v[f"{n}_bias"], angle, halves)
        for n in ("B", "C")
    )
    own = v["weight"] * v["dt"]
    return b, c, own + F.pad((v["dt"] - own)[:, 1:], (0, 0, 0, 1)), own


def _finished(y: Tensor, v: dict[str, Any]) -> Tensor:
    y = y + v["D"][:, None, None] * v["x"]
    return y if v["z"] is None else y * F.silu(v["z"])


def _decays(log: Tensor) -> Tensor:
    """``[..., T]`` to ``[..., T, T]``: exp of the sum of what lies between, 0 above the diagonal."""
    total = log.cumsum(-1)
    between = total[..., :, None] - total[..., None, :]
    return between.masked_fill(~torch.ones_like(between, dtype=torch.bool).tril(), -math.inf).exp()


def whole_row(v: dict[str, Any]) -> Tensor:
    b, c, kept, own = _prepared(v)
    weights = torch.einsum("blhn,bmhn->bhlm", c[:, :, :, 0], b[:, :, :, 0])
    weights = weights * _decays(v["log_decay"].transpose(1, 2)) * kept.transpose(1, 2)[:, :, None]
    x = v["x"][:, :, :, 0]
    y = torch.einsum("bhlm,bmhp->blhp", weights, x)
    y = y + ((own - kept) * (b * c).sum((-1, -2)))[..., None] * x
    return _finished(y.unsqueeze(3), v)


def chunks(v: dict[str, Any]) -> Tensor:
    b, c, kept, own = _prepared(v)
    size = 64 // v["x"].shape[3]
    b, c, x, kept, own, log = (t.unflatten(1, (-1, size)) for t in (b, c, v["x"], kept, own, v["log_decay"]))
    log = log.transpose(2, 3)  # [B, chunks, H, T]
    decay = _decays(log) * kept.transpose(2, 3)[..., None, :]
    decay = decay + torch.diag_embed((own - kept).transpose(2, 3))
    scores = torch.einsum("bkthqn,bkshrn->bkhtqsr", c, b) * decay[..., :, None, :, None]
    y = torch.einsum("bkhtqsr,bkshrp->bkthqp", scores, x)
    rest = (log.sum(-1, keepdim=True) - log.cumsum(-1)).exp() * kept.transpose(2, 3)
    added = torch.einsum("bkshrn,bkshrp,bkhs->bkhpn", b, x, rest)
    states, state, whole = [], torch.zeros_like(added[:, 0]), log.sum(-1).exp()
    for k in range(added.shape[1]):
        states.append(state)
        state = whole[:, k, :, None, None] * state + added[:, k]
    before = torch.stack(states, 1)
    y = y + torch.einsum("bkthqn,bkhpn,bkht->bkthqp", c, before, log.cumsum(-1).exp())
    return _finished(y.flatten(1, 2), v)


@cache
def _compiled(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(f, dynamic=False)


def whole_row_compiled(v: dict[str, Any]) -> Tensor:
    return _compiled(whole_row)(v)


def chunks_compiled(v: dict[str, Any]) -> Tensor:
    return _compiled(chunks)(v)


def through_ssd(v: dict[str, Any]) -> Tensor:
    own = v["weight"] * v["dt"]
    kept = own + F.pad((v["dt"] - own)[:, 1:], (0, 0, 0, 1))
    names = ("B", "C", "turn", "B_bias", "C_bias", "D", "z")
    arguments = Arguments(v["x"], v["log_decay"], kept, own, *(v[n] for n in names), None, None)
    return by_ssd(arguments, None, None, v["x"].shape[3] > 1, False)[0]


IMPLEMENTATIONS = {
    "arcore": ours,
    "by_ssd": through_ssd,
    "loop": loop,
    "whole_row": whole_row,
    "whole_row_compiled": whole_row_compiled,
    "chunks": chunks,
    "chunks_compiled": chunks_compiled,
}


def flops(case: str, length: int, direction: str) -> int:
    """Multiply-adds times two of the products: C H, B^T u, C B^T and M u up to the diagonal of chunks of 64 rows."""
    rank = RANKS[case]
    forward = 2 * DIM * STATES + 32 * (DIM + STATES)
    # The state again, C H, B G, dB, dC and the state's gradient; C B^T, dM, M^T g, dS B, dS^T C, and M x for the gate.
    backward = 7 * DIM * STATES + 32 * (STATES + 3 * DIM + 2 * STATES)
    per_row = forward if direction == "forward" else forward + backward
    return 2 * length * HEADS * rank * per_row


@cache
def expected(case: str, length: int) -> tuple[Tensor, dict[str, Tensor]]:
    exact = {k: None if t is None else t.double().requires_grad_() for k, t in inputs(case, length).items()}
    out = chunks(exact)
    names = [k for k, t in exact.items() if t is not None]
    grads = torch.autograd.grad(out, [exact[n] for n in names], _grad(case, length).double())
    return out.detach(), dict(zip(names, grads, strict=True))


@cache
def _grad(case: str, length: int) -> Tensor:
    return torch.randn(inputs(case, length)["x"].shape, generator=torch.Generator().manual_seed(1))


def _parameters() -> list[Any]:
    found = []
    for case in RANKS:
        for direction in ("forward", "forward+backward"):
            for impl in IMPLEMENTATIONS:
                if impl.startswith("whole_row") and case == "mimo":
                    continue  # R x R matrices of the row's length squared
                for length in {"loop": (LOOP_LENGTH,), "arcore": (LENGTH, LOOP_LENGTH)}.get(impl, (LENGTH,)):
                    name = f"{case}-{length}-{direction}-{impl}"
                    found.append(pytest.param(case, length, direction, impl, id=name))
    return found


@pytest.mark.parametrize(("case", "length", "direction", "impl"), _parameters())
@pytest.mark.filterwarnings("ignore")
def bench_mamba3_scan(
    benchmark: Any, peak_gflops: float, case: str, length: int, direction: str, impl: str
) -> None:
    f, v, grad = IMPLEMENTATIONS[impl], inputs(case, length), _grad(case, length)
    leaves = {k: None if t is None else t.clone().requires_grad_() for k, t in v.items()}
    given = [t for t in leaves.values() if t is not None]
    right, right_grads = expected(case, length)

    def forward() -> Any:
        with torch.no_grad():
            return f(v)

    def both() -> Any:
        return torch.autograd.grad(f(leaves), given, grad)

    run = forward if direction == "forward" else both
    results = (run(),) if direction == "forward" else run()
    wanted = (right,) if direction == "forward" else tuple(right_grads.values())
    for value, exact in zip(results, wanted, strict=True):
        error = (value.double() - exact).abs().max().item()
        # Angles that are summed in float32 lose more.
        allowed = (1e-4 if impl in ("arcore", "by_ssd") else 2e-2) * exact.abs().max().item()
        assert error <= allowed, f"wrong result (error {error:.2e} > {allowed:.2e}): no number for it"
    # The first run, of which the results were compared, has warmed up what there is to warm up.
    seconds = cpu_seconds(run, rounds=7 if impl == "arcore" else 2, warm_up=False)
    benchmark.extra_info.update(
        op="mamba3_scan",
        case=f"{case}_{length}",
        direction=direction,
        impl=impl,
        seconds=seconds,
        peak_extra_mib=round(peak_extra_bytes(run) / 2**20, 1),
        **(
            {"gflops": flops(case, length, direction) / seconds / 1e9, "peak_gflops": peak_gflops}
            if impl == "arcore"
            else {}
        ),
    )
    benchmark.group = f"mamba3_scan {case}_{length} {direction}"
    benchmark.pedantic(lambda: None, rounds=1)


@pytest.mark.parametrize("impl", ["arcore", "pytorch"])
@pytest.mark.parametrize("case", RANKS)
@torch.no_grad()
def bench_mamba3_update(benchmark: Any, case: str, impl: str) -> None:
    """One token of one row; the plain form is what the mixer did before the op."""
    rank, halves = RANKS[case], case == "mimo"
    v = {k: t if t is None or k in ("B_bias", "C_bias", "D") else t[:, 0] for k, t in inputs(case).items()}
    del v["z"]

    def fresh() -> Mamba3State:
        shapes = ((DIM, STATES), (ANGLES,), (rank, STATES), (rank, DIM))
        return Mamba3State(*(torch.ones(1, HEADS, *shape) for shape in shapes))

    def plain(state: Mamba3State) -> Tensor:
        angle = (state.angle + v["turn"]).remainder(2 * math.pi)
        b, c = (
            turned(v[n].expand(-1, -1, HEADS, -1).transpose(1, 2) + v[f"{n}_bias"], angle, halves)
            for n in ("B", "C")
        )
        before = torch.einsum("bhrn,bhrp->bhpn", state.B, state.x)
        now = torch.einsum("bhrn,bhrp->bhpn", b, v["x"])
        decay, dt, w = (v[n][..., None, None] for n in ("log_decay", "dt", "weight"))
        h = decay.exp() * (state.state + (1 - w) * dt * before) + w * dt * now
        for old, new in zip(state, (h, angle, b, v["x"]), strict=True):
            old.copy_(new)
        return torch.einsum("bhpn,bhrn->bhrp", h, c) + v["D"][:, None, None] * v["x"]

    def op(state: Mamba3State) -> Tensor:
        return mamba3_update(state, *v.values(), halves=halves)

    one, other = fresh(), fresh()
    for _ in range(3):
        torch.testing.assert_close(op(one), plain(other), rtol=1e-3, atol=1e-3)
    f, state = (op if impl == "arcore" else plain), fresh()

    def run() -> None:
        for _ in range(50):
            f(state)

    seconds = cpu_seconds(run) / 50
    benchmark.extra_info.update(
        op="mamba3_update", case=f"{case}_batch_1", direction="step", impl=impl, seconds=seconds
    )
    benchmark.group = f"mamba3_update {case}"
    benchmark.pedantic(run, rounds=1)


def floors_report(records: list[dict[str, Any]]) -> list[str]:
    lines = []
    for op in ("mamba3_scan", "mamba3_update"):
        found = {(r["case"], r["direction"], r["impl"]): r for r in records if r.get("op") == op}
        for (case, direction, impl), r in found.items():
            if impl != "arcore":
                continue
            peers = [
                f"{peer} {p['seconds'] * 1e3:.2f} ms = {p['seconds'] / r['seconds']:.1f} x"
                for (c, d, peer), p in found.items()
                if (c, d) == (case, direction) and peer != "arcore"
            ]
            peak = f" ({r['gflops'] / r['peak_gflops']:.0%} of the FMA peak)" if r.get("gflops") else ""
            lines.append(f"{op} {case} {direction}: {r['seconds'] * 1e3:.2f} ms{peak}; {', '.join(peers)}")
        for case, direction, peer, least in FLOORS:
            length = LOOP_LENGTH if peer == "loop" else LENGTH
            mine, other = (found.get((f"{case}_{length}", direction, impl)) for impl in ("arcore", peer))
            if mine and other:
                ratio = other["seconds"] / mine["seconds"]
                verdict = "ok   " if ratio >= least else "BELOW"
                lines.append(f"{verdict} {case} {direction}: {ratio:.1f} x {peer}, floor {least:g}")
    return lines
