"""The reference: against a loop over numbers, and gradcheck in float64."""

from __future__ import annotations

import math

import pytest
import torch

from arcore.ops import reference_selective_scan
from tests.selective_scan.cases import call, make_case


@pytest.mark.parametrize("reverse", [False, True])
def test_against_a_loop_over_numbers(reverse):
    case = make_case(2, 4, 7, 3, b="2", c="constant", initial=True, reverse=reverse).to(torch.float64)
    out, last = call(reference_selective_scan, case)
    for b in range(2):
        for d in range(4):
            h = [case.initial_state[b, d, n].item() for n in range(3)]
            for t in range(6, -1, -1) if reverse else range(7):
                dt = math.log1p(math.exp((case.delta[b, d, t] + case.delta_bias[d]).item()))
                u, y = case.u[b, d, t].item(), 0.0
                for n in range(3):
                    h[n] = math.exp(dt * case.A[d, n].item()) * h[n] + dt * u * case.B[b, d // 2, n, t].item()
                    y += case.C[d, n].item() * h[n]
                z = case.z[b, d, t].item()
                expected = (y + case.D[d].item() * u) * z / (1 + math.exp(-z))
                assert out[b, d, t].item() == pytest.approx(expected, rel=1e-12)
            assert last[b, d].tolist() == pytest.approx(h, rel=1e-12)


IDS = torch.tensor([[0, 0, 1, -1, 1], [-1, 3, 3, 3, 3]], dtype=torch.int32)


@pytest.mark.parametrize(
    "options",
    [
        {"initial": True},
        {"b": "constant", "c": "2", "reverse": True, "softplus": False},
        {"lengths": [2, 0, 3], "initial": True},
        {"ids": IDS, "initial": True},
    ],
    ids=str,
)
def test_gradcheck(options):
    case = make_case(2, 2, 5, 2, **options).to(torch.float64)
    names = list(case.floats())

    def f(*tensors):
        from dataclasses import replace

        return call(reference_selective_scan, replace(case, **dict(zip(names, tensors, strict=True))))

    assert torch.autograd.gradcheck(f, [t.requires_grad_() for t in case.floats().values()])
