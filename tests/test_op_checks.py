"""The checks that all ops share."""

from __future__ import annotations

import re

import pytest
import torch

from arcore.ops._checks import same_device


def test_tensors_on_one_device_pass() -> None:
    a = torch.zeros(2)
    same_device("arcore.op", logits=[a, a], mask=None, bias=a[0])
    same_device("arcore.op", mask=None)
    same_device("arcore.op", a=a.to("meta"), b=a.to("meta"))


@pytest.mark.parametrize("place", ["alone", "in a list"])
def test_another_device_is_named(place: str) -> None:
    a, b = torch.zeros(2), torch.zeros(2, device="meta")
    message = (
        "arcore.op: expected mask on the device of logits, cpu, but got meta; move it with mask.to('cpu')"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        same_device("arcore.op", logits=a, bias=None, mask=b if place == "alone" else (a, b))


def test_what_is_no_tensor_is_named() -> None:
    with pytest.raises(TypeError, match="expected mask to be a tensor but got list with bool"):
        same_device("arcore.op", logits=torch.zeros(2), mask=[True, False])
    with pytest.raises(TypeError, match="expected bias to be a tensor but got float"):
        same_device("arcore.op", logits=torch.zeros(2), bias=0.5)
