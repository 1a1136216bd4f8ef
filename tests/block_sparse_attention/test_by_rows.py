"""Trees and key biases where there is no kernel for them (CUDA): attention in PyTorch, some query rows at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from arcore import masks
from arcore.ops import _block_sparse_attention_rules as rules
from arcore.ops import reference_block_sparse_attention


def by_rows(q: Tensor, k: Tensor, v: Tensor, mask: Any, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    words = prefix = key_bounds = None
    if isinstance(mask, masks.TreeMask):
        words, prefix = mask.words if mask.words.dim() == 3 else mask.words.unsqueeze(2), mask.prefix
    else:
        key_bounds = mask.key_bounds
    bias = None if bias is None else bias.reshape((1,) * (3 - bias.dim()) + bias.shape)
    scale = 1 / math.sqrt(q.shape[-1])
    return rules.attention_by_rows(q, k, v, mask.bounds, key_bounds, scale, words, prefix, bias)


def tree(batch: int) -> masks.TreeMask:
    parents = torch.tensor([-1, 0, 0, 1, 1, 2, 5]).expand(batch, 7)
    return masks.tree(parents, torch.arange(3, 3 + batch))


CASES = {
    "tree": lambda: (tree(2), 7, 11, None),
    "tree_bias": lambda: (tree(2), 7, 11, torch.randn(4, 11)),
    "interval_bias": lambda: (masks.next_scale((1, 2, 3)), 14, 14, torch.randn(2, 1, 14)),
    "windows": lambda: (masks.sliding_window(20, 5), 20, 20, torch.randn(20)),
}


@pytest.mark.parametrize("at_once", [1 << 21, 1], ids=["whole", "a_row"])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "_LOGITS_AT_ONCE", at_once)
    torch.manual_seed(0)
    mask, nq, nk, bias = CASES[name]()
    leaves = [torch.randn(2, 4, nq, 8), torch.randn(2, 2, nk, 8), torch.randn(2, 2, nk, 5)]
    leaves += [] if bias is None else [bias]
    leaves = [x.requires_grad_() for x in leaves]
    weights = torch.randn(2, 4, nq, 5), torch.randn(2, 4, nq)

    def results(f: Any, x: list[Tensor]) -> list[Tensor]:
        out, lse = f(*x[:3], mask, *x[3:])
        finite = lse.masked_fill(lse == -math.inf, 0.0)
        total = (out * weights[0].to(out.dtype)).sum() + (finite * weights[1].to(out.dtype)).sum()
        return [out, lse, *torch.autograd.grad(total, x)]

    def reference(q: Tensor, k: Tensor, v: Tensor, mask: Any, bias: Tensor | None = None) -> Any:
        return reference_block_sparse_attention(q, k, v, mask, key_bias=bias, return_lse=True)

    exact = results(reference, [x.detach().double().requires_grad_() for x in leaves])
    for ours, theirs in zip(results(by_rows, leaves), exact, strict=True):
        torch.testing.assert_close(ours, theirs.float(), rtol=2e-5, atol=2e-5)


def test_rows_without_keys_and_values_that_are_not_finite() -> None:
    mask = masks.sliding_window(6, 2)
    q, k, v = (torch.randn(1, 1, 6, 4) for _ in range(3))
    v[0, 0, 5, 1] = math.nan
    out, _ = by_rows(q, k, v, mask, torch.zeros(6))
    assert out[0, 0, :5].isfinite().all() and out[0, 0, 5, 1].isnan() and out[0, 0, 5, 0].isfinite()
    nothing = masks.from_bool(torch.zeros(6, 6, dtype=torch.bool))
    q.requires_grad_()
    out, lse = by_rows(q, k, torch.ones(1, 1, 6, 4), nothing, torch.zeros(6))
    assert (out == 0).all() and (lse == -math.inf).all()
    assert (torch.autograd.grad(out.sum(), q)[0] == 0).all()


def test_second_derivatives_and_storage() -> None:
    mask, nq, nk, _ = CASES["tree"]()
    q, k, v = (torch.randn(2, 2, n, 4, dtype=torch.float64) for n in (nq, nk, nk))
    assert by_rows(*(x.bfloat16() for x in (q, k, v)), mask)[0].dtype == torch.bfloat16
    q, k, v = (x.float().requires_grad_() for x in (q, k, v))
    (first,) = torch.autograd.grad(by_rows(q, k, v, mask)[0].square().sum(), q, create_graph=True)
    second = torch.autograd.grad(first.square().sum(), k)[0]
    expected_out = reference_block_sparse_attention(q, k, v, mask)
    (expected,) = torch.autograd.grad(expected_out.square().sum(), q, create_graph=True)
    torch.testing.assert_close(
        second, torch.autograd.grad(expected.square().sum(), k)[0], rtol=1e-4, atol=1e-4
    )
