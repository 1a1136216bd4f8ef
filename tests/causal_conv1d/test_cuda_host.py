"""The sm_80 kernels, run on the CPU by tests/cuda_host, through the public functions against the references."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from arcore.ops import causal_conv1d_update, reference_causal_conv1d_update
from tests.causal_conv1d.cases import ALONG_TIME, check_against_reference, everything, make_case
from tests.cuda_host.build import CudaHost, guarded, installed, unavailable

reason = unavailable()
pytestmark = [pytest.mark.thinned, pytest.mark.skipif(reason is not None, reason=reason or "")]


@pytest.fixture
def host() -> Iterator[CudaHost]:
    with installed("causal_conv1d") as kernels:
        yield kernels


@pytest.mark.parametrize("length", [0, 1, 2, 3, 8, 63, 64, 65, 66, 129])
@pytest.mark.parametrize("initial", [False, True])
def test_odd_lengths(host: CudaHost, length: int, initial: bool) -> None:
    check_against_reference(make_case(2, 17, length, 4, initial=initial))


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 9, 10, 33])
@pytest.mark.parametrize("reverse", [False, True])
def test_widths(host: CudaHost, width: int, reverse: bool) -> None:
    for length in (5, 70):
        check_against_reference(make_case(2, 5, length, width, initial=True, reverse=reverse))


@pytest.mark.parametrize("dim", [1, 31, 32, 33, 70])
def test_channel_counts(host: CudaHost, dim: int) -> None:
    check_against_reference(make_case(2, dim, 20))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_optional_arguments(host: CudaHost, bias: bool, activation: str | None) -> None:
    check_against_reference(make_case(bias=bias, activation=activation))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
def test_16_bit_storage(host: CudaHost, dtype: torch.dtype, reverse: bool) -> None:
    for length in (70, 72):
        check_against_reference(make_case(2, 32, length, initial=True, reverse=reverse).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
def test_all_layouts_give_the_same_bits(host: CudaHost, dtype: torch.dtype, reverse: bool) -> None:
    case = make_case(2, 40, 136, initial=True, reverse=reverse).to(dtype)
    wanted = everything(case)

    def channel_last(name: str, t: Tensor) -> Tensor:
        return t.mT.contiguous().mT if name in ALONG_TIME else t

    def spread(name: str, t: Tensor) -> Tensor:
        return torch.stack([t, t.new_full(t.shape, torch.nan)], dim=-1)[..., 0] if name in ALONG_TIME else t

    def shifted(name: str, t: Tensor) -> Tensor:
        # Rows that do not lie on 16 bytes.
        return torch.cat([t[..., :1], t], dim=-1)[..., 1:] if name in ALONG_TIME else t

    for layout in (channel_last, spread, shifted, lambda _, t: guarded(t)):
        found = everything(case.map(layout))
        for name, value in found.items():
            assert torch.equal(value, wanted[name]), name


@pytest.mark.parametrize("width", [2, 4, 7])
@pytest.mark.parametrize("reverse", [False, True])
def test_sequence_ids(host: CudaHost, width: int, reverse: bool) -> None:
    ids = torch.randint(-1, 3, (4, 28)).repeat_interleave(5, dim=1).int()
    ids[1] = -1
    ids[2, :100] = -1  # the first real id is found in a later run of steps
    ids[3] = torch.randint(-1, 2, (140,))
    for initial in (False, True):
        check_against_reference(make_case(4, 9, 140, width, ids=ids, initial=initial, reverse=reverse))
    short = ids[:, -3:].clone()
    check_against_reference(make_case(4, 9, 3, width, ids=short, initial=True, reverse=reverse))


def test_padding_may_hold_nan(host: CudaHost) -> None:
    ids = torch.tensor([[-1, -1, 0, 0, 0, 0, -1, -1, 1, 1, 1, -1]], dtype=torch.int32)
    clean = make_case(1, 20, 12, ids=ids)
    case = clean.map(lambda _, t: t.clone())
    case.x[..., ids[0] < 0] = torch.nan
    case.grad_out[..., ids[0] < 0] = torch.nan
    for (name, ours), expected in zip(everything(case).items(), everything(clean).values(), strict=True):
        assert torch.equal(ours, expected), name


def test_nan_reaches_its_taps_only(host: CudaHost) -> None:
    case = make_case(2, 20, 70)
    case.x[1, 7, 66] = torch.nan
    bad = torch.zeros(2, 20, 70, dtype=torch.bool)
    bad[1, 7, 66:70] = True
    assert torch.equal(everything(case)["out"].isnan(), bad)


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 0, 5), (2, 4, 0)])
def test_empty_tensors(host: CudaHost, shape: tuple[int, int, int]) -> None:
    check_against_reference(make_case(*shape))


def test_order_and_batch_mates_change_nothing(host: CudaHost) -> None:
    case = make_case(3, 40, 140, initial=True)
    first = everything(case)
    for seed in (1, 2):
        host.set_seed(seed)
        for name, value in everything(case).items():
            assert torch.equal(value, first[name]), name
    alone = everything(case.map(lambda name, t: t if name in ("weight", "bias") else t[1:2]))
    for name in ("out", "final", "x", "initial_states"):
        assert torch.equal(alone[name], first[name][1:2]), name


def both(x: Tensor, state: Tensor, *args: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
def test_update_by_shift_and_ring(host: CudaHost, width: int, spare: int, steps: int) -> None:
    if width + spare == 1:
        pytest.skip("no state")
    x, state = torch.randn(3, 21, steps), torch.randn(3, 21, width - 1 + spare)
    case = make_case(3, 21, 1, width)
    for places in (None, torch.tensor([0, 4, 1000]), torch.tensor([3, 2, 1], dtype=torch.int32)):
        out, after, expected, after_expected = both(x, state, case.weight, case.bias, "silu", places)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(after, after_expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_update_in_16_bits_and_other_layouts(host: CudaHost, dtype: torch.dtype) -> None:
    case = make_case(3, 150, 1).to(dtype)
    state = torch.randn(3, 150, 4).to(dtype).mT.contiguous().mT
    out, after, expected, after_expected = both(case.x[..., 0], state, case.weight, case.bias, "silu")
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected.float(), rtol=2**-7, atol=1e-5)
    assert torch.equal(after, after_expected)
    mixed = both(case.x.float(), state, case.weight, None, None)
    torch.testing.assert_close(mixed[0], mixed[2], rtol=1e-5, atol=1e-6)
    assert torch.equal(mixed[1], mixed[3])


def test_updated_rows_are_picked_in_order(host: CudaHost) -> None:
    rows = torch.randint(-1, 5, (140,), dtype=torch.int32)
    case = make_case(140, 6, 2)
    state = torch.randn(6, 6, 3)
    for seed in range(2):
        host.set_seed(seed)
        for places in (None, torch.arange(140)):
            out, after, expected, after_expected = both(
                case.x, state, case.weight, case.bias, "silu", places, rows
            )
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
            assert torch.equal(after, after_expected)
    out, after, _, _ = both(case.x, state, case.weight, None, None, None, torch.zeros_like(rows))
    assert torch.equal(after[1:], state[1:])


def test_a_row_outside_the_state_touches_nothing(host: CudaHost) -> None:
    case = make_case(3, 20, 1)
    state = torch.randn(3, 20, 3)
    after = state.clone()
    out = causal_conv1d_update(case.x, after, case.weight, conv_state_indices=torch.tensor([0, 3, 1 << 40]))
    assert not out[0].isnan().any()
    assert out[1:].isnan().all()
    assert torch.equal(after[1:], state[1:])


@pytest.mark.slow
def test_random_cases(host: CudaHost) -> None:
    chosen = random.Random(2)
    for seed in range(80):
        host.set_seed(seed)
        batch, length = chosen.randrange(1, 4), chosen.choice([1, 5, 64, 100, 200])
        ids = torch.randint(-1, 3, (batch, length), dtype=torch.int32).sort(dim=1).values
        case = make_case(
            batch,
            chosen.choice([1, 8, 33, 64]),
            length,
            chosen.choice([1, 2, 3, 4, 6, 12]),
            bias=chosen.random() < 0.5,
            initial=chosen.random() < 0.5,
            activation=chosen.choice([None, "silu"]),
            ids=ids if chosen.random() < 0.5 else None,
            reverse=chosen.random() < 0.5,
            seed=seed,
        )
        if chosen.random() < 0.5:
            case = case.map(lambda name, t: t.mT.contiguous().mT if name in ALONG_TIME else t)
        check_against_reference(replace(case, x=case.x.bfloat16()) if chosen.random() < 0.3 else case)
