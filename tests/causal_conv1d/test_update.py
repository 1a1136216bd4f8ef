"""New tokens against a state that is changed in place."""

from __future__ import annotations

import pytest
import torch

from arcore.ops import causal_conv1d, causal_conv1d_update, reference_causal_conv1d_update
from tests.causal_conv1d.cases import make_case
from tests.isa import ISAS, run_under


def both(x, state, *args):
    """Ours and the reference on copies of the state: outputs and states."""
    ours, theirs = state.clone(), state.clone()
    return (
        causal_conv1d_update(x, ours, *args),
        ours,
        reference_causal_conv1d_update(x, theirs, *args),
        theirs,
    )


@pytest.mark.parametrize("width", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("spare", [0, 1, 5])
@pytest.mark.parametrize("steps", [1, 2, 6])
def test_shift_and_ring(width, spare, steps):
    if width + spare == 1:
        pytest.skip("no state")
    generator = torch.Generator().manual_seed(width * 100 + spare * 10 + steps)
    x = torch.randn(3, 21, steps, generator=generator)
    state = torch.randn(3, 21, width - 1 + spare, generator=generator)
    case = make_case(3, 21, 1, width)
    for places in (None, torch.tensor([0, 4, 1000]), torch.tensor([3, 2, 1], dtype=torch.int32)):
        out, after, expected, after_expected = both(x, state, case.weight, case.bias, "silu", places)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(after, after_expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_storage(dtype):
    case = make_case(3, 21, 1).to(dtype)
    state = torch.randn(3, 21, 3).to(dtype)
    out, after, expected, after_expected = both(case.x[..., 0], state, case.weight, case.bias, "silu")
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected.float(), rtol=2**-7, atol=1e-5)
    assert torch.equal(after, after_expected)


def test_steps_one_by_one_equal_the_convolution():
    case = make_case(2, 20, 40, initial=True)
    whole, final = causal_conv1d(
        case.x, case.weight, case.bias, None, case.initial_states, True, None, "silu"
    )
    state = case.initial_states.clone()
    steps = [causal_conv1d_update(x, state, case.weight, case.bias, "silu") for x in case.x.unbind(2)]
    torch.testing.assert_close(torch.stack(steps, dim=2), whole, rtol=1e-6, atol=1e-6)
    assert torch.equal(state, final)


def test_ring_equals_shift_step_by_step():
    case = make_case(2, 20, 40)
    shifted, ring = torch.zeros(2, 20, 5), torch.zeros(2, 20, 5)
    for t, x in enumerate(case.x.unbind(2)):
        a = causal_conv1d_update(x, shifted, case.weight, case.bias, "silu")
        b = causal_conv1d_update(x, ring, case.weight, case.bias, "silu", torch.full((2,), t))
        assert torch.equal(a, b)
    assert torch.equal(ring.roll(-40 % 5, 2), shifted)


def test_rows_are_picked_and_padding_is_left_alone():
    case = make_case(4, 20, 1)
    state = torch.randn(6, 20, 3)
    rows = torch.tensor([5, -1, 0, 2], dtype=torch.int32)
    out, after, expected, after_expected = both(
        case.x[..., 0], state, case.weight, case.bias, "silu", None, rows
    )
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(after, after_expected)
    assert torch.equal(out[1], torch.zeros(20))
    for untouched in (1, 3, 4):
        assert torch.equal(after[untouched], state[untouched])


def test_any_layout_of_state_and_input():
    case = make_case(2, 20, 3)
    state = torch.randn(2, 4, 20).transpose(1, 2)
    strided = state.clone(memory_format=torch.contiguous_format)
    x = case.x.transpose(1, 2).contiguous().transpose(1, 2)
    a = causal_conv1d_update(x, state, case.weight, case.bias)
    b = causal_conv1d_update(case.x, strided, case.weight, case.bias)
    assert torch.equal(a, b)
    assert torch.equal(state, strided)


def test_no_rows():
    case = make_case(0, 20, 1)
    assert causal_conv1d_update(case.x, torch.zeros(0, 20, 3), case.weight).shape == (0, 20, 1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(4)}, ValueError, r"expected x of shape \(batch, dim\)"),
        (
            {"conv_state": torch.zeros(2, 5, 2)},
            ValueError,
            r"expected conv_state of shape \(rows, dim=5, at least width - 1 = 3\)",
        ),
        (
            {"conv_state": torch.zeros(3, 5, 3)},
            ValueError,
            r"one row per row of x \(2\) but got 3; give conv_state_indices",
        ),
        ({"conv_state": None}, TypeError, "expected conv_state to be a tensor"),
        ({"weight": torch.zeros(4, 4)}, ValueError, r"expected weight of shape \(dim=5, width\)"),
        ({"bias": torch.zeros(4)}, ValueError, r"expected bias of shape \(dim=5,\)"),
        ({"activation": "gelu"}, ValueError, "expected activation None, 'silu' or 'swish' but got 'gelu'"),
        (
            {"cache_seqlens": torch.zeros(3, dtype=torch.int32)},
            ValueError,
            r"expected cache_seqlens int32 or int64 of shape \(batch=2,\)",
        ),
        (
            {"conv_state_indices": torch.zeros(2)},
            ValueError,
            "expected conv_state_indices int32 or int64 of shape",
        ),
        (
            {"x": torch.zeros(2, 5, dtype=torch.float64)},
            TypeError,
            "expected x of dtype float32, bfloat16 or float16",
        ),
    ],
)
def test_wrong_arguments(change, error, message):
    good = {"x": torch.zeros(2, 5), "conv_state": torch.zeros(2, 5, 3), "weight": torch.zeros(5, 4)}
    with pytest.raises(error, match=message):
        causal_conv1d_update(**{**good, **change})


