"""The kernel and its gradients against the float64 recurrence; ranks, pairs, states, packed rows, layouts, threads."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from arcore.ops import Mamba3State, mamba3_scan, mamba3_update, reference_mamba3_scan, ssd
from arcore.ops._mamba3_by_ssd import Arguments, by_ssd
from tests.isa import ISAS, run_under
from tests.mamba3_scan.cases import (
    ALONG_TIME,
    FLOATS,
    PER_ROW,
    STATES,
    call,
    check_against_reference,
    everything,
    make_case,
)


@pytest.mark.parametrize("length", [0, 1, 17, 63, 64, 65, 150])
@pytest.mark.parametrize("initial", [False, True])
def test_odd_lengths(length, initial):
    check_against_reference(make_case(1, length, 3, 9, groups=1, initial=initial))


@pytest.mark.parametrize("dim", [1, 16, 33, 64])
@pytest.mark.parametrize(
    ("states", "angles"), [(2, 1), (2, 0), (10, 5), (34, 17), (128, 32), (250, 100), (256, 128)]
)
def test_sizes(dim, states, angles):
    check_against_reference(make_case(1, 66, 2, dim, states, 1, angles=angles, initial=True))


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 16])
@pytest.mark.parametrize("halves", [False, True])
def test_ranks_and_pairs(rank, halves):
    check_against_reference(make_case(1, 45, 2, 8, rank=rank, halves=halves, initial=True))


@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (5, 1), (9, 1), (6, 2), (6, 6)])
def test_heads_and_groups(heads, groups):
    check_against_reference(make_case(2, 20, heads, 8, 8, groups, angles=2))


@pytest.mark.parametrize("options", [{"bias": False}, {"skip": False}, {"gate": False}], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
def test_optional_arguments(options, reverse):
    check_against_reference(make_case(length=40, initial=True, reverse=reverse, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_storage(dtype):
    case = make_case(length=80, initial=True)
    # Step sizes, decays and angles stay in 32 bits, as in the model.
    wide = ("dt", "log_decay", "weight", "turn", "angle0", "h0")
    check_against_reference(case.map(lambda n, t: t if n in wide else t.to(dtype)))


@pytest.mark.parametrize("lengths", [[5], [1, 64, 65, 3], [0, 0], [20, 0, 1, 70]])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("rank", [1, 3])
def test_packed_rows(lengths, reverse, rank):
    for initial in (False, True):
        check_against_reference(
            make_case(lengths=lengths, heads=2, dim=4, rank=rank, initial=initial, reverse=reverse)
        )


def some_ids() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(-1, 3, (3, 20), generator=generator).repeat_interleave(4, dim=1).int()
    ids[1] = -1
    ids[2] = 0
    return ids


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("rank", [1, 2])
def test_sequence_ids(reverse, rank):
    for initial in (False, True):
        check_against_reference(
            make_case(3, 80, 2, 4, ids=some_ids(), rank=rank, initial=initial, reverse=reverse)
        )


def test_padding_may_hold_nan():
    ids = torch.tensor([[-1, -1, 0, 0, -1, 0, -1]], dtype=torch.int32)
    clean = make_case(1, 7, ids=ids)
    case = clean.map(lambda _, t: t.clone())
    for name in ALONG_TIME:
        getattr(case, name)[:, ids[0] < 0] = float("nan")
    for (name, ours), expected in zip(everything(case).items(), everything(clean).values(), strict=True):
        assert torch.equal(ours, expected), name


@pytest.mark.parametrize("reverse", [False, True])
def test_the_way_through_ssd_is_the_same(reverse):
    # The road of GPUs and of second derivatives.
    for options in ({}, {"lengths": [20, 0, 1, 70]}, {"ids": some_ids(), "batch": 3, "length": 80}):
        for rank in (1, 3):
            case = make_case(heads=2, dim=4, rank=rank, initial=True, reverse=reverse, **options)
            # There the gradient of a decay is a difference of two numbers that grow with its inverse.
            case = replace(case, log_decay=torch.full_like(case.log_decay, -0.4))

            def through_ssd(*floats: Tensor, **settings: object) -> tuple[Tensor, ...]:
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(torch.ops.arcore, "mamba3_scan", _by_ssd)
                    return mamba3_scan(*floats, **settings)

            check_against_reference(case, through_ssd)


def _by_ssd(*arguments):
    return by_ssd(Arguments(*arguments[:13]), *arguments[13:])


def test_full_weights_without_turns_are_mamba2():
    case = make_case(bias=False, gate=False, angles=0)
    case = replace(case, weight=torch.ones_like(case.weight))
    a = case.log_decay / case.dt
    out, last, *_ = call(mamba3_scan, case)
    expected, state = ssd(
        case.x[:, :, :, 0], case.dt, a[0, 0], case.B[:, :, 0], case.C[:, :, 0], case.D, return_last_state=True
    )
    torch.testing.assert_close(out[:, :, :, 0], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last, state, rtol=1e-4, atol=1e-5)


def test_long_decays_stay_exact():
    case = make_case(1, 130, 2, 8, groups=1, bias=False)
    # The sum of the logs reaches -2000 within a chunk; neighbours still see each other.
    check_against_reference(replace(case, log_decay=-30 * (case.dt + 0.5)))


def test_infinite_decay_forgets():
    case = make_case(1, 70, 4, 8, 4, 1, angles=2, initial=True)
    out, *_ = call(mamba3_scan, replace(case, log_decay=torch.full_like(case.log_decay, -torch.inf)))
    alone = [
        call(mamba3_scan, case.map(lambda n, v, t=t: v[:, t : t + 1] if n in ALONG_TIME else v))[0]
        for t in (0, 69)
    ]
    # What a step adds to itself needs no decay: a row of one step without a state before it.
    fresh = replace(case, h0=None, angle0=None, B0=None, x0=None)
    fresh = fresh.map(lambda n, v: v[:, :1] if n in ALONG_TIME else v)
    torch.testing.assert_close(out[:, :1], call(mamba3_scan, fresh)[0], rtol=1e-4, atol=1e-5)
    assert (alone[1] - out[:, 69:]).abs().max() > 1e-2  # a finite decay does not forget
    assert out.isfinite().all()
    everything_finite = everything(replace(case, log_decay=torch.full_like(case.log_decay, -torch.inf)))
    assert all(t.isfinite().all() for t in everything_finite.values())


def test_two_parts_with_a_state_equal_the_whole():
    case = make_case(length=90, initial=True, rank=2)
    whole = everything(case)
    for cut in (1, 32, 89):
        leaves = {name: t.clone().requires_grad_() for name, t in case.floats().items()}
        first = {n: t[:, :cut] if n in ALONG_TIME else t for n, t in leaves.items()}
        rest = {n: t[:, cut:] if n in ALONG_TIME else t for n, t in leaves.items()}
        out, *state = call(mamba3_scan, replace(case, **first))
        then = dict(zip(STATES, state, strict=True))
        more, *last = call(mamba3_scan, replace(case, **{**rest, **then}))
        torch.testing.assert_close(torch.cat([out, more], dim=1), whole["out"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(last[0], whole["last_h"], rtol=1e-4, atol=1e-4)
        grads = torch.autograd.grad(
            [out, more, *last],
            list(leaves.values()),
            [
                case.grad_out[:, :cut],
                case.grad_out[:, cut:],
                case.grad_h,
                case.grad_angle,
                case.grad_B,
                case.grad_x,
            ],
        )
        for name, grad in zip(leaves, grads, strict=True):
            scale = whole[name].abs().max().item()
            torch.testing.assert_close(grad, whole[name], rtol=1e-4, atol=2e-5 * scale)


@pytest.mark.parametrize(("rank", "states", "halves"), [(1, 16, False), (3, 10, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_one_by_one_equal_the_scan(rank, states, halves, dtype):
    case = make_case(length=20, rank=rank, states=states, halves=halves, initial=True, gate=False)
    out, *last = call(mamba3_scan, case)
    # The states lie in one tensor, as in a cache.
    packed = torch.cat([t.flatten(2) for t in (case.h0, case.angle0, case.B0, case.x0)], -1)
    views = packed.split([12 * states, 5, rank * states, rank * 12], -1)
    views = [v if i == 1 else v.unflatten(2, (-1, 12 if i == 3 else states)) for i, v in enumerate(views)]
    state = Mamba3State(*(views if dtype == torch.float32 else [v.to(dtype) for v in views]))
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.15}
    for t in range(20):
        y = mamba3_update(
            state,
            *(getattr(case, name)[:, t] for name in FLOATS[:7]),
            *(case.B_bias, case.C_bias, case.D),
            halves=halves,
        )
        if dtype == torch.float32:
            torch.testing.assert_close(y, out[:, t], **tolerance)
    for ours, expected in zip(state, last, strict=True):
        if dtype == torch.float32:
            torch.testing.assert_close(ours, expected, **tolerance)
        assert (ours.float() - expected).abs().mean() <= 0.05 * expected.abs().max()


def test_reverse_equals_flip():
    for length in (1, 64, 90):
        case = make_case(length=length, initial=True)
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
def test_layout_changes_no_bit(layout):
    for reverse in (False, True):
        case = make_case(length=70, reverse=reverse, rank=2)
        other = case.map(lambda n, t: LAYOUTS[layout](t) if n in ALONG_TIME else t)
        for (name, ours), expected in zip(everything(other).items(), everything(case).values(), strict=True):
            assert torch.equal(ours, expected), name


@pytest.fixture
def restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_threads_and_batch_mates_change_no_bit(restore_threads):
    case = make_case(3, 100, 12, 64, 64, 1, angles=16, initial=True)
    torch.set_num_threads(1)
    expected = everything(case)
    for threads in (2, 5):
        torch.set_num_threads(threads)
        for name, ours in everything(case).items():
            assert torch.equal(ours, expected[name]), name
    for i in range(3):
        alone = everything(case.map(lambda n, t, i=i: t[i : i + 1] if n in PER_ROW else t))
        for name in ("out", "last_h", "last_angle", "last_B", "last_x", *PER_ROW):
            if name in alone:
                assert torch.equal(alone[name][0], expected[name][i]), name


def test_rows_of_many_chunks():
    # Beyond 64 chunks the backward makes states again, a segment at a time; 16 ranks make chunks of 4 steps.
    check_against_reference(make_case(1, 4 * 70 + 3, 1, 4, 4, 1, 16, angles=2, initial=True))


def test_nan_stays_in_its_head_and_later_steps():
    case = make_case(2, 70, gate=False)
    case.x[1, 30, 2, 0, 7] = float("nan")
    out, last, *_ = call(mamba3_scan, case)
    assert out[1, 30:, 2, 0, 7].isnan().all()
    assert out.isnan().sum() == 40
    assert last.isnan().sum() == 16


def test_nan_in_a_gradient_reaches_no_later_step():
    case = make_case(1, 70, 2, 4, 4, 1, angles=2)
    case.grad_out[0, 30, 1] = float("nan")
    grads = everything(
        case.map(lambda n, t: t.zero_() if n in ("grad_h", "grad_angle", "grad_B", "grad_x") else t)
    )
    for name in ("x", "log_decay", "z", "turn"):
        assert grads[name][0, 31:].isfinite().all(), name
        assert grads[name][0, :, 0].isfinite().all(), name
    assert grads["x"][0, :31, 1].isnan().all()


def test_empty_batch_and_heads():
    check_against_reference(make_case(0, 5, initial=True))
    check_against_reference(make_case(2, 5, dim=0, initial=True))


SCRIPT = """
import torch
from tests.mamba3_scan.cases import check_against_reference, make_case
print(torch.ops.arcore.cpu_isa())
for rank, states, dim, halves in ((1, 128, 64, False), (3, 10, 17, True), (4, 34, 16, False)):
    check_against_reference(make_case(1, 70, 3, dim, states, 1, rank, 4, halves=halves, initial=True))
