"""The kernel and its gradients against the float64 reference; states, packed rows, layouts, threads, directions."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from arcore.ops import reference_ssd, selective_scan, selective_state_update, ssd
from arcore.ops._ssd_backward import Inputs, backward
from tests.isa import BF16_UNITS, ISAS, run_on_bf16_unit, run_under
from tests.ssd.cases import ALONG_TIME, call, check_against_reference, everything, make_case

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def stored(case, dtype):
    """The usual mix: activations in 16 bits, parameters and states in 32."""
    return case.map(lambda n, t: t.to(dtype) if n in ALONG_TIME else t)


@BOTH
@pytest.mark.parametrize("length", [0, 1, 15, 17, 63, 64, 65, 127, 300])
@pytest.mark.parametrize("initial", [False, True])
def test_odd_lengths(length, initial, dtype):
    check_against_reference(stored(make_case(1, length, 3, 17, groups=1, initial=initial), dtype))


@pytest.mark.parametrize("dim", [1, 7, 16, 17, 33, 64, 100])
@pytest.mark.parametrize("state", [1, 5, 40, 128, 256])
@BOTH
def test_sizes(dim, state, dtype):
    check_against_reference(stored(make_case(1, 66, 2, dim, state, 1, initial=True), dtype))


@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (5, 1), (9, 1), (6, 2), (6, 3), (6, 6)])
@BOTH
def test_heads_and_groups(heads, groups, dtype):
    check_against_reference(stored(make_case(2, 70, heads, 20, 16, groups), dtype))


@pytest.mark.parametrize(
    "options",
    [
        {"skip": None},
        {"skip": "head"},
        {"gate": False},
        {"bias": False},
        {"softplus": False},
        {"limit": (0.2, 0.7)},
    ],
    ids=str,
)
@pytest.mark.parametrize("reverse", [False, True])
@BOTH
def test_optional_arguments(options, reverse, dtype):
    check_against_reference(stored(make_case(reverse=reverse, **options), dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_storage(dtype):
    check_against_reference(make_case(length=130, initial=True).to(dtype))
    check_against_reference(stored(make_case(length=130, initial=True), dtype))
    # Some factors in 16 bits, others not: float32's products.
    case = make_case(length=70)
    for names in (("x", "grad_out"), ("B",), ("dt", "z")):
        check_against_reference(case.map(lambda n, t, names=names: t.to(dtype) if n in names else t))


@pytest.mark.parametrize("lengths", [[5], [1, 64, 65, 3], [0, 0], [200, 0, 1, 130]])
@pytest.mark.parametrize("reverse", [False, True])
@BOTH
def test_packed_rows(lengths, reverse, dtype):
    for initial in (False, True):
        check_against_reference(stored(make_case(lengths=lengths, initial=initial, reverse=reverse), dtype))


@pytest.mark.parametrize("reverse", [False, True])
@BOTH
def test_sequence_ids(reverse, dtype):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(-1, 3, (3, 40), generator=generator).repeat_interleave(4, dim=1).int()
    ids[1] = -1
    ids[2] = 0
    for initial in (False, True):
        check_against_reference(stored(make_case(3, 160, ids=ids, initial=initial, reverse=reverse), dtype))


@BOTH
def test_padding_may_hold_nan(dtype):
    ids = torch.tensor([[-1, -1, 0, 0, 0, -1]], dtype=torch.int32)
    clean = stored(make_case(1, 6, ids=ids), dtype)
    case = clean.map(lambda _, t: t.clone())
    for name in ALONG_TIME:
        getattr(case, name)[:, ids[0] < 0] = float("nan")
    for (name, ours), expected in zip(everything(case).items(), everything(clean).values(), strict=True):
        assert torch.equal(ours, expected), name


@BOTH
def test_long_decays_stay_exact(dtype):
    # The sum of dt A reaches -2000 within a chunk; neighbours still see each other.
    case = make_case(1, 130, 2, 8, groups=1, softplus=False, bias=False)
    case = replace(case, A=torch.tensor([-30.0, -0.01]), dt=case.dt.abs() + 0.5)
    check_against_reference(stored(case, dtype))


def test_infinite_decay_forgets():
    case = make_case(1, 70, 4, 8, 4, 1, initial=True, softplus=False, bias=False, skip=None, gate=False)
    case = replace(case, dt=torch.ones_like(case.dt), A=torch.full_like(case.A, -float("inf")))
    out, last = call(ssd, case)
    torch.testing.assert_close(out, (case.B * case.C).sum(-1, keepdim=True) * case.x)
    torch.testing.assert_close(last, case.x[:, -1, ..., None] * case.B[:, -1, :, None])


@BOTH
def test_growing_states(dtype):
    check_against_reference(stored(make_case().map(lambda n, t: t.abs() * 0.1 if n == "A" else t), dtype))


def test_equals_selective_scan_with_everything_written_out():
    case = make_case(initial=True)
    out, last = call(ssd, case)
    per_channel, last_per_channel = selective_scan(
        case.x.flatten(2).transpose(1, 2),
        case.dt[..., None].expand(case.x.shape).flatten(2).transpose(1, 2),
        case.A.repeat_interleave(20)[:, None].expand(-1, 16),
        case.B.permute(0, 2, 3, 1),
        case.C.permute(0, 2, 3, 1),
        case.D.flatten(),
        case.z.flatten(2).transpose(1, 2),
        case.dt_bias.repeat_interleave(20),
        delta_softplus=True,
        return_last_state=True,
        initial_state=case.initial_state.flatten(1, 2),
    )
    torch.testing.assert_close(out, per_channel.transpose(1, 2).unflatten(2, (6, 20)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last, last_per_channel.unflatten(1, (6, 20)), rtol=1e-4, atol=1e-5)


def test_is_attention_with_decays_instead_of_a_softmax():
    # Section 7 of the paper: the same numbers as one masked product over the whole row.
    case = make_case(1, 100, 2, 8, 4, 1, skip=None, gate=False)
    dt = F.softplus(case.dt + case.dt_bias).double()
    total = (dt * case.A).cumsum(1).transpose(1, 2)  # [1, H, L]
    decay = (total[..., :, None] - total[..., None, :]).exp().tril()
    weights = torch.einsum("btgn,bsgn->bts", case.C.double(), case.B.double())[:, None] * decay
    expected = torch.einsum("bhts,bshp->bthp", weights, dt[..., None] * case.x)
    torch.testing.assert_close(call(ssd, case)[0], expected.float(), rtol=1e-4, atol=1e-5)


def test_two_parts_with_a_state_equal_the_whole():
    case = make_case(length=150, initial=True)
    whole = everything(case)
    for cut in (1, 64, 100, 149):
        leaves = {name: t.clone().requires_grad_() for name, t in case.floats().items()}
        first = {n: t[:, :cut] if n in ALONG_TIME else t for n, t in leaves.items()}
        rest = {n: t[:, cut:] if n in ALONG_TIME else t for n, t in leaves.items()}
        out, state = call(ssd, replace(case, **first))
        more, last = call(ssd, replace(case, **{**rest, "initial_state": state}))
        torch.testing.assert_close(torch.cat([out, more], dim=1), whole["out"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(last, whole["last_state"], rtol=1e-4, atol=1e-4)
        grads = torch.autograd.grad(
            [out, more, last],
            list(leaves.values()),
            [case.grad_out[:, :cut], case.grad_out[:, cut:], case.grad_last_state],
        )
        for name, grad in zip(leaves, grads, strict=True):
            scale = whole[name].abs().max().item()
            torch.testing.assert_close(grad, whole[name], rtol=1e-4, atol=1e-5 * scale)


def test_steps_one_by_one_equal_the_scan():
    case = make_case(initial=True, gate=False)
    out, last = call(ssd, case)
    state = case.initial_state.clone()
    a = case.A[:, None, None].expand(6, 20, 16)
    bias = case.dt_bias[:, None].expand(6, 20)
    for t in range(70):
        dt = case.dt[:, t, :, None].expand(2, 6, 20)
        y = selective_state_update(
            state, case.x[:, t], dt, a, case.B[:, t], case.C[:, t], case.D, None, bias, dt_softplus=True
        )
        torch.testing.assert_close(y, out[:, t], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-5)


@BOTH
def test_reverse_equals_flip(dtype):
    for length in (1, 64, 130):
        case = stored(make_case(length=length, initial=True), dtype)
        flipped = everything(case.map(lambda n, t: t.flip(1) if n in ALONG_TIME else t))
        for name, value in everything(replace(case, reverse=True)).items():
            mirrored = value.flip(1) if name in (*ALONG_TIME, "out") else value
            assert torch.equal(mirrored, flipped[name]), name


LAYOUTS = {
    "time_inner": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
    "sliced": lambda t: t.repeat_interleave(3, dim=-1)[..., ::3],
    "batch_inner": lambda t: t.movedim(0, 1).contiguous().movedim(0, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layout_changes_no_bit_of_the_forward(layout, dtype):
    for reverse in (False, True):
        case = make_case(length=131, reverse=reverse).to(dtype)
        other = case.map(lambda n, t: LAYOUTS[layout](t) if n in ALONG_TIME else t)
        for ours, expected in zip(call(ssd, other), call(ssd, case), strict=True):
            assert torch.equal(ours, expected)
        check_against_reference(other)


@pytest.fixture
def restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@BOTH
def test_threads_and_batch_mates_change_no_bit(dtype, restore_threads):
    case = stored(make_case(3, 300, 12, 64, 64, 1, initial=True), dtype)
    torch.set_num_threads(1)
    expected = everything(case)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        for name, ours in everything(case).items():
            assert torch.equal(ours, expected[name]), name
    per_row = (*ALONG_TIME, "initial_state", "grad_out", "grad_last_state")
    for i in range(3):
        alone = everything(case.map(lambda n, t, i=i: t[i : i + 1] if n in per_row else t))
        for name in ("out", "last_state", *ALONG_TIME, "initial_state"):
            if name in alone:
                assert torch.equal(alone[name][0], expected[name][i]), name


@BOTH
def test_rows_of_many_chunks(dtype):
    # Beyond 64 chunks the backward makes states again, a segment at a time.
    case = stored(make_case(1, 64 * 66 + 5, 2, 4, 4, 1, initial=True), dtype)
    ours = everything(case)
    again = backward(
        Inputs(*(getattr(case, n) for n in Inputs._fields)),
        *(case.grad_out, case.grad_last_state, None, None, True, 0.0, math.inf, False),
    )
    for name, grad in again.items():
        scale = grad.abs().max().item()
        atol = (1e-5 if dtype == torch.float32 else 2e-2) * scale
        torch.testing.assert_close(ours[name].float(), grad, rtol=0, atol=atol)


def test_no_heads():
    for f in (ssd, reference_ssd):
        x, b = torch.zeros(2, 5, 0, 4, requires_grad=True), torch.randn(2, 5, 2, 3, requires_grad=True)
        state = torch.zeros(2, 0, 4, 3, requires_grad=True)
        out, last = f(
            *(x, torch.zeros(2, 5, 0), torch.zeros(0), b, b, torch.zeros(0), x),
            return_last_state=True,
            initial_state=state,
        )
        assert (out.shape, last.shape) == ((2, 5, 0, 4), (2, 0, 4, 3))
        (out.sum() + last.sum()).backward()
        assert b.grad is None or not b.grad.any()


@BOTH
@pytest.mark.parametrize("a", [-1e30, -float("inf"), 50.0])
def test_decays_beyond_all_bounds_give_finite_gradients(a, dtype):
    case = make_case(1, 70, 2, 4, 4, 1, softplus=False, bias=False)
    step = torch.full_like(case.dt, 0.5 if a < 0 else 1e-2)
    case = stored(replace(case, A=torch.full_like(case.A, a), dt=step), dtype)
    ours = everything(case)
    for name, value in ours.items():
        assert value.isfinite().all(), name
    if a < 0:  # each step forgets all before it: what is left is its own
        own = (case.B * case.C).sum(-1)[..., None]  # one group
        gate = F.silu(case.z)
        expected = case.grad_out * gate * (step[..., None] * own + case.D)
        close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
        torch.testing.assert_close(ours["x"][:, :-1].float(), expected[:, :-1].float(), **close)


@BOTH
def test_nan_in_a_gradient_reaches_no_later_step(dtype):
    case = stored(make_case(1, 70, 2, 4, 4, 1), dtype)
    case.grad_out[0, 30, 1] = float("nan")
    grads = everything(replace(case, grad_last_state=torch.zeros_like(case.grad_last_state)))
    for name in ("x", "dt", "z"):
        assert grads[name][0, 31:].isfinite().all(), name
        assert grads[name][0, :, 0].isfinite().all(), name
    assert grads["x"][0, :31, 1].isnan().all()
    assert grads["z"][0, :30].isfinite().all()


@BOTH
def test_nan_stays_in_its_head_and_later_steps(dtype):
    case = stored(make_case(2, 70), dtype)
    case.x[1, 30, 2, 7] = float("nan")
    out, last = call(ssd, case)
    assert out.isnan().sum() == 40
    assert out[1, 30:, 2, 7].isnan().all()
    assert last.isnan().sum() == 16


@BOTH
@pytest.mark.parametrize("name", ["B", "C"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_row_of_b_or_c_reaches_no_step_that_does_not_see_it(name, bad, dtype):
    case = stored(make_case(1, 70, 2, 4, 4, 1), dtype)
    clean = everything(case)
    changed = case.map(lambda n, t: t.clone())
    getattr(changed, name)[0, 30, 0, 1] = bad
    ours = everything(changed)
    assert torch.equal(ours["out"][0, :30], clean["out"][0, :30])
    if name == "C":  # read by its own step alone
        assert not ours["out"][0, 30].isfinite().any()
        assert torch.equal(ours["out"][0, 31:], clean["out"][0, 31:])
        assert torch.equal(ours["last_state"], clean["last_state"])
        assert torch.equal(ours["x"][0, 31:], clean["x"][0, 31:])
        assert torch.equal(ours["B"][0, 31:], clean["B"][0, 31:])
    else:
        assert not ours["last_state"][..., 1].isfinite().any()
        assert torch.equal(ours["last_state"][..., 2:], clean["last_state"][..., 2:])
        # bfloat16's products go row by row around numbers that are not finite.
        torch.testing.assert_close(ours["C"][0, :30], clean["C"][0, :30])
        assert torch.equal(ours["B"], clean["B"])
        assert ours["dt"][0, :30].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 5, 4, 3), (2, 5, 4, 0), (2, 0, 4, 3)])
@BOTH
def test_empty_tensors(shape, dtype):
    check_against_reference(stored(make_case(*shape, initial=True), dtype))


def test_gradient_with_stride_zero_and_through_one_result():
    case = make_case(initial=True)
    x = case.x.clone().requires_grad_()
    out, last = call(ssd, replace(case, x=x))
    expanded = torch.autograd.grad(out.sum(), x, retain_graph=True)[0]
    assert torch.equal(expanded, torch.autograd.grad(out, x, torch.ones_like(out), retain_graph=True)[0])
    only_last = torch.autograd.grad(last.sum(), x, retain_graph=True)[0]
    both = torch.autograd.grad(out.sum() + last.sum(), x)[0]
    torch.testing.assert_close(both, expanded + only_last, rtol=1e-4, atol=1e-4)


SCRIPT = """
import torch
from tests.ssd.cases import check_against_reference, make_case
print(torch.ops.arcore.cpu_isa())
for dtype in (torch.float32, torch.bfloat16):
    check_against_reference(make_case(1, 131, 5, 37, 19, 1, initial=True).to(dtype))
    check_against_reference(make_case(1, 70, 2, 64, 128, 2, reverse=True).to(dtype))