def test_rows_and_positions_out_of_range():
    x, state, weight = torch.zeros(2, 5), torch.zeros(7, 5, 3), torch.zeros(5, 4)
    with pytest.raises(
        RuntimeError, match=r"expected conv_state_indices below the rows of conv_state \(7\) but got 9"
    ):
        causal_conv1d_update(x, state, weight, None, None, None, torch.tensor([0, 9]))
    with pytest.raises(RuntimeError, match="expected cache_seqlens >= 0 but got -2"):
        causal_conv1d_update(x, state[:2], weight, None, None, torch.tensor([0, -2]))


def test_opcheck_and_compile():
    case = make_case(2, 6, 1)
    args = (case.x, torch.randn(2, 6, 3), case.weight, case.bias, None, None, True)
    torch.library.opcheck(torch.ops.arcore.causal_conv1d_update.default, args)

    def step(x, state):
        return causal_conv1d_update(x, state, case.weight, case.bias, "silu") * 2

    eager_state = torch.randn(2, 6, 3)
    compiled_state = eager_state.clone()
    expected = step(case.x[..., 0], eager_state)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(case.x[..., 0], compiled_state), expected)
    assert torch.equal(compiled_state, eager_state)


SCRIPT = """
import torch
from arcore.ops import causal_conv1d_update, reference_causal_conv1d_update
print(torch.ops.arcore.cpu_isa())
for dtype in (torch.float32, torch.bfloat16):
    x, state, weight = torch.randn(2, 37, 2).to(dtype), torch.randn(2, 37, 3).to(dtype), torch.randn(37, 4).to(dtype)
    other = state.clone()
    out = causal_conv1d_update(x, state, weight, None, "silu")
    expected = reference_causal_conv1d_update(x, other, weight, None, "silu")
    torch.testing.assert_close(out, expected, rtol=2**-7 if dtype is torch.bfloat16 else 1e-5, atol=1e-5)
    assert torch.equal(state, other)
"""


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    run_under(isa, SCRIPT)
