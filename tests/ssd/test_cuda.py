"""ssd has no CUDA kernels: tensors on a GPU get an error that says so."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from arcore.ops import ssd
from tests.ssd.cases import call, make_case

MESSAGE = r"arcore\.ssd: expected tensors on a CPU but got cuda:0; ssd has no CUDA kernels yet\. Move .* reference_ssd"


def test_tensors_that_claim_to_be_on_a_gpu_are_refused() -> None:
    """Needs no GPU: fake tensors have a device but no memory."""
    with FakeTensorMode():
        case = make_case().map(lambda _, t: torch.empty(t.shape, dtype=t.dtype, device="cuda:0"))
        with pytest.raises(NotImplementedError, match=MESSAGE):
            call(ssd, case)


@pytest.mark.cuda
def test_tensors_on_a_gpu_are_refused() -> None:
    case = make_case().map(lambda _, t: t.cuda())
    with pytest.raises(NotImplementedError, match=MESSAGE):
        call(ssd, case)