"""


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    run_under(isa, SCRIPT)


BF16_SCRIPT = (
    SCRIPT.replace("cpu_isa", "cpu_bf16")
    + """
half = torch.bfloat16
check_against_reference(make_case(lengths=[1, 64, 65, 0, 3], initial=True).to(half))
ids = torch.tensor([[-1] * 3 + [0] * 40 + [1] * 27, [0] * 33 + [-1] * 2 + [2] * 35], dtype=torch.int32)
check_against_reference(make_case(ids=ids, gate=False, skip=None, initial=True, reverse=True).to(half))
for length in (1, 2, 31, 33, 64, 200):
    check_against_reference(make_case(1, length, 5, 64, 128, 1, softplus=False).to(half))
"""
)


@pytest.mark.parametrize("unit", BF16_UNITS)
def test_every_bf16_unit(unit):
    run_on_bf16_unit(unit, BF16_SCRIPT)


@pytest.mark.slow
def test_random_cases():
    chosen = random.Random(0)
    for seed in range(200):
        lengths = [chosen.randrange(0, 140) for _ in range(chosen.randrange(1, 5))]
        heads = chosen.choice([1, 2, 5, 6, 12])
        batch, length = chosen.randrange(1, 4), chosen.choice([1, 17, 64, 129, 300])
        ids = torch.randint(-1, 3, (batch, length // 9 + 1)).repeat_interleave(9, 1)[:, :length].int()
        packed = chosen.random() < 0.3
        check_against_reference(
            stored(
                make_case(
                    batch,
                    length,
                    heads,
                    chosen.choice([1, 4, 17, 32, 40, 64]),
                    chosen.choice([1, 3, 16, 40, 128]),
                    chosen.choice([g for g in (1, 2, 3) if heads % g == 0]),
                    skip=chosen.choice([None, "head", "channel"]),
                    gate=chosen.random() < 0.5,
                    bias=chosen.random() < 0.5,
                    softplus=chosen.random() < 0.7,
                    limit=chosen.choice([(0.0, float("inf")), (0.1, 0.8)]),
                    initial=chosen.random() < 0.5,
                    lengths=lengths if packed else None,
                    ids=ids if not packed and chosen.random() < 0.5 else None,
                    reverse=chosen.random() < 0.5,
                    seed=seed,
                ),
                (torch.float32, torch.bfloat16)[seed % 2],
            )
        )
