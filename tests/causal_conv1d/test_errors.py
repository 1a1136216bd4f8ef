"""One clear sentence per mistake: the argument, what was expected, what came."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from arcore.ops import causal_conv1d, reference_causal_conv1d
from tests.causal_conv1d.cases import call, make_case

WRONG = {
    "x_dims": (
        {"x": torch.zeros(4, 5)},
        ValueError,
        r"expected x of shape \(batch, dim, length\) but got \(4, 5\)",
    ),
    "x_none": ({"x": None}, TypeError, "expected x to be a tensor but got NoneType"),
    "weight": (
        {"weight": torch.zeros(4, 1, 3)},
        ValueError,
        r"expected weight of shape \(dim=4, width\) but got \(4, 1, 3\); a Conv1d's weight .* needs .squeeze\(1\)",
    ),
    "no_taps": ({"weight": torch.zeros(4, 0)}, ValueError, r"expected weight of shape \(dim=4, width\)"),
    "bias": ({"bias": torch.zeros(4, 1)}, ValueError, r"expected bias of shape \(dim=4,\) but got \(4, 1\)"),
    "bias_number": ({"bias": 1.0}, TypeError, "expected bias to be a tensor or None but got float"),
    "initial": (
        {"initial_states": torch.zeros(2, 4, 4)},
        ValueError,
        r"expected initial_states of shape \(batch=2, dim=4, width - 1 = 3\) but got \(2, 4, 4\)",
    ),
    "ids": (
        {"seq_idx": torch.zeros(2, 5)},
        ValueError,
        r"expected seq_idx int32 of shape \(batch=2, length=5\) but got float32 \(2, 5\)",
    ),
    "activation": (
        {"activation": "relu"},
        ValueError,
        "expected activation None, 'silu' or 'swish' but got 'relu'",
    ),
    "device": (
        {"weight": torch.zeros(4, 4, device="meta")},
        ValueError,
        "expected weight on the device of x, cpu, but got meta",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("f", [causal_conv1d, reference_causal_conv1d])
def test_wrong_arguments(wrong, f):
    change, error, message = WRONG[wrong]
    with pytest.raises(error, match=message):
        call(f, replace(make_case(2, 4, 5), **change))


def test_float64_points_to_the_reference():
    with pytest.raises(TypeError, match=r"for float64 .* call reference_causal_conv1d"):
        call(causal_conv1d, make_case(2, 4, 5).to(torch.float64))


def test_final_states_out_on_another_device():
    x, weight = torch.randn(2, 8, 9), torch.randn(8, 4)
    message = (
        r"expected final_states_out on the device of x, cpu, but got meta; move it with final_states_out.to"
    )
    with pytest.raises(ValueError, match=message):
        causal_conv1d(x, weight, final_states_out=torch.empty(2, 8, 3, device="meta"))


def test_final_states_out_of_wrong_shape():
    case = make_case(2, 4, 5)
    with pytest.raises(
        ValueError, match=r"expected final_states_out of shape \(2, 4, 3\) but got \(2, 4, 4\)"
    ):
        causal_conv1d(case.x, case.weight, final_states_out=torch.zeros(2, 4, 4))


def test_the_op_itself_checks_too():
    case = make_case(2, 4, 5)
    with pytest.raises(
        RuntimeError, match=r"arcore::causal_conv1d: expected weight of shape \(dim=4, width\)"
    ):
        torch.ops.arcore.causal_conv1d(case.x, case.weight[1:], None, None, None, True, False)
