"""Masks inside functions under torch.compile(fullgraph=True)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from arcore import masks
from arcore.masks import IntervalMask


def attend(x: Tensor, mask: IntervalMask) -> Tensor:
    """Reads what an op reads of a mask, and applies it densely."""
    if x.shape[-2] != mask.nq or x.shape[-1] != mask.nk:
        raise ValueError("length mismatch")
    key = torch.arange(mask.nk)
    bounds = mask.bounds
    allowed = (key >= bounds[..., 0:1]) & (key < bounds[..., 1:2])
    if mask.num_intervals == 2:
        allowed = allowed | ((key >= bounds[..., 2:3]) & (key < bounds[..., 3:4]))
    if mask.key_bounds is not None:
        query = torch.arange(mask.nq).unsqueeze(-1)
        lo, hi = mask.key_bounds.unsqueeze(1).unbind(-1)
        allowed = allowed & (query >= lo.unsqueeze(-2)) & (query < hi.unsqueeze(-2))
    return torch.where(allowed, x, 0.0)


MASKS = [masks.causal(12), masks.skip_causal(3, 2), masks.causal(12).with_padding([12, 5])]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("mask", MASKS, ids=repr)
def test_mask_as_an_argument(mask: IntervalMask, backend: str) -> None:
    torch.compiler.reset()
    x = torch.randn(*mask.shape)
    compiled = torch.compile(attend, fullgraph=True, backend=backend)
    assert torch.equal(compiled(x, mask), torch.where(mask.to_bool(), x, 0.0))


@pytest.mark.parametrize("mask", MASKS, ids=repr)
def test_mask_of_a_closure(mask: IntervalMask) -> None:
    torch.compiler.reset()
    x = torch.randn(*mask.shape, requires_grad=True)
    compiled = torch.compile(lambda x: attend(x, mask).sum(), fullgraph=True, backend="aot_eager")
    compiled(x).backward()
    assert torch.equal(x.grad, mask.to_bool().float())


class Layer(torch.nn.Module):
    def __init__(self, mask: IntervalMask) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        return attend(x, self.mask.to(x.device))


def test_mask_of_a_module() -> None:
    torch.compiler.reset()
    mask = masks.skip_causal(3, 2)
    x = torch.randn(*mask.shape)
    compiled = torch.compile(Layer(mask), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), torch.where(mask.to_bool(), x, 0.0))


def test_another_mask_of_the_same_shape_is_honoured() -> None:
    torch.compiler.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    x = torch.ones(1, 1, 12, 12)
    for mask in (
        masks.causal(12),
        masks.sliding_window(12, 3),
        masks.documents([5, 7]),
        masks.skip_causal(3, 2),
    ):
        assert torch.equal(compiled(x, mask), mask.to_bool().float())


def test_masks_of_one_shape_share_a_graph() -> None:
    torch.compiler.reset()
    graphs = 0

    def count(module: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        nonlocal graphs
        graphs += 1
        return module

    compiled = torch.compile(attend, fullgraph=True, backend=count)
    for mask in (masks.causal(12), masks.sliding_window(12, 3), masks.documents([5, 7])):
        compiled(torch.ones(1, 1, 12, 12), mask)
    assert graphs == 1
