"""The kernel against the float64 reference and against conv1d; layouts, threads, packed rows, directions."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from arcore.ops import causal_conv1d
from tests.causal_conv1d.cases import ALONG_TIME, call, check_against_reference, everything, make_case
from tests.isa import ISAS, run_under


@pytest.mark.parametrize("length", [0, 1, 2, 15, 17, 63, 65, 127, 255, 256, 257, 1000])
@pytest.mark.parametrize("initial", [False, True])
def test_odd_lengths(length, initial):
    check_against_reference(make_case(1, 17, length, initial=initial))


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 9, 31, 300])
@pytest.mark.parametrize("reverse", [False, True])
def test_widths(width, reverse):
    for activation in (None, "silu"):
        check_against_reference(
            make_case(2, 9, 270, width, initial=True, reverse=reverse, activation=activation)
        )


@pytest.mark.parametrize("dim", [1, 2, 15, 16, 17, 48, 130])
def test_channel_counts(dim):
    check_against_reference(make_case(2, dim, 20, bias=False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
def test_16_bit_storage(dtype, reverse):
    check_against_reference(make_case(2, 36, 300, initial=True, reverse=reverse).to(dtype))


def test_weights_may_stay_in_float32():
    # What autocast and 16-bit activations with fp32 parameters pass.
    case = make_case(2, 36, 70, initial=True)
    check_against_reference(case.map(lambda n, t: t.bfloat16() if n in (*ALONG_TIME, "grad_final") else t))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("width", [2, 4, 9])
def test_sequence_ids(reverse, width):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(-1, 3, (3, 100), generator=generator).repeat_interleave(3, dim=1).int()
    ids[1] = -1
    ids[2] = 0
    for initial in (False, True):
        check_against_reference(make_case(3, 18, 300, width, ids=ids, initial=initial, reverse=reverse))


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 0, 5), (2, 4, 0)])
def test_empty_tensors(shape):
    check_against_reference(make_case(*shape, initial=True))


def test_equals_conv1d():
    case = make_case(2, 20, 300)
    padded = F.conv1d(case.x, case.weight[:, None], case.bias, padding=3, groups=20)[..., :300]
    torch.testing.assert_close(
        causal_conv1d(case.x, case.weight, case.bias, activation="silu"), F.silu(padded), rtol=1e-5, atol=1e-6
    )


def test_packed_row_equals_separate_rows():
    lengths = [1, 2, 3, 40, 17]
    ids = torch.arange(5).repeat_interleave(torch.tensor(lengths))[None].int()
    case = make_case(1, 20, sum(lengths), ids=ids)
    packed = everything(case)
    start = 0
    for length in lengths:
        keep = slice(start, start + length)
        alone = case.map(lambda n, t, keep=keep: t[..., keep] if n in ALONG_TIME else t)
        last = start + length == sum(lengths)
        alone = replace(alone, seq_idx=None, grad_final=case.grad_final if last else torch.zeros(1, 20, 3))
        result = everything(alone)
        assert torch.equal(result["out"], packed["out"][..., keep])
        assert torch.equal(result["x"], packed["x"][..., keep])
        if last:
            assert torch.equal(result["final"], packed["final"])
        start += length


def test_left_padding_equals_the_row_alone():
    short = make_case(1, 20, 50, initial=True)
    ids = torch.zeros(1, 71, dtype=torch.int32)
    ids[:, :21] = -1
    long = short.map(lambda n, t: F.pad(t, (21, 0), value=float("nan")) if n in ALONG_TIME else t)
    # Carried inputs belong to the first real token; they have no place next to it when padding stands between.
    expected = everything(replace(short, initial_states=None))
    padded = everything(replace(long, seq_idx=ids, initial_states=None))
    assert torch.equal(padded["out"][..., 21:], expected["out"])
    assert torch.equal(padded["out"][..., :21], torch.zeros(1, 20, 21))
    assert torch.equal(padded["final"], expected["final"])
    assert torch.equal(padded["x"][..., 21:], expected["x"])
    assert torch.equal(padded["weight"], expected["weight"])


def test_two_parts_with_a_state_equal_the_whole():
    for cut in (1, 2, 3, 64, 256, 299):
        case = make_case(2, 20, 300, initial=True)
        whole = everything(case)
        leaves = {name: t.clone().requires_grad_() for name, t in case.floats().items()}
        x, weight, bias, initial = leaves.values()
        first, state = causal_conv1d(x[..., :cut], weight, bias, None, initial, True, None, "silu")
        rest, final = causal_conv1d(x[..., cut:], weight, bias, None, state, True, None, "silu")
        assert torch.equal(torch.cat([first, rest], dim=2), whole["out"])
        assert torch.equal(final, whole["final"])
        grads = torch.autograd.grad(
            [first, rest, final],
            list(leaves.values()),
            [case.grad_out[..., :cut], case.grad_out[..., cut:], case.grad_final],
        )
        for name, grad in zip(leaves, grads, strict=True):
            torch.testing.assert_close(grad, whole[name], rtol=1e-4, atol=1e-5)


def test_reverse_equals_flip():
    for length in (1, 64, 300):
        case = make_case(2, 20, length, initial=True)
        flipped = everything(case.map(lambda n, t: t.flip(-1) if n in ALONG_TIME else t))
        for name, value in everything(replace(case, reverse=True)).items():
            assert torch.equal(value.flip(-1) if name in ("x", "out") else value, flipped[name]), name


LAYOUTS = {
    "channel_last": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "sliced": lambda t: t.repeat_interleave(3, dim=-1)[..., ::3],
    "offset": lambda t: F.pad(t, (3, 2, 1, 4))[..., 1:-4, 3:-2],
    "batch_inner": lambda t: t.movedim(0, 1).contiguous().movedim(0, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layout_changes_no_bit(layout, dtype):
    for reverse in (False, True):
        case = make_case(2, 36, 300, reverse=reverse, initial=True).to(dtype)
        other = case.map(lambda n, t: LAYOUTS[layout](t) if n in (*ALONG_TIME, "initial_states") else t)
        expected = everything(case)
        for name, value in everything(other).items():
            assert torch.equal(value, expected[name]), name


def test_output_has_the_layout_of_the_input():
    case = make_case(2, 36, 40)
    out, _ = call(causal_conv1d, case.map(lambda n, t: LAYOUTS["channel_last"](t) if n == "x" else t))
    assert out.stride() == (36 * 40, 1, 36)


@pytest.fixture
def restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_threads_and_batch_mates_change_no_bit(restore_threads):
    # Enough work that the op does use several threads.
    case = make_case(3, 300, 900, initial=True)
    torch.set_num_threads(1)
    expected = everything(case)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        for name, value in everything(case).items():
            assert torch.equal(value, expected[name]), name
    per_row = (*ALONG_TIME, "initial_states", "grad_final")
    for i in range(3):
        alone = everything(case.map(lambda n, t, i=i: t[i : i + 1] if n in per_row else t))
        for name in ("out", "final", "x", "initial_states"):
            assert torch.equal(alone[name][0], expected[name][i]), name


def test_nan_reaches_the_outputs_that_read_it():
    case = make_case(2, 20, 70)
    case.x[1, 7, 30] = float("nan")
    out, _ = call(causal_conv1d, case)
    bad = torch.zeros(2, 20, 70, dtype=torch.bool)
    bad[1, 7, 30:34] = True
    assert torch.equal(out.isnan(), bad)


def test_activation_far_out():
    x = torch.tensor([[[-1e4, -104.0, -88.5, 0.0, 88.5, 1e4, -torch.inf, torch.inf]]])
    out = causal_conv1d(x, torch.ones(1, 1), activation="silu")
    torch.testing.assert_close(out[..., :6], F.silu(x[..., :6]), rtol=1e-6, atol=1e-30)
    assert out[0, 0, 7] == torch.inf


def test_gradient_with_stride_zero_and_through_one_result():
    case = make_case(2, 20, 70, initial=True)
    x = case.x.clone().requires_grad_()
    out, final = causal_conv1d(x, case.weight, None, None, case.initial_states, True, None, "silu")
    expanded = torch.autograd.grad(out.sum(), x, retain_graph=True)[0]
    assert torch.equal(expanded, torch.autograd.grad(out, x, torch.ones_like(out), retain_graph=True)[0])
    only_final = torch.autograd.grad(final.sum(), x, retain_graph=True)[0]
    assert torch.equal(only_final[..., -3:], torch.ones(2, 20, 3))
    assert not only_final[..., :-3].any()
    torch.testing.assert_close(torch.autograd.grad(out.sum() + final.sum(), x)[0], expanded + only_final)


def test_final_states_out_receives_the_states():
    case = make_case(2, 20, 70)
    into = torch.empty(2, 20, 3)
    out, final = causal_conv1d(case.x, case.weight, return_final_states=True, final_states_out=into)
    assert final is into
    assert torch.equal(into, case.x[..., -3:])
    assert torch.equal(out, causal_conv1d(case.x, case.weight))


SCRIPT = """
import torch
from tests.causal_conv1d.cases import check_against_reference, make_case
print(torch.ops.arcore.cpu_isa())
ids = torch.arange(10).repeat_interleave(30)[None].expand(2, -1).int()
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    check_against_reference(make_case(2, 37, 300, initial=True, ids=ids).to(dtype))
    check_against_reference(make_case(1, 33, 70, 9, reverse=True).to(dtype))
"""


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    run_under(isa, SCRIPT)


@pytest.mark.slow
def test_random_cases():
    chosen = random.Random(0)
    for seed in range(300):
        batch, length = chosen.randrange(1, 4), chosen.choice([1, 2, 17, 64, 129, 300, 530])
        ids = torch.randint(-1, 2, (batch, length // 4 + 1)).repeat_interleave(4, 1)[:, :length].int()
        case = make_case(
            batch,
            chosen.choice([1, 2, 6, 18, 36, 150]),
            length,
            chosen.choice([1, 2, 3, 4, 5, 9, 270]),
            bias=chosen.random() < 0.5,
            initial=chosen.random() < 0.5,
            activation=chosen.choice([None, "silu"]),
            ids=ids if chosen.random() < 0.5 else None,
            reverse=chosen.random() < 0.5,
            seed=seed,
        )
        layout = LAYOUTS[chosen.choice(list(LAYOUTS))]
        check_against_reference(case.map(lambda n, t, f=layout: f(t) if n in ALONG_TIME else t))
