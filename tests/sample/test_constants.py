"""Settings as device constants: what needs no GPU to be seen."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from arcore.ops import _constants
from arcore.ops._constants import constant

GPU = torch.device("cuda", 0)


def test_on_the_cpu():
    made = constant((1.0, 2.5), torch.float64, torch.device("cpu"))
    assert made.tolist() == [1.0, 2.5] and made.dtype == torch.float64
    made.fill_(9)
    assert constant((1.0, 2.5), torch.float64, torch.device("cpu")).tolist() == [1.0, 2.5]
    assert constant((), torch.int64, torch.device("cpu")).shape == (0,)


def test_fake_tensors_are_not_kept():
    before = len(_constants._kept)
    with FakeTensorMode():
        made = constant((-1, 0), torch.int64, GPU)
    assert made.shape == (2,) and made.dtype == torch.int64 and made.device == GPU
    assert len(_constants._kept) == before
