"""One clear sentence per mistake: the argument, what was expected, what came."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from arcore.ops import reference_selective_scan, selective_scan
from tests.selective_scan.cases import call, make_case

WRONG = {
    "u_dims": (
        {"u": torch.zeros(4, 5)},
        ValueError,
        r"expected u of shape \(batch, dim, length\) but got \(4, 5\)",
    ),
    "delta": (
        {"delta": torch.zeros(2, 4, 6)},
        ValueError,
        r"expected delta of u's shape \(2, 4, 5\) but got \(2, 4, 6\)",
    ),
    "z": ({"z": torch.zeros(2, 5, 4)}, ValueError, r"expected z of u's shape"),
    "A": ({"A": torch.zeros(3, 4)}, ValueError, r"expected A of shape \(dim=4, d_state\) but got \(3, 4\)"),
    "state": ({"A": torch.zeros(4, 300)}, ValueError, r"but got \(4, 300\); d_state must be 1 to 256"),
    "complex": (
        {"A": torch.zeros(4, 3, dtype=torch.complex64)},
        TypeError,
        "expected a real A but got complex64",
    ),
    "B": (
        {"B": torch.zeros(2, 3, 6)},
        ValueError,
        r"expected B of shape \(dim=4, d_state=3\), .* but got \(2, 3, 6\)",
    ),
    "groups": ({"C": torch.zeros(2, 3, 3, 5)}, ValueError, "groups that divide dim"),
    "D": ({"D": torch.zeros(5)}, ValueError, r"expected D of shape \(dim=4,\) but got \(5,\)"),
    "bias": ({"delta_bias": torch.zeros(4, 1)}, ValueError, r"expected delta_bias of shape \(dim=4,\)"),
    "initial": (
        {"initial_state": torch.zeros(1, 4, 3)},
        ValueError,
        r"expected initial_state of shape \(2, dim=4, d_state=3\)",
    ),
    "both": (
        {"cu_seqlens": torch.tensor([0, 5]), "seq_idx": torch.zeros(2, 5, dtype=torch.int32)},
        ValueError,
        "expected cu_seqlens or seq_idx but got both",
    ),
    "packed_batch": (
        {"cu_seqlens": torch.tensor([0, 5])},
        ValueError,
        "expected batch 1 with cu_seqlens .* but got 2",
    ),
    "cu_dtype": ({"cu_seqlens": torch.tensor([0.0, 5.0])}, ValueError, "expected cu_seqlens int32 or int64"),
    "ids_dtype": (
        {"seq_idx": torch.zeros(2, 5)},
        ValueError,
        r"expected seq_idx int32 of shape .* but got float32",
    ),
    "device": (
        {"delta": torch.zeros(2, 4, 5, device="meta")},
        ValueError,
        "expected delta on the device of u, cpu, but got meta",
    ),
    "no_tensor": ({"B": 3.0}, TypeError, "expected B to be a tensor but got float"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("f", [selective_scan, reference_selective_scan])
def test_wrong_arguments(wrong, f):
    change, error, message = WRONG[wrong]
    with pytest.raises(error, match=message):
        call(f, replace(make_case(2, 4, 5, 3), **change))


def test_float64_points_to_the_reference():
    with pytest.raises(TypeError, match=r"for float64 .* call reference_selective_scan"):
        call(selective_scan, make_case(2, 4, 5, 3).to(torch.float64))


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ([1, 5], "expected cu_seqlens to run from 0 to the length 5 but it runs from 1 to 5"),
        ([0, 4], "but it runs from 0 to 4"),
        ([0, 4, 2, 5], "expected cu_seqlens not to decrease but entry 2 is 2 after 4"),
    ],
)
def test_wrong_boundaries(bounds, message):
    case = make_case(1, 4, 5, 3)
    with pytest.raises(RuntimeError, match=message):
        call(selective_scan, replace(case, cu_seqlens=torch.tensor(bounds)))


def test_the_op_itself_checks_too():
    case = make_case(2, 4, 5, 3)
    with pytest.raises(RuntimeError, match=r"arcore::selective_scan: expected delta of shape \(2, 4, 5\)"):
        torch.ops.arcore.selective_scan(
            *(case.u, case.delta[..., 1:], case.A, case.B, case.C),
            *(None, None, None, None, None, None, False, False, False),
        )
