"""selective_scan, its single step, ssd and causal_conv1d beside peers on a GPU, with the floor of each.

A floor is the largest of: the bytes that must move over the copy bandwidth of the same run, the exponentials over what
the multiprocessors' special-function units give at their present clock, and the products of matrices, where there are
any, over the rate of a large one in the same run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from report import Report, wrong_result
from timing import Run, copies_for
from torch import Tensor

from arcore.ops import (
    causal_conv1d,
    causal_conv1d_update,
    reference_selective_scan,
    reference_selective_state_update,
    reference_ssd,
    selective_scan,
    selective_state_update,
    ssd,
)

STATE = 16
# Seconds that ops aim at on an H100, by op, case and direction.
GOALS = {
    ("selective_scan", "scan_2048", "forward"): 0.30e-3,
    ("selective_scan", "scan_2048", "backward"): 1.0e-3,
    ("ssd", "ssd_2048", "forward"): 0.20e-3,
    ("ssd", "ssd_2048", "backward"): 0.60e-3,
}
EXPONENTIALS_PER_CLOCK = 16  # of one multiprocessor


def exponential_rate(device: str) -> float:
    """Exponentials per second of all multiprocessors at their highest clock; 0 where unknown."""
    if device != "cuda":
        return 0.0
    properties = torch.cuda.get_device_properties(0)
    clock = getattr(properties, "clock_rate", 0) * 1e3
    return float(properties.multi_processor_count * EXPONENTIALS_PER_CLOCK * clock)


def _floor(report: Report, moved: int, exponentials: int = 0, products: int = 0) -> float:
    """Seconds; `products` are multiply-adds of bfloat16 matrices."""
    rate = exponential_rate(report.device)
    times = [moved / (report.ceilings.copy_gb_per_s * 1e9)]
    times.append(2 * products / (report.ceilings.matmul_tflops * 1e12))
    if exponentials and rate:
        times.append(exponentials / rate)
    return max(times)


def _size(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _close(got: Tensor, expected: Tensor, name: str, limit: float = 1e-2) -> None:
    error = ((got.double() - expected.double()).norm() / expected.double().norm()).item()
    if not error <= limit:
        wrong_result(f"{name} is off by {error:.1e}")


def _scan_inputs(batch: int, dim: int, length: int, device: str) -> dict[str, Tensor]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    shape = (batch, dim, length)
    return {
        "u": normal(*shape).bfloat16(),
        "delta": (0.5 * normal(*shape)).bfloat16(),
        "A": -torch.arange(1.0, STATE + 1, device=device).repeat(dim, 1),
        "B": normal(batch, STATE, length).bfloat16(),
        "C": normal(batch, STATE, length).bfloat16(),
        "D": torch.ones(dim, device=device),
        "z": normal(*shape).bfloat16(),
        "delta_bias": 0.1 * normal(dim),
    }


def _ours(x: dict[str, Tensor]) -> Tensor:
    return selective_scan(*x.values(), delta_softplus=True)


def _transformers(x: dict[str, Tensor]) -> Tensor:
    """The arithmetic of transformers' MambaMixer.slow_forward: a loop of torch calls over the steps."""
    u = x["u"].float()
    dt = F.softplus(x["delta"].float() + x["delta_bias"][:, None])
    decay = torch.exp(x["A"][None, :, None, :] * dt[..., None])  # [B, D, L, N]
    driven = dt[..., None] * x["B"].transpose(1, 2)[:, None].float() * u[..., None]
    c = x["C"].transpose(1, 2).float()  # [B, L, N]
    state, outs = u.new_zeros(u.shape[0], u.shape[1], STATE), []
    for t in range(u.shape[2]):
        state = decay[:, :, t] * state + driven[:, :, t]
        outs.append(torch.matmul(state, c[:, t].unsqueeze(-1))[..., 0])
    return ((torch.stack(outs, dim=-1) + u * x["D"][None, :, None]) * F.silu(x["z"].float())).bfloat16()


