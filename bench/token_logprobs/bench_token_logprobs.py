"""token_logprobs beside its peers on CPU: `pytest bench/token_logprobs/bench_token_logprobs.py`.

One thread, process CPU time, every peer in the same run. Peers: log_softmax, gather and entropy in eager PyTorch, the
same under torch.compile, and cross_entropy where no entropy is asked for. Every implementation is compared with a
float64 result before it is timed; one that is wrong prints no number. The floor of bytes is one read of the logits
forward, and one read and one write backward; the bandwidth is that of a copy of the logits in the same run. A gradient
is a fresh allocation, whose page faults are part of the time of every implementation. Memory is the highest resident
size during forward and backward in a fresh process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from measure import cpu_seconds, peak_extra_bytes
from torch import Tensor
from torch.nn.functional import cross_entropy

from arcore.ops import token_logprobs

ROUNDS = 9


@dataclass(frozen=True)
class Case:
    rows: int
    vocab: int
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.vocab}_{str(self.dtype).removeprefix('torch.')}"

    @property
    def bytes(self) -> int:
        return self.rows * self.vocab * self.dtype.itemsize


CASES = {
    case.name: case
    for case in (Case(512, 32000), Case(64, 128256), Case(2048, 4096), Case(512, 32000, torch.bfloat16))
}


@cache
def inputs(name: str) -> tuple[Tensor, Tensor, Tensor]:
    case = CASES[name]
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(case.rows, case.vocab, generator=generator)).to(case.dtype).requires_grad_()
    target = torch.randint(case.vocab, (case.rows,), generator=generator)
    return logits, target, torch.randn(2, case.rows, generator=generator)


def ours(logits: Tensor, target: Tensor, entropy: bool) -> tuple[Tensor, ...]:
    out = token_logprobs(logits, target, return_entropy=entropy)
    return (out.logp, out.entropy) if out.entropy is not None else (out.logp,)


def eager(logits: Tensor, target: Tensor, entropy: bool) -> tuple[Tensor, ...]:
    log_p = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    logp = log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    return (logp, -(log_p.exp() * log_p).sum(-1)) if entropy else (logp,)


def torch_cross_entropy(logits: Tensor, target: Tensor, entropy: bool) -> tuple[Tensor, ...]:
    return (-cross_entropy(logits, target, reduction="none"),)


@cache
def _compiled() -> Callable[..., tuple[Tensor, ...]]:
    return torch.compile(eager, dynamic=False)


def compiled(logits: Tensor, target: Tensor, entropy: bool) -> tuple[Tensor, ...]:
    return _compiled()(logits, target, entropy)


IMPLEMENTATIONS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "arcore": ours,
    "eager": eager,
    "compiled": compiled,
    "cross_entropy": torch_cross_entropy,
}

# How many times faster than eager PyTorch forward and backward must be, and how far the memory may be from the size
# of the gradient.
LEAST_SPEEDUP = 3.0
MEMORY_MARGIN = 0.01


def forward(implementation: str, name: str, entropy: bool) -> Callable[[], tuple[Tensor, ...]]:
    logits, target, _ = inputs(name)
    plain = logits.detach()

    def run() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return IMPLEMENTATIONS[implementation](plain, target, entropy)

    return run


def both(implementation: str, name: str, entropy: bool) -> Callable[[], tuple[Tensor, ...]]:
    logits, target, cotangents = inputs(name)

    def run() -> tuple[Tensor, ...]:
        out = IMPLEMENTATIONS[implementation](logits, target, entropy)
        grads = [g.to(x.dtype) for g, x in zip(cotangents, out, strict=False)]
        return torch.autograd.grad(out, logits, grads)

    return run


def _check(implementation: str, name: str, entropy: bool) -> None:
    logits, target, cotangents = inputs(name)
    exact = logits.detach().double().requires_grad_()
    expected = eager(exact, target, entropy)
    (grad,) = torch.autograd.grad(expected, exact, [g.double() for g in cotangents][: len(expected)])
    low = logits.dtype != torch.float32
    # cross_entropy rounds its loss to the dtype of the logits.
    tolerance = 0.1 if low and implementation == "cross_entropy" else 1e-4
    for a, b in zip(forward(implementation, name, entropy)(), expected, strict=True):
        assert (a - b).abs().max() <= tolerance, f"{implementation} is wrong: no number for it"
    (got,) = both(implementation, name, entropy)()
    assert (got - grad).abs().max() <= (2e-2 if low else 1e-4), f"{implementation} is wrong: no number for it"


def _peak_in_subprocess(name: str, entropy: bool) -> int:
    """Bytes beyond the logits at the height of forward and backward, the gradient included."""
    path = Path(__file__).resolve()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(path.parents[1]), *sys.path])}
    run = subprocess.run(
        [sys.executable, str(path), name, str(int(entropy))],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return int(run.stdout)


def floors_report(records: list[dict]) -> list[str]:
    own = [r for r in records if r.get("op") == "token_logprobs"]
    times = {(r["logits"], r["direction"], r["entropy"], r["impl"]): r["seconds"] for r in own}
    lines = []
    for r in own:
        if r["impl"] != "arcore":
            continue
        key = (r["logits"], r["direction"], r["entropy"])
        peers = {
            i: times[(*key, i)] / r["seconds"]
            for i in IMPLEMENTATIONS
            if (*key, i) in times and i != "arcore"
        }
        judged = r["direction"] == "forward+backward" and r["entropy"] and "eager" in peers
        verdict = ("ok   " if peers["eager"] >= LEAST_SPEEDUP else "BELOW") if judged else "     "
        lines.append(
            f"{verdict} {r['logits']} {'logp+entropy' if r['entropy'] else 'logp'} {r['direction']}: "
            f"{r['seconds'] * 1e3:.2f} ms, {r['bandwidth']:.1f} GB/s = {r['bandwidth_fraction']:.0%} of a copy's; "
            + ", ".join(f"{ratio:.1f} x {peer}" for peer, ratio in peers.items())
            + (f" (floor {LEAST_SPEEDUP:g})" if judged else "")
        )
        if "peak_bytes" in r:
            share = r["peak_bytes"] / CASES[r["logits"]].bytes
            verdict = "ok   " if abs(share - 1) <= MEMORY_MARGIN else "BELOW"
            lines.append(
                f"{verdict} {r['logits']}: memory beyond the logits {share:.4f} x their gradient, "
                f"floor 1 +- {MEMORY_MARGIN:g}"
            )
    return lines


def _copy_seconds(case: Case) -> float:
    source = inputs(case.name)[0].detach()
    target = torch.empty_like(source)
    return cpu_seconds(lambda: target.copy_(source), rounds=ROUNDS)


def _parameters() -> list:
    return [
        pytest.param(
            name, direction, entropy, i, id=f"{name}-{direction}-{'entropy' if entropy else 'logp'}-{i}"
        )
        for name in CASES
        for direction in ("forward", "forward+backward")
        for entropy in (False, True)
        for i in IMPLEMENTATIONS
        if i == "arcore" or (i == "cross_entropy") != entropy or i == "eager"
    ]


@pytest.mark.parametrize(("name", "direction", "entropy", "impl"), _parameters())
def bench_token_logprobs(benchmark, name, direction, entropy, impl):
    case = CASES[name]
    _check(impl, name, entropy)
    run = (forward if direction == "forward" else both)(impl, name, entropy)
    seconds = cpu_seconds(run, rounds=ROUNDS)
    moved = case.bytes * (1 if direction == "forward" else 3)
    copied = 2 * case.bytes / _copy_seconds(case)
    benchmark.extra_info.update(
        op="token_logprobs", case=f"{name}_entropy" if entropy else name, logits=name, direction=direction,
        dtype=str(case.dtype).removeprefix("torch."), entropy=entropy, impl=impl, seconds=seconds,
        bandwidth=moved / seconds / 1e9, bandwidth_fraction=moved / seconds / copied,
    )  # fmt: skip
    if impl == "arcore" and direction == "forward+backward":
        benchmark.extra_info["peak_bytes"] = _peak_in_subprocess(name, entropy)
    benchmark.group = f"token_logprobs {name} {direction} {'entropy' if entropy else 'logp'}"
    benchmark.pedantic(run, rounds=3)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(peak_extra_bytes(both("arcore", sys.argv[1], bool(int(sys.argv[2])))))