check_against_reference(make_case(heads=2, lengths=[3, 0, 70], reverse=True))
"""


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    run_under(isa, SCRIPT)


@pytest.mark.slow
def test_random_cases():
    chosen = random.Random(0)
    for seed in range(150):
        lengths = [chosen.randrange(0, 90) for _ in range(chosen.randrange(1, 5))]
        heads = chosen.choice([1, 2, 5, 6])
        batch, length = chosen.randrange(1, 4), chosen.choice([1, 17, 64, 129])
        ids = torch.randint(-1, 3, (batch, length // 9 + 1)).repeat_interleave(9, 1)[:, :length].int()
        packed, states = chosen.random() < 0.3, 2 * chosen.randrange(1, 40)
        check_against_reference(
            make_case(
                batch,
                length,
                heads,
                chosen.randrange(1, 40),
                states,
                chosen.choice([g for g in (1, 2, 3) if heads % g == 0]),
                chosen.choice([1, 1, 2, 3, 7]),
                chosen.randrange(0, states // 2 + 1),
                initial=chosen.random() < 0.5,
                gate=chosen.random() < 0.7,
                bias=chosen.random() < 0.7,
                lengths=lengths if packed else None,
                ids=ids if not packed and chosen.random() < 0.4 else None,
                halves=chosen.random() < 0.5,
                reverse=chosen.random() < 0.5,
                seed=seed,
            )
        )


def test_reference_is_a_loop_over_complex_states():
    # An independent form: states turn back by the angle, B and C stay as they are.
    case = make_case(1, 12, 2, 3, 8, 1, 2, 4, bias=False, skip=False, gate=False).to(torch.float64)
    out, *_ = call(reference_mamba3_scan, case)
    b, c = (torch.view_as_complex(m.unflatten(-1, (4, 2)).contiguous()) for m in (case.B, case.C))
    state = torch.zeros(2, 3, 4, dtype=torch.complex128)
    before = torch.zeros_like(state)
    for t in range(12):
        flow = torch.polar(case.log_decay[0, t].exp()[:, None].expand(2, 4), -case.turn[0, t])[:, None]
        dt, w = case.dt[0, t][:, None, None], case.weight[0, t][:, None, None]
        now = torch.einsum("hrp,rn->hpn", case.x[0, t].to(b.dtype), b[0, t, :, 0])
        state = flow * (state + (1 - w) * dt * before) + w * dt * now
        before = now
        y = torch.einsum("hpn,rn->hrp", state, c[0, t, :, 0].conj()).real
        torch.testing.assert_close(out[0, t], y)