def _mambapy(x: dict[str, Tensor]) -> Tensor:
    from mambapy.pscan import pscan

    u, dt = x["u"].float().transpose(1, 2), F.softplus(x["delta"].float() + x["delta_bias"][:, None])
    dt = dt.transpose(1, 2)
    decay = torch.exp(dt[..., None] * x["A"])  # [B, L, D, N]
    states = pscan(decay, dt[..., None] * x["B"].float().transpose(1, 2)[:, :, None] * u[..., None])
    y = (states @ x["C"].float().transpose(1, 2)[..., None])[..., 0] + x["D"] * u
    return (y.transpose(1, 2) * F.silu(x["z"].float())).bfloat16()


def _mamba_ssm(x: dict[str, Tensor]) -> Tensor:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    return selective_scan_fn(*x.values(), delta_softplus=True)


PEERS: dict[str, Callable[[dict[str, Tensor]], Tensor]] = {
    "arcore": _ours,
    "mamba_ssm": _mamba_ssm,
    "mambapy": _mambapy,
    "transformers": _transformers,
}


def _few_channels(x: dict[str, Tensor], dims: int) -> dict[str, Tensor]:
    """One batch entry and its first channels, in float64 on the CPU."""
    cut = {
        name: (
            t[:1] if name in ("B", "C") else t[:dims] if name in ("A", "D", "delta_bias") else t[:1, :dims]
        )
        for name, t in x.items()
    }
    return {name: t.detach().double().cpu() for name, t in cut.items()}


def run_selective_scan(report: Report) -> None:
    shapes = (
        {"scan_2048": (8, 2048, 2048), "scan_long": (1, 2048, 16384)} if report.gpu else {"tiny": (2, 8, 70)}
    )
    for name, shape in shapes.items():
        first = _scan_inputs(*shape, report.device)
        copies = copies_for(_size(first.values()), report.device)
        sets = [first, *(_scan_inputs(*shape, report.device) for _ in range(copies - 1))]
        grad = torch.randn(first["u"].shape, device=report.device).bfloat16()
        states = shape[0] * shape[1] * shape[2] * STATE
        long = [first[n] for n in ("u", "delta", "z", "B", "C")]
        moved = {"forward": _size(long) + _size([grad]), "backward": 2 * _size(long) + _size([grad])}
        for impl, function in PEERS.items():
            for direction in ("forward", "backward"):
                if impl == "transformers" and direction == "backward" and report.gpu:
                    report.skip(
                        "selective_scan", name, impl, direction,
                        "each of its steps keeps a tensor of [B, D, L, N] for the backward",
                    )  # fmt: skip
                    continue

                def runs(
                    f: Any = function, direction: str = direction, sets: Any = sets, grad: Tensor = grad
                ) -> list[Run]:
                    few = _few_channels(sets[0], 4)
                    with torch.no_grad():
                        _close(
                            f(sets[0])[:1, :4].cpu(),
                            reference_selective_scan(*few.values(), delta_softplus=True),
                            "out",
                        )
                    if direction == "forward":

                        def forward(x: dict[str, Tensor]) -> object:
                            with torch.no_grad():
                                return f(x)

                        return [lambda x=x: forward(x) for x in sets]
                    leaves = [{n: t.detach().requires_grad_() for n, t in x.items()} for x in sets]
                    outs = [f(x) for x in leaves]
                    return [
                        lambda o=o, x=x: torch.autograd.grad(o, list(x.values()), grad, retain_graph=True)
                        for o, x in zip(outs, leaves, strict=True)
                    ]

                floor = _floor(report, moved[direction], states * (1 if direction == "forward" else 2))
                report.measure(
                    runs, op="selective_scan", case=name, impl=impl, direction=direction, dtype="bfloat16",
                    floor_seconds=floor, times_floor=lambda s, floor=floor: s / floor,
                    goal_seconds=GOALS.get(("selective_scan", name, direction)),
                )  # fmt: skip


