"""Inputs and tolerances shared by the tests of block_sparse_attention."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from arcore.masks import (
    IntervalMask,
    TreeMask,
    causal,
    documents,
    full,
    next_scale,
    next_scale_markov,
    prefix_lm,
    skip_causal,
    tree,
)
from arcore.masks import sliding_window as window
from arcore.ops import block_sparse_attention, reference_block_sparse_attention

VAR_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)

MASKS = {
    "next_scale": lambda: next_scale((1, 2, 3, 4, 5, 6, 8)),
    "next_scale_256": lambda: next_scale(VAR_256),
    "markov": lambda: next_scale_markov((1, 2, 3, 4, 5, 6, 8)),
    "skip_causal": lambda: skip_causal(3, 17),
    "causal": lambda: causal(127),
    "full": lambda: full(65, 300),
    "prefix": lambda: prefix_lm(100, 37),
    "window_sinks": lambda: window(300, 65, sinks=3),
    "documents": lambda: documents([1, 15, 64, 65, 2]),
}


def random_tree(nodes: int, prefix: int | list[int], *, seed: int, batch: int = 1) -> TreeMask:
    """A tree in which each node hangs under a random earlier one, or under the prefix."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(batch, nodes, generator=generator)
    parents = (draws * (torch.arange(nodes) + 1)).long() - 1
    return tree(parents, prefix)


def random_mask(
    nq: int, nk: int, *, seed: int, batch: int = 1, heads: int = 1, key_bounds: bool = False
) -> IntervalMask:
    """Two random ranges per row (some empty, some overlapping), and random query ranges per key if asked for."""
    generator = torch.Generator().manual_seed(seed)
    ends = torch.randint(0, nk + 1, (batch, heads, nq, 2, 2), generator=generator)
    bounds = ends.sort(dim=-1).values.flatten(-2).int()
    queries = None
    if key_bounds:
        queries = torch.randint(0, nq + 1, (batch, nk, 2), generator=generator).sort(dim=-1).values.int()
    return IntervalMask(bounds, nk, key_bounds=queries)


@dataclass
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    grad_lse: Tensor
    key_bias: Tensor | None = None
    sinks: Tensor | None = None


def make_inputs(
    mask: IntervalMask,
    *,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 64,
    v_dim: int | None = None,
    kv_batch: int | None = None,
    key_bias: bool = False,
    sinks: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    values = dim if v_dim is None else v_dim
    pairs = batch if kv_batch is None else kv_batch

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    grad_lse = torch.randn(batch, heads, mask.nq, generator=generator)
    return Inputs(
        draw(batch, heads, mask.nq, dim),
        draw(pairs, kv_heads, mask.nk, dim),
        draw(pairs, kv_heads, mask.nk, values),
        draw(batch, heads, mask.nq, values),
        grad_lse,
        torch.randn(1, heads, mask.nk, generator=generator) if key_bias else None,
        torch.randn(heads, generator=generator) if sinks else None,
    )


Results = dict[str, Tensor]


def run(
    function, inputs: Inputs, mask: IntervalMask, dtype: torch.dtype, scale: float | None = None
) -> Results:
    """Outputs and gradients of one implementation computed in `dtype` from the same rounded inputs."""
    q, k, v = (x.to(dtype).requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    # These are float32 whatever the storage type; float64 for the exact result.
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    extra = {
        name: x.to(precise).requires_grad_()
        for name, x in (("key_bias", inputs.key_bias), ("sinks", inputs.sinks))
        if x is not None
    }
    out, lse = function(q, k, v, mask, scale=scale, return_lse=True, **extra)
    seen = torch.isfinite(lse)
    grad_lse = torch.where(seen, inputs.grad_lse, 0.0).to(lse.dtype)
    torch.autograd.backward([out, lse], [inputs.grad_out.to(dtype), grad_lse])
    grads = {f"grad_{name}": x.grad for name, x in extra.items()}
    return {
        "out": out.detach(),
        "lse": lse.detach(),
        "grad_q": q.grad,
        "grad_k": k.grad,
        "grad_v": v.grad,
        **grads,
    }


# Smallest error that the rounding of a result of magnitude 1 justifies.
FLOOR = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def assert_as_good_as_eager(
    inputs: Inputs, mask: IntervalMask, scale: float | None = None, function=block_sparse_attention
) -> None:
    """|ours - float64| <= 2 * |eager PyTorch in the same precision - float64| + floor of the dtype."""
    dtype = inputs.q.dtype
    exact = run(reference_block_sparse_attention, inputs, mask, torch.float64, scale)
    eager = run(reference_block_sparse_attention, inputs, mask, dtype, scale)
    ours = run(function, inputs, mask, dtype, scale)
    for name, expected in exact.items():
        got = ours[name].double()
        assert got.shape == expected.shape, name
        finite = torch.isfinite(expected)
        assert torch.equal(torch.isfinite(got), finite), f"{name}: infinities or NaN in other places"
        if not finite.any():
            continue
        error = (got - expected)[finite].abs().max().item()
        lost = (eager[name].double() - expected)[finite].abs().max().item()
        size = max(1.0, expected[finite].abs().max().item())
        floor = (2e-6 if name == "lse" else FLOOR[dtype]) * size
        if math.isnan(lost):
            lost = 0.0
        assert error <= 2 * lost + floor, (
            f"{name}: error {error:.3e}, eager loses {lost:.3e}, floor {floor:.1e}"
        )
