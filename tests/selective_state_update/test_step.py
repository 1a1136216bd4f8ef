"""One token against a state in memory: values, layouts, rows, the scan it belongs to, errors."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from arcore.ops import (
    causal_conv1d_update,
    reference_selective_state_update,
    selective_scan,
    selective_state_update,
)
from tests.isa import ISAS, run_under
from tests.selective_state_update.cases import check_against_reference, make_step


@pytest.mark.parametrize("d_state", [1, 2, 3, 8, 15, 16, 17, 33, 64, 128, 255, 256])
@pytest.mark.parametrize("dim", [1, 15, 16, 17, 130, 300])
def test_sizes(dim, d_state):
    check_against_reference(make_step(2, dim, d_state))


@pytest.mark.parametrize("absent", ["skip", "gate", "bias", "softplus"])
@pytest.mark.parametrize("heads", [None, 6])
def test_optional_arguments(absent, heads):
    check_against_reference(make_step(heads=heads, groups=2, **{absent: False}))


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("d_state", [16, 37, 128])
def test_heads_and_groups(groups, tied, d_state):
    check_against_reference(make_step(2, 64, d_state, 6, groups, tied=tied))


def test_one_number_per_head_equals_the_same_number_written_out():
    step = make_step(2, 64, 128, 6, tied=True)
    for ours, expected in zip(step.run(), step.map(lambda _, t: t.contiguous()).run(), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("d_state", [16, 19])
def test_16_bit_storage(dtype, d_state):
    step = make_step(d_state=d_state)
    check_against_reference(step.map(lambda _, t: t.to(dtype)))
    # The usual mix: activations in 16 bits, state and parameters in 32.
    check_against_reference(step.map(lambda n, t: t.to(dtype) if n in ("x", "z", "B", "C", "dt") else t))


LAYOUTS = {
    "last_dims_swapped": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 1 else t,
    "sliced": lambda t: t.repeat_interleave(3, dim=-1)[..., ::3],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", [None, 6])
def test_layout_changes_no_bit(layout, heads):
    step = make_step(heads=heads)
    arguments = step.map(lambda n, t: LAYOUTS[layout](t) if n != "state" else t)
    for ours, expected in zip(arguments.run(), step.run(), strict=True):
        assert torch.equal(ours, expected)
    strided = LAYOUTS[layout](step.state)
    assert strided.stride() != step.state.stride()
    out = selective_state_update(strided, *(getattr(step, f.name) for f in fields(step)[1:]))
    expected_out, expected_state = step.run()
    assert torch.equal(out, expected_out)
    assert torch.equal(strided, expected_state)


def test_steps_one_by_one_equal_the_scan():
    batch, dim, length, n = 2, 20, 70, 16
    u, delta, z = (torch.randn(batch, dim, length) for _ in range(3))
    a, b, c = -torch.rand(dim, n), torch.randn(batch, n, length), torch.randn(batch, n, length)
    d, bias = torch.randn(dim), torch.randn(dim)
    scanned, last = selective_scan(u, delta, a, b, c, d, z, bias, True, True)
    state = torch.zeros(batch, dim, n)
    steps = [
        selective_state_update(
            state, u[..., t], delta[..., t], a, b[..., t], c[..., t], d, z[..., t], bias, dt_softplus=True
        )
        for t in range(length)
    ]
    torch.testing.assert_close(torch.stack(steps, dim=2), scanned, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-6)


def test_rows_are_picked_and_padding_is_left_alone():
    step = make_step(4)
    slots = torch.randn(7, 20, 16)
    picked = replace(step, state=slots, state_batch_indices=torch.tensor([5, -1, 0, 2], dtype=torch.int32))
    check_against_reference(picked)
    out, state = picked.run()
    assert torch.equal(out[1], torch.zeros(20))
    for untouched in (1, 3, 4, 6):
        assert torch.equal(state[untouched], slots[untouched])


def test_rows_named_twice_are_updated_twice():
    check_against_reference(
        replace(make_step(3), state=torch.randn(2, 20, 16), state_batch_indices=torch.tensor([1, 1, 1]))
    )


def test_any_number_can_mark_padding():
    step = replace(make_step(2), state=torch.randn(9, 20, 16), pad_slot_id=8)
    _, state = replace(step, state_batch_indices=torch.tensor([8, 3])).run()
    assert torch.equal(state[8], step.state[8])


@pytest.fixture
def restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_threads_and_batch_mates_change_no_bit(restore_threads):
    step = make_step(5, 1500, 64)
    torch.set_num_threads(1)
    expected = step.run()
    torch.set_num_threads(3)
    for ours, one in zip(step.run(), expected, strict=True):
        assert torch.equal(ours, one)
    shared = ("A", "D", "dt_bias")
    alone = step.map(lambda n, t: t if n in shared else t[2:3]).run()
    for ours, together in zip(alone, expected, strict=True):
        assert torch.equal(ours[0], together[2])


def test_nan_stays_in_its_row_and_channel():
    step = make_step()
    step.x[1, 7] = float("nan")
    out, state = step.run()
    assert out.isnan().nonzero().tolist() == [[1, 7]]
    assert state.isnan().sum() == 16
    assert state[1, 7].isnan().all()


@pytest.mark.parametrize("shape", [(0, 20, 16), (3, 0, 16)])
def test_empty_tensors(shape):
    check_against_reference(make_step(*shape))


def test_opcheck():
    for step in (make_step(), make_step(heads=4, tied=True)):
        arguments = [getattr(step, x.name) for x in fields(step)]
        torch.library.opcheck(torch.ops.arcore.selective_state_update.default, tuple(arguments))


def test_compile_fullgraph():
    step = make_step()
    weight = torch.randn(20, 4)

    def decode(conv_state, state):
        x = causal_conv1d_update(step.x, conv_state, weight, None, "silu")
        return selective_state_update(state, x, step.dt, step.A, step.B, step.C, step.D) * 2

    results = []
    for f in (decode, torch.compile(decode, fullgraph=True, backend="aot_eager")):
        conv_state, state = torch.ones(3, 20, 3), step.state.clone()
        results.append((f(conv_state, state), conv_state, state))
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


WRONG = {
    "state_dims": (
        {"state": torch.zeros(4, 3)},
        ValueError,
        r"expected state of shape \(rows, dim, d_state\)",
    ),
    "d_state": (
        {"state": torch.zeros(2, 4, 300)},
        ValueError,
        "expected state with d_state 1 to 256 but got 300",
    ),
    "rows": (
        {"state": torch.zeros(3, 4, 3)},
        ValueError,
        r"one row per row of x \(2\) but got 3; give state_batch",
    ),
    "x": (
        {"x": torch.zeros(2, 5)},
        ValueError,
        r"expected x of shape \(batch, 4\) or with several tokens \(batch, steps, 4\) but got \(2, 5\)",
    ),
    "dt": ({"dt": torch.zeros(2, 1)}, ValueError, r"expected dt of shape \(2, 4\) but got \(2, 1\)"),
    "A": ({"A": torch.zeros(4)}, ValueError, r"expected A of shape \(4, 3\) but got \(4,\)"),
    "complex": (
        {"A": torch.zeros(4, 3, dtype=torch.complex64)},
        TypeError,
        "expected a real A but got complex64",
    ),
    "B": ({"B": torch.zeros(2, 4)}, ValueError, r"expected B of shape \(2, 3\)"),
    "C": ({"C": torch.zeros(1, 3)}, ValueError, r"expected C of shape \(2, 3\)"),
    "D": ({"D": torch.zeros(4, 1)}, ValueError, r"expected D of shape \(4,\)"),
    "z": ({"z": torch.zeros(2, 3)}, ValueError, r"expected z of shape \(2, 4\)"),
    "dt_bias": ({"dt_bias": torch.zeros(3)}, ValueError, r"expected dt_bias of shape \(4,\)"),
    "indices": (
        {"state_batch_indices": torch.zeros(3, dtype=torch.int64)},
        ValueError,
        r"expected state_batch_indices of shape \(2,\)",
    ),
    "index_dtype": (
        {"state_batch_indices": torch.zeros(2)},
        ValueError,
        "expected state_batch_indices int32 or int64",
    ),
    "index_range": (
        {"state_batch_indices": torch.tensor([0, 7])},
        RuntimeError,
        "expected state_batch_indices from 0 to 1, or negative or pad_slot_id=-1 for padding, but got 7",
    ),
    "no_tensor": ({"B": None}, TypeError, "expected B to be a tensor but got NoneType"),
    "device": (
        {"C": torch.zeros(2, 3, device="meta")},
        ValueError,
        "expected C on the device of state, cpu, but got meta",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("f", [selective_state_update, reference_selective_state_update])
def test_wrong_arguments(wrong, f):
    change, error, message = WRONG[wrong]
    with pytest.raises(error, match=message):
        replace(make_step(2, 4, 3), **change).run(f)


def test_groups_must_divide_the_heads():
    with pytest.raises(ValueError, match="expected B with groups that divide the 6 heads but got 4"):
        make_step(heads=6, groups=4).run()


def test_float64_points_to_the_reference():
    with pytest.raises(TypeError, match="for float64 call reference_selective_state_update"):
        make_step().map(lambda _, t: t.double()).run()


def test_the_op_itself_checks_too():
    step = make_step(2, 4, 3)
    with pytest.raises(RuntimeError, match=r"arcore::selective_state_update: expected A of shape \(4, 3\)"):
        torch.ops.arcore.selective_state_update(
            *(step.state, step.x, step.dt, step.A[:3], step.B, step.C, None, None, None, True, None, -1)
        )


SCRIPT = """
import torch
from tests.selective_state_update.cases import check_against_reference, make_step
print(torch.ops.arcore.cpu_isa())
for dtype in (torch.float32, torch.bfloat16):
    check_against_reference(make_step(2, 37, 16).map(lambda _, t: t.to(dtype)))
    check_against_reference(make_step(2, 37, 19, 4, 2, tied=True).map(lambda _, t: t.to(dtype)))
"""


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    run_under(isa, SCRIPT)
