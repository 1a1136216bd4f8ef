"""The sm_80 kernels, run on the CPU by tests/cuda_host: the CPU kernels' own tests, once more."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.causal_conv1d import test_kernel as kernel
from tests.causal_conv1d import test_update as update
from tests.causal_conv1d.cases import ALONG_TIME, everything, make_case
from tests.cuda_host.build import CudaHost, installed, unavailable

reason = unavailable()
pytestmark = pytest.mark.skipif(reason is not None, reason=reason or "")

SHARED = [
    "test_odd_lengths",
    "test_widths",
    "test_16_bit_storage",
    "test_sequence_ids",
    "test_empty_tensors",
    "test_left_padding_equals_the_row_alone",
    "test_layout_changes_no_bit",
    "test_nan_reaches_the_outputs_that_read_it",
]
globals().update({name: getattr(kernel, name) for name in SHARED})
SHARED_STEPS = [
    "test_shift_and_ring",
    "test_steps_one_by_one_equal_the_convolution",
    "test_rows_are_picked_and_padding_is_left_alone",
    "test_any_layout_of_state_and_input",
]
globals().update({name: getattr(update, name) for name in SHARED_STEPS})


@pytest.fixture(autouse=True)
def host() -> Iterator[CudaHost]:
    with installed("causal_conv1d") as kernels:
        yield kernels


def test_the_executor_runs(host: CudaHost) -> None:
    everything(make_case(1, 5, 9))
    assert host.statistics()["blocks"] > 0


@pytest.mark.parametrize("layout", ["channel_last", "plain"])
def test_results_do_not_depend_on_the_order_of_warps(host: CudaHost, layout: str) -> None:
    case = make_case(2, 40, 70, initial=True)
    if layout == "channel_last":
        case = case.map(lambda name, t: kernel.LAYOUTS["channel_last"](t) if name in ALONG_TIME else t)
    host.set_seed(0)
    first = everything(case)
    for seed in range(1, 5):
        host.set_seed(seed)
        again = everything(case)
        assert all(torch.equal(first[name], again[name]) for name in first)
