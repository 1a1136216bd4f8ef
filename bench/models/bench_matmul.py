"""Float32 products by oneDNN and by the BLAS of torch: a linear layer of 1024 to 4096, forward and backward, by rows.

`arcore.float32_matmul` chooses between the two. One thread; seconds of process CPU time.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from measure import cpu_seconds

import arcore
from arcore.matmul import resolve, why_not

ROWS = (2, 8, 32, 128, 680)


def floors_report(records: list[dict[str, Any]]) -> list[str]:
    found = {(r["case"], r["impl"]): r["seconds"] for r in records if r.get("op") == "float32_matmul"}
    lines = [f"'auto' means {resolve('auto')} on this processor"]
    for case in dict.fromkeys(case for case, _ in found):
        if (case, "onednn") in found and (case, "torch") in found:
            ours, theirs = found[case, "onednn"], found[case, "torch"]
            lines.append(
                f"{case}: {theirs * 1e3:.3f} ms by torch, {ours * 1e3:.3f} by oneDNN, {theirs / ours:.2f} x"
            )
    return lines


@pytest.mark.parametrize("backend", ["torch", "onednn"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("rows", ROWS)
def bench_linear(benchmark: Any, backend: Any, backward: bool, rows: int) -> None:
    if backend == "onednn" and (reason := why_not()):
        pytest.skip(reason)
    layer = torch.nn.Linear(1024, 4096)
    x = torch.randn(rows, 1024, requires_grad=True)

    def run() -> None:
        with torch.set_grad_enabled(backward):
            y = layer(x)
            if backward:
                torch.autograd.grad(y, [x, *layer.parameters()], y)

    with arcore.float32_matmul(backend):
        run()
        case = f"linear 1024-4096, {rows} rows, {'forward and backward' if backward else 'forward'}"
        benchmark.extra_info.update(op="float32_matmul", case=case, impl=backend, seconds=cpu_seconds(run))
        benchmark.pedantic(run, rounds=1)
