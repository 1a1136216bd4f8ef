"""The sm_80 kernel, run on the CPU by tests/cuda_host, through the public function against the reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from arcore.ops import reference_selective_state_update
from tests.cuda_host.build import CudaHost, guarded, installed, unavailable
from tests.selective_state_update.test_step import check_against_reference, make_step

reason = unavailable()
pytestmark = [pytest.mark.thinned, pytest.mark.skipif(reason is not None, reason=reason or "")]


@pytest.fixture
def host() -> Iterator[CudaHost]:
    with installed("selective_state_update") as kernels:
        yield kernels


@pytest.mark.parametrize("d_state", [1, 3, 4, 7, 8, 15, 16, 17, 33, 64, 127, 128, 200, 256])
@pytest.mark.parametrize("dim", [1, 33, 70])
def test_sizes(host: CudaHost, dim: int, d_state: int) -> None:
    check_against_reference(make_step(2, dim, d_state))


@pytest.mark.parametrize("absent", ["skip", "gate", "bias", "softplus"])
@pytest.mark.parametrize("heads", [None, 6])
def test_optional_arguments(host: CudaHost, absent: str, heads: int | None) -> None:
    check_against_reference(make_step(heads=heads, groups=2, **{absent: False}))


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("d_state", [16, 37, 128])
def test_heads_and_groups(host: CudaHost, groups: int, tied: bool, d_state: int) -> None:
    check_against_reference(make_step(2, 20, d_state, 6, groups, tied=tied))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("which", ["state", "rest", "all"])
def test_storage_types(host: CudaHost, dtype: torch.dtype, which: str) -> None:
    def convert(name: str, t: Tensor) -> Tensor:
        kept = name != "state" if which == "state" else name == "state" and which == "rest"
        return t if kept or name in ("A", "D", "dt_bias") else t.to(dtype)

    for d_state in (16, 19):
        check_against_reference(make_step(d_state=d_state).map(convert))


def test_layouts_give_the_same_bits(host: CudaHost) -> None:
    step = make_step(3, 40, 16, 2)
    out, state = step.run()

    def flipped(_: str, t: Tensor) -> Tensor:
        return t.mT.contiguous().mT

    def spread(_: str, t: Tensor) -> Tensor:
        return torch.stack([t, t.new_full(t.shape, torch.nan)], dim=-1)[..., 0]

    for layout in (flipped, spread, lambda _, t: guarded(t)):
        x = step.map(layout)
        found = type(x).run(x)
        assert torch.equal(found[0], out)
        assert torch.equal(found[1], state)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_rows_are_picked_and_padding_is_left_alone(host: CudaHost, dtype: torch.dtype) -> None:
    rows = torch.tensor([5, -1, 0, 2], dtype=dtype)
    step = replace(make_step(4, 40, 16), state=torch.randn(7, 40, 16), state_batch_indices=rows)
    check_against_reference(step)
    out, state = step.run()
    assert torch.equal(out[1], torch.zeros(40))
    untouched = [1, 3, 4, 6]
    assert torch.equal(state[untouched], step.state[untouched])


def test_rows_named_twice_are_updated_in_order(host: CudaHost) -> None:
    # More rows than a block has threads, each named several times, in no order.
    rows = torch.randint(0, 9, (150,))
    rows[::7] = -1
    step = make_step(150, 6, 8)
    step = replace(step, state=torch.randn(9, 6, 8), state_batch_indices=rows, A=step.A * 0.1)
    wanted = step.run(reference_selective_state_update)
    for seed in range(3):
        host.set_seed(seed)
        found = step.run()
        for ours, expected in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_a_row_outside_the_state_touches_nothing(host: CudaHost) -> None:
    rows = torch.tensor([0, 9, -5])
    step = replace(make_step(3, 20, 16), state=torch.randn(3, 20, 16), state_batch_indices=rows)
    out, state = step.run()
    assert not out[0].isnan().any()
    assert out[1].isnan().all()
    assert torch.equal(out[2], torch.zeros_like(out[2]))  # negative: padding
    assert torch.equal(state[1:], step.state[1:])


def test_nan_stays_in_its_channel(host: CudaHost) -> None:
    step = make_step(2, 40, 16)
    step.x[1, 7] = torch.nan
    out, state = step.run()
    assert out.isnan().sum() == 1
    assert state[1, 7].isnan().all()
    assert state.isnan().sum() == 16


def test_empty_batch(host: CudaHost) -> None:
    check_against_reference(make_step(0))
