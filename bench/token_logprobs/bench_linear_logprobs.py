"""linear_logprobs beside heads that keep their logits: `pytest bench/token_logprobs/bench_linear_logprobs.py`.

Forward and backward, gradients of hidden and weight, one thread, process CPU time, every peer in the same run.
`matmuls` are the three bare products of a head that keeps its logits, the floor: linear_logprobs needs a fourth.
Peers give the loss only: linear + cross_entropy, and linear_cross_entropy with chunks of its own choice and of 256
rows.
Memory is the highest resident size in a fresh process minus the gradients returned, as a share of the whole logits.
Every implementation is compared with float64 on a sample of the vocabulary's columns before it is timed.
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
from torch.nn.functional import cross_entropy, linear

from arcore.matmul import slow_halves
from arcore.ops import linear_logprobs

ROUNDS = 3


@dataclass(frozen=True)
class Case:
    rows: int
    width: int
    vocab: int
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.width}x{self.vocab}_{str(self.dtype).removeprefix('torch.')}"

    @property
    def logits_bytes(self) -> int:
        return self.rows * self.vocab * self.dtype.itemsize

    @property
    def gradient_bytes(self) -> int:
        return (self.rows + self.vocab) * self.width * self.dtype.itemsize

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.width * self.vocab


CASES = {
    case.name: case
    for case in (
        Case(1024, 256, 32768),
        Case(1024, 256, 128256),
        Case(256, 512, 128256),
        Case(1024, 256, 128256, torch.bfloat16),
    )
}


@cache
def inputs(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    case = CASES[name]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(case.rows, case.width, generator=generator).to(case.dtype).requires_grad_()
    weight = (torch.randn(case.vocab, case.width, generator=generator) * case.width**-0.5).to(case.dtype)
    target = torch.randint(case.vocab, (case.rows,), generator=generator)
    return hidden, weight.requires_grad_(), target, torch.rand(case.rows, generator=generator)


Gradients = tuple[Tensor, ...]


def matmuls(name: str) -> Gradients:
    hidden, weight, _, _ = inputs(name)
    with torch.no_grad():
        logits = linear(hidden, weight)
        return logits @ weight, logits.t() @ hidden


def _through(name: str, loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Gradients:
    hidden, weight, target, cotangent = inputs(name)
    losses = loss(hidden, weight, target)
    return torch.autograd.grad(losses, (hidden, weight), cotangent.to(losses.dtype))


def ours(name: str) -> Gradients:
    return _through(name, lambda h, w, t: -linear_logprobs(h, w, t).logp)


def ours_entropy(name: str) -> Gradients:
    hidden, weight, target, cotangent = inputs(name)
    out = linear_logprobs(hidden, weight, target, return_entropy=True)
    return torch.autograd.grad([-out.logp, out.entropy], (hidden, weight), [cotangent, cotangent])


def head(name: str) -> Gradients:
    return _through(name, lambda h, w, t: cross_entropy(linear(h, w), t, reduction="none"))


def _fused(name: str, **chunks: int) -> Gradients:
    from torch.nn import LinearCrossEntropyOptions
    from torch.nn.functional import linear_cross_entropy

    options = LinearCrossEntropyOptions(**chunks)
    return _through(name, lambda h, w, t: linear_cross_entropy(h, w, t, reduction="none", options=options))


def torch_fused(name: str) -> Gradients:
    return _fused(name)


def torch_fused_256(name: str) -> Gradients:
    return _fused(name, batch_chunk_size=256)


IMPLEMENTATIONS: dict[str, Callable[[str], Gradients]] = {
    "matmuls": matmuls,
    "arcore": ours,
    "arcore_entropy": ours_entropy,
    "linear+cross_entropy": head,
    "linear_cross_entropy_256": torch_fused_256,
    "linear_cross_entropy_auto": torch_fused,
}

MOST_TIME = 1.6  # of the bare matmuls
MOST_MEMORY = 0.05  # of the whole logits, at the large vocabulary


def _check(implementation: str, name: str) -> None:
    """The gradient of 200 columns of the weight, and that of hidden, against float64."""
    if implementation in ("matmuls", "arcore_entropy"):
        return
    hidden, weight, target, cotangent = inputs(name)
    grad_hidden, grad_weight = IMPLEMENTATIONS[implementation](name)
    low = hidden.dtype != torch.float32
    rows = slice(0, 16)
    logits = linear(hidden[rows].detach().double(), weight.detach().double())
    dz = logits.softmax(-1)
    dz[torch.arange(16), target[rows]] -= 1
    dz *= cotangent[rows, None]
    expected = dz @ weight.detach().double()
    error = (grad_hidden[rows] - expected).abs().max() / expected.abs().max()
    assert error <= (5e-2 if low else 1e-4), f"{implementation}: hidden's gradient is off by {error:.1e}"
    lse = linear(hidden.detach().float(), weight.detach().float()).logsumexp(-1).double()
    columns = target[:200]
    some = (linear(hidden.detach().double(), weight.detach().double()[columns]) - lse[:, None]).exp()
    some = (some - (target[:, None] == columns[None]).double()) * cotangent[:, None]
    expected = some.t() @ hidden.detach().double()
    error = (grad_weight[columns] - expected).abs().max() / expected.abs().max()
    assert error <= (5e-2 if low else 1e-4), f"{implementation}: weight's gradient is off by {error:.1e}"


def _peak_in_subprocess(name: str, implementation: str) -> int:
    path = Path(__file__).resolve()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(path.parents[1]), *sys.path])}
    run = subprocess.run(
        [sys.executable, str(path), name, implementation],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return int(run.stdout)


def floors_report(records: list[dict]) -> list[str]:
    own = [r for r in records if r.get("op") == "linear_logprobs"]
    bare = {r["case"]: r["seconds"] for r in own if r["impl"] == "matmuls"}
    lines = []
    for r in own:
        case = CASES[r["case"]]
        if r["impl"] == "matmuls":
            rate = 3 * case.flops / r["seconds"] / 1e9
            lines.append(f"      {case.name} matmuls: {r['seconds'] * 1e3:.0f} ms, {rate:.0f} GFLOP/s")
            continue
        mine = r["impl"].startswith("arcore")
        ratio = r["seconds"] / bare[r["case"]] if r["case"] in bare else float("nan")
        share = (r["peak_bytes"] - case.gradient_bytes) / case.logits_bytes
        good = ratio <= MOST_TIME and (case.vocab < 100000 or share <= MOST_MEMORY)
        lines.append(
            f"{('ok   ' if good else 'BELOW') if mine else '     '} {case.name} {r['impl']}: "
            f"{r['seconds'] * 1e3:.0f} ms = {ratio:.2f} x matmuls, extra memory {share:.1%} of the logits"
            + (f" (at most {MOST_TIME:g} and {MOST_MEMORY:.0%})" if mine and case.vocab > 100000 else "")
        )
    return lines


def bearable(name: str, implementation: str) -> bool:
    """Chunks of PyTorch's own choice are of one row at the large vocabulary: eight seconds and more per call. A type
    that torch multiplies in plain loops on this processor takes its products minutes."""
    if implementation.startswith("linear_cross_entropy") and not hasattr(
        torch.nn, "LinearCrossEntropyOptions"
    ):
        return False  # before torch 2.13
    if not implementation.startswith("arcore") and CASES[name].dtype in slow_halves():
        return False
    return implementation != "linear_cross_entropy_auto" or CASES[name].vocab < 100000


PAIRS = [(n, i) for n in CASES for i in IMPLEMENTATIONS if bearable(n, i)]


@pytest.mark.parametrize(("name", "impl"), PAIRS)
def bench_linear_logprobs(benchmark, name, impl):
    _check(impl, name)
    seconds = cpu_seconds(lambda: IMPLEMENTATIONS[impl](name), rounds=ROUNDS)
    benchmark.extra_info.update(
        op="linear_logprobs",
        case=name,
        direction="forward+backward",
        impl=impl,
        seconds=seconds,
        dtype=str(CASES[name].dtype).removeprefix("torch."),
    )
    if impl != "matmuls":
        benchmark.extra_info["peak_bytes"] = _peak_in_subprocess(name, impl)
    benchmark.group = f"linear_logprobs {name}"
    benchmark.pedantic(lambda: IMPLEMENTATIONS[impl](name), rounds=1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run = IMPLEMENTATIONS[sys.argv[2]]
    print(peak_extra_bytes(lambda: run(sys.argv[1])))