def run_causal_conv1d(report: Report) -> None:
    shape = (8, 2048, 2048) if report.gpu else (2, 8, 70)
    case = "conv_2048" if report.gpu else "tiny"
    weight, bias = torch.randn(shape[1], 4, device=report.device).bfloat16(), torch.randn(shape[1]).bfloat16()
    bias = bias.to(report.device)
    size = 2 * shape[0] * shape[1] * shape[2]
    sets = [
        torch.randn(shape, device=report.device).bfloat16() for _ in range(copies_for(size, report.device))
    ]
    grad = torch.randn(shape, device=report.device).bfloat16()

    def ours(x: Tensor) -> Tensor:
        return causal_conv1d(x, weight, bias, activation="silu")

    def conv1d(x: Tensor) -> Tensor:
        return F.silu(F.conv1d(x, weight[:, None], bias, padding=3, groups=shape[1])[..., : shape[2]])

    for impl, function in (("arcore", ours), ("conv1d", conv1d)):
        for direction, tensors in (("forward", 2), ("backward", 3)):

            def runs(f: Any = function, direction: str = direction) -> list[Run]:
                _close(f(sets[0]), conv1d(sets[0].float().bfloat16()), "out", 2e-2)
                if direction == "forward":
                    return [lambda x=x: f(x) for x in sets]
                leaves = [x.detach().requires_grad_() for x in sets]
                outs = [f(x) for x in leaves]
                return [
                    lambda o=o, x=x: torch.autograd.grad(o, x, grad, retain_graph=True)
                    for o, x in zip(outs, leaves, strict=True)
                ]

            floor = _floor(report, tensors * size)
            report.measure(
                runs, op="causal_conv1d", case=case, impl=impl, direction=direction, dtype="bfloat16",
                floor_seconds=floor, times_floor=lambda s, floor=floor: s / floor,
            )  # fmt: skip
    rows = 64 if report.gpu else 4
    tokens = [torch.randn(rows, shape[1], device=report.device).bfloat16() for _ in range(16)]
    states = [torch.randn(rows, shape[1], 3, device=report.device).bfloat16() for _ in range(16)]

    def steps() -> list[Run]:
        return [
            lambda x=x, s=s: causal_conv1d_update(x, s, weight, bias, "silu")
            for x, s in zip(tokens, states, strict=True)
        ]

    floor = _floor(report, 2 * rows * shape[1] * 8) + report.ceilings.launch_seconds
    report.measure(
        steps, graph=True, op="causal_conv1d", case=f"update_{rows}", impl="arcore", direction="step",
        dtype="bfloat16", floor_seconds=floor, times_floor=lambda s: s / floor,
    )  # fmt: skip


def run_selective_state_update(report: Report) -> None:
    rows, dim = (64, 4096) if report.gpu else (2, 8)

    def inputs() -> list[Tensor]:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=report.device)

        a = -torch.rand(dim, STATE, device=report.device)
        return [
            normal(rows, dim, STATE), normal(rows, dim).bfloat16(), normal(rows, dim).bfloat16(), a,
            normal(rows, STATE).bfloat16(), normal(rows, STATE).bfloat16(), normal(dim), normal(rows, dim).bfloat16(),
            normal(dim),
        ]  # fmt: skip

    first = inputs()
    sets = [first, *(inputs() for _ in range(copies_for(_size(first), report.device) - 1))]
    moved = _size(first) + _size(first[:2])
    functions = {"arcore": selective_state_update, "torch": reference_selective_state_update}
    for impl, function in functions.items():

        def runs(f: Any = function) -> list[Run]:
            mine, theirs = ([t.clone() for t in first] for _ in range(2))
            out = f(*mine, dt_softplus=True)
            expected = reference_selective_state_update(*(t.double() for t in theirs), dt_softplus=True)
            _close(out, expected, "out")
            return [lambda x=x: f(*x, dt_softplus=True) for x in sets]

        floor = _floor(report, moved) + report.ceilings.launch_seconds
        report.measure(
            runs, graph=True, op="selective_state_update", case=f"step_{rows}x{dim}", impl=impl, direction="step",
            dtype="bfloat16", floor_seconds=floor, times_floor=lambda s, floor=floor: s / floor,
        )  # fmt: skip


