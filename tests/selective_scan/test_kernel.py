"""The kernel against the float64 reference: forward, last state and every gradient."""

from __future__ import annotations

import random

import pytest
import torch

from arcore.ops import selective_scan
from tests.selective_scan.cases import call, check_against_reference, everything, make_case


@pytest.mark.parametrize("length", [0, 1, 15, 17, 63, 64, 65, 127, 1000])
def test_odd_lengths(length):
    check_against_reference(make_case(1, 17, length, 16, initial=True))


@pytest.mark.parametrize("state", [1, 2, 3, 4, 5, 8, 15, 16, 17, 33, 64, 256])
def test_state_sizes(state):
    check_against_reference(make_case(1, 9, 70, state))


@pytest.mark.parametrize("dim", [1, 2, 15, 16, 17, 48, 130, 300])
def test_channel_counts(dim):
    check_against_reference(make_case(2, dim, 20, 4))


@pytest.mark.parametrize("b", ["constant", "varying", "1", "2", "6"])
@pytest.mark.parametrize("c", ["constant", "varying", "3"])
def test_shapes_of_b_and_c(b, c):
    check_against_reference(make_case(2, 12, 66, 7, b=b, c=c, initial=True))


@pytest.mark.parametrize("absent", ["skip", "gate", "bias", "softplus"])
@pytest.mark.parametrize("reverse", [False, True])
def test_optional_arguments(absent, reverse):
    check_against_reference(make_case(2, 20, 70, 16, reverse=reverse, **{absent: False}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
def test_16_bit_storage(dtype, reverse):
    check_against_reference(make_case(2, 36, 130, 16, dtype=dtype, initial=True, reverse=reverse))


@pytest.mark.parametrize("lengths", [[5], [1, 64, 65, 3], [0, 0], [200, 0, 1, 130]])
@pytest.mark.parametrize("reverse", [False, True])
def test_packed_rows(lengths, reverse):
    for initial in (False, True):
        check_against_reference(make_case(dim=18, state=5, lengths=lengths, initial=initial, reverse=reverse))


@pytest.mark.parametrize("reverse", [False, True])
def test_sequence_ids(reverse):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(-1, 3, (3, 40), generator=generator).repeat_interleave(4, dim=1).int()
    ids[1] = -1
    ids[2] = 0
    for initial in (False, True):
        check_against_reference(make_case(3, 18, 160, 5, ids=ids, initial=initial, reverse=reverse))


def test_mixed_dtypes():
    case = make_case(2, 20, 70, 16, initial=True)
    mixed = case.map(
        lambda name, t: t.to(torch.bfloat16) if name in ("u", "C", "grad_out", "initial_state") else t
    )
    check_against_reference(mixed)


def test_growing_states():
    # A > 0: the state may grow, as in a plain recurrence.
    case = make_case(1, 16, 40, 4)
    check_against_reference(case.map(lambda name, t: t.abs() * 0.1 if name == "A" else t))


def test_steps_so_long_that_the_state_is_forgotten():
    case = make_case(1, 16, 40, 4, initial=True)
    check_against_reference(case.map(lambda name, t: t + 200 if name == "delta" else t))


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 0, 5), (2, 4, 0)])
def test_empty_tensors(shape):
    check_against_reference(make_case(*shape, 3, initial=True))


def test_zero_step_changes_nothing():
    # What left padding relies on: dt = 0 keeps the state to the last bit.
    case = make_case(2, 20, 70, 16, initial=True, softplus=False, bias=False)
    case = case.map(lambda name, t: torch.zeros_like(t) if name == "delta" else t)
    assert torch.equal(call(selective_scan, case)[1], case.initial_state)


def test_nan_stays_in_its_row_and_channel():
    case = make_case(2, 20, 70, 16)
    case.u[1, 7, 30] = float("nan")
    out, last = call(selective_scan, case)
    bad = torch.zeros(2, 20, 70, dtype=torch.bool)
    bad[1, 7, 30:] = True
    assert torch.equal(out.isnan(), bad)
    assert last[1, 7].isnan().all()
    assert last.isnan().sum() == 16


def test_padding_may_hold_nan():
    ids = torch.tensor([[-1, -1, 0, 0, 0, -1]], dtype=torch.int32)
    clean = make_case(1, 20, 6, 16, ids=ids)
    case = clean.map(lambda _, t: t.clone())
    for name in ("u", "delta", "z", "B", "C", "grad_out"):
        getattr(case, name)[..., ids[0] < 0] = float("nan")
    for (name, ours), expected in zip(everything(case).items(), everything(clean).values(), strict=True):
        assert torch.equal(ours, expected), name


def test_gradients_through_one_output_only():
    case = make_case(2, 20, 70, 16, initial=True)
    u = case.u.clone().requires_grad_()
    out, last = selective_scan(u, *(case.delta, case.A, case.B, case.C), return_last_state=True)
    only_out, only_last = (torch.autograd.grad(t.sum(), u, retain_graph=True)[0] for t in (out, last))
    both = torch.autograd.grad(out.sum() + last.sum(), u)[0]
    torch.testing.assert_close(only_out + only_last, both, rtol=1e-4, atol=1e-5)


def test_gradient_with_stride_zero():
    case = make_case(2, 20, 70, 16)
    u = case.u.clone().requires_grad_()
    out = selective_scan(u, case.delta, case.A, case.B, case.C)
    expanded = torch.autograd.grad(out.sum(), u, retain_graph=True)[0]
    assert torch.equal(expanded, torch.autograd.grad(out, u, torch.ones_like(out))[0])


@pytest.mark.slow
def test_random_cases():
    chosen = random.Random(0)
    for seed in range(300):
        lengths = [chosen.randrange(0, 140) for _ in range(chosen.randrange(1, 5))]
        check_against_reference(
            make_case(
                chosen.randrange(1, 4),
                chosen.choice([2, 6, 18, 36, 150]),
                chosen.choice([1, 17, 64, 129, 300]),
                chosen.choice([1, 3, 8, 16, 20, 40]),
                b=chosen.choice(["constant", "varying", "2"]),
                c=chosen.choice(["constant", "varying", "2"]),
                skip=chosen.random() < 0.5,
                gate=chosen.random() < 0.5,
                bias=chosen.random() < 0.5,
                softplus=chosen.random() < 0.7,
                initial=chosen.random() < 0.5,
                lengths=lengths if chosen.random() < 0.3 else None,
                reverse=chosen.random() < 0.5,
                dtype=chosen.choice([torch.float32, torch.float32, torch.bfloat16]),
                seed=seed,
            )
        )