def _ssd_of_mamba_ssm(x: dict[str, Tensor]) -> Tensor:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return mamba_chunk_scan_combined(
        x["x"], x["dt"], x["A"], x["B"], x["C"], 256, D=x["D"], dt_bias=x["dt_bias"], dt_softplus=True
    )


def _ssd_inputs(
    batch: int, length: int, heads: int, width: int, state: int, device: str
) -> dict[str, Tensor]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    return {
        "x": normal(batch, length, heads, width).bfloat16(),
        "dt": (0.5 * normal(batch, length, heads)).bfloat16(),
        "A": -torch.rand(heads, device=device) - 0.5,
        "B": normal(batch, length, 1, state).bfloat16(),
        "C": normal(batch, length, 1, state).bfloat16(),
        "D": torch.ones(heads, device=device),
        "dt_bias": 0.1 * normal(heads),
    }


def _two_heads(x: dict[str, Tensor]) -> dict[str, Tensor]:
    """One batch entry and its first heads, in float64 on the CPU."""
    cut = {n: t[:2] if t.dim() == 1 else t[:1] if n in ("B", "C") else t[:1, :, :2] for n, t in x.items()}
    return {n: t.detach().double().cpu() for n, t in cut.items()}


def run_ssd(report: Report) -> None:
    """Mamba-2's scan at the sizes of its 130M model: many rows, and one long row."""
    shapes = (
        {"ssd_2048": (8, 2048, 24, 64, 128), "ssd_long": (1, 16384, 24, 64, 128)}
        if report.gpu
        else {"tiny": (2, 70, 2, 8, 16)}
    )

    def ours(x: dict[str, Tensor]) -> Tensor:
        return ssd(**x, dt_softplus=True)

    for name, shape in shapes.items():
        first = _ssd_inputs(*shape, report.device)
        copies = copies_for(_size(first.values()), report.device)
        sets = [first, *(_ssd_inputs(*shape, report.device) for _ in range(copies - 1))]
        grad = torch.randn(first["x"].shape, device=report.device).bfloat16()
        once = _size(first.values()) + _size([grad])
        # What any scan in products needs of each state and step: in and out, and three times that on the way back.
        products = 2 * math.prod(shape)
        for impl, function in (("arcore", ours), ("mamba_ssm", _ssd_of_mamba_ssm)):
            for direction, times in (("forward", 1), ("backward", 2)):

                def runs(
                    f: Any = function, direction: str = direction, sets: Any = sets, grad: Tensor = grad
                ) -> list[Run]:
                    with torch.no_grad():
                        expected = reference_ssd(**_two_heads(sets[0]), dt_softplus=True)
                        _close(f(sets[0])[:1, :, :2].cpu(), expected, "out")
                    if direction == "forward":

                        def forward(x: dict[str, Tensor]) -> object:
                            with torch.no_grad():
                                return f(x)

                        return [lambda x=x: forward(x) for x in sets]
                    leaves = [{n: t.detach().requires_grad_() for n, t in x.items()} for x in sets]
                    outs = [f(x) for x in leaves]
                    return [
                        lambda o=o, x=x: torch.autograd.grad(o, list(x.values()), grad, retain_graph=True)
                        for o, x in zip(outs, leaves, strict=True)
                    ]

                floor = _floor(report, times * once, 0, products * (1 if direction == "forward" else 3))
                report.measure(
                    runs, op="ssd", case=name, impl=impl, direction=direction, dtype="bfloat16",
                    floor_seconds=floor, times_floor=lambda s, floor=floor: s / floor,
                    goal_seconds=GOALS.get(("ssd", name, direction)),
                )  # fmt: skip


def verdicts(report: Report) -> list[str]:
    lines = []
    for (op, case, direction), goal in GOALS.items():
        mine = report.find(op=op, case=case, impl="arcore", direction=direction)
        if mine is not None:
            reached = "ok   " if mine["seconds"] <= goal else "BELOW"
            lines.append(
                f"{reached} {case} {direction}: {mine['seconds'] * 1e3:.3f} ms = {mine['times_floor']:.2f} x floor, "
                f"goal {goal * 1e3:.2f} ms"
            )
    return lines
