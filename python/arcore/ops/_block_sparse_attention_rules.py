"""What torch is told about ``arcore::block_sparse_attention``: shapes, autocast, vmap and derivatives.

First derivatives are kernels: ``_backward`` (reverse) and ``_jvp`` (forward). All second ones come from one function
more. With J the Jacobian of (out, lse), t tangents of the inputs and g gradients of the outputs, the backward computes
``J^T g``, the jvp ``J t``, and `_second` the gradient of ``<g, J t>``, which is also the tangent of ``J^T g`` along t.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from arcore import _extension as _extension
from arcore.ops._checks import autocasts, same_device
from arcore.ops._registration import forbid_derivative, register_derivatives

OPS = torch.ops.arcore
_LIBRARY = torch.library.Library("arcore", "FRAGMENT")
_LIBRARY.define(
    "block_sparse_attention_second(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out,"
    " Tensor lse, Tensor? tangent_q, Tensor? tangent_k, Tensor? tangent_v, Tensor? tangent_key_bias,"
    " Tensor tangent_out, Tensor tangent_lse, Tensor bounds, Tensor? key_bounds, float scale, Tensor? tree_words=None,"
    " Tensor? tree_prefix=None, Tensor? key_bias=None)"
    " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_key_bias)"
)

# Logits that the functions written in PyTorch below hold at once, per tensor of that size (about eight).
_LOGITS_AT_ONCE = 1 << 21


# Shapes.


def _output_like(q: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q) if v.shape[-1] == q.shape[-1] else q.new_empty((*q.shape[:-1], v.shape[-1]))


def _no_bias(q: Tensor) -> Tensor:
    return q.new_empty((0,), dtype=torch.float32)


@torch.library.register_fake("arcore::block_sparse_attention")
def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor,
    key_bounds: Tensor | None,
    scale: float,
    plan_by_query: Tensor | None = None,
    plan_by_key: Tensor | None = None,
    tree_words: Tensor | None = None,
    tree_prefix: Tensor | None = None,
    key_bias: Tensor | None = None,
    plan_sm90: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    same_device(
        "arcore::block_sparse_attention",
        q=q,
        k=k,
        v=v,
        bounds=bounds,
        key_bounds=key_bounds,
        tree_words=tree_words,
        tree_prefix=tree_prefix,
        key_bias=key_bias,
    )
    return _output_like(q, v), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.register_fake("arcore::block_sparse_attention_backward")
def _fake_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bounds: Tensor,
    key_bounds: Tensor | None,
    scale: float,
    plan_by_query: Tensor | None = None,
    plan_by_key: Tensor | None = None,
    tree_words: Tensor | None = None,
    tree_prefix: Tensor | None = None,
    key_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    same_device(
        "arcore::block_sparse_attention_backward",
        q=q,
        k=k,
        v=v,
        grad_out=grad_out,
        grad_lse=grad_lse,
        out=out,
        lse=lse,
        bounds=bounds,
        key_bounds=key_bounds,
        tree_words=tree_words,
        tree_prefix=tree_prefix,
        key_bias=key_bias,
    )
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), _fake_bias_gradient(q, k, key_bias)


def _fake_bias_gradient(q: Tensor, k: Tensor, key_bias: Tensor | None) -> Tensor:
    if key_bias is None:
        return _no_bias(q)
    return q.new_empty((q.shape[0], q.shape[1], k.shape[2]), dtype=torch.float32)


@torch.library.register_fake("arcore::block_sparse_attention_jvp")
def _fake_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tangent_q: Tensor | None,
    tangent_k: Tensor | None,
    tangent_v: Tensor | None,
    tangent_key_bias: Tensor | None,
    bounds: Tensor,
    key_bounds: Tensor | None,
    scale: float,
    tree_words: Tensor | None = None,
    tree_prefix: Tensor | None = None,
    key_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    same_device(
        "arcore::block_sparse_attention_jvp",
        q=q,
        k=k,
        v=v,
        out=out,
        lse=lse,
        tangent_q=tangent_q,
        tangent_k=tangent_k,
        tangent_v=tangent_v,
        tangent_key_bias=tangent_key_bias,
        bounds=bounds,
        key_bounds=key_bounds,
        tree_words=tree_words,
        tree_prefix=tree_prefix,
        key_bias=key_bias,
    )
    return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.register_fake("arcore::block_sparse_attention_second")
def _fake_second(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tangent_q: Tensor | None,
    tangent_k: Tensor | None,
    tangent_v: Tensor | None,
    tangent_key_bias: Tensor | None,
    tangent_out: Tensor,
    tangent_lse: Tensor,
    bounds: Tensor,
    key_bounds: Tensor | None,
    scale: float,
    tree_words: Tensor | None = None,
    tree_prefix: Tensor | None = None,
    key_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        _fake_bias_gradient(q, k, key_bias),
    )


@torch.library.register_fake("arcore::interval_tile_plan")
def _fake_plan(
    bounds: Tensor,
    key_bounds: Tensor | None,
    nk: int,
    tile_q: int,
    tile_k: int,
    by_key: bool,
    halves: bool = False,
    visits: bool = False,
) -> Tensor:
    batch = bounds.shape[0] if key_bounds is None else max(bounds.shape[0], key_bounds.shape[0])
    across_q, across_k = (bounds.shape[2] + tile_q - 1) // tile_q, (nk + tile_k - 1) // tile_k
    rows, columns = (across_k, across_q) if by_key else (across_q, across_k)
    return bounds.new_empty(batch, bounds.shape[1], rows, 2 + columns * (1 + visits))


# Derivatives. Inputs of the forward, in order:
# q, k, v, bounds, key_bounds, scale, plan_by_query, plan_by_key, tree_words, tree_prefix, key_bias, plan_sm90.


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *mask, scale, plan_by_query, plan_by_key, tree_words, tree_prefix, key_bias, _ = inputs
    ctx.save_for_backward(
        q, k, v, *output, *mask, plan_by_query, plan_by_key, tree_words, tree_prefix, key_bias
    )
    ctx.scale = scale
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, bounds, key_bounds, plan_by_query, plan_by_key, *tree, key_bias = ctx.saved_tensors
    if grad_out is None and grad_lse is None:
        return (None,) * 12
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    *grads, grad_bias = OPS.block_sparse_attention_backward(
        grad_out,
        grad_lse,
        q,
        k,
        v,
        out,
        lse,
        bounds,
        key_bounds,
        ctx.scale,
        plan_by_query,
        plan_by_key,
        *tree,
        key_bias,
    )
    return *grads, *(None,) * 7, _like_bias(grad_bias, key_bias), None


def _like_bias(grad: Tensor, key_bias: Tensor | None) -> Tensor | None:
    return None if key_bias is None else grad.sum_to_size(key_bias.shape)


def _tangents(
    inputs: tuple[Any, ...], outputs: tuple[Tensor, ...], moving: tuple[Tensor | None, ...]
) -> tuple[Tensor, Tensor]:
    q, k, v, bounds, key_bounds, scale, _, _, *tree, key_bias, _ = inputs
    tangent_out, tangent_lse = OPS.block_sparse_attention_jvp(
        q,
        k,
        v,
        *outputs,
        *moving[:3],
        _contiguous(moving[10]),
        bounds,
        key_bounds,
        scale,
        *tree,
        key_bias,
    )
    return tangent_out, tangent_lse


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


register_derivatives("block_sparse_attention", _backward, _setup, _tangents)


# Inputs of the backward: grad_out, grad_lse, q, k, v, out, lse, bounds, key_bounds, scale, plan_by_query, plan_by_key,
# tree_words, tree_prefix, key_bias. out and lse are functions of q, k and v, and are not differentiated on their own.


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, scale, _, _, tree_words, tree_prefix, key_bias = inputs
    ctx.save_for_backward(*tensors, tree_words, tree_prefix, key_bias)
    ctx.scale = scale
    ctx.set_materialize_grads(False)


def _backward_of_backward(
    ctx: Any,
    tangent_q: Tensor | None,
    tangent_k: Tensor | None,
    tangent_v: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor | None, ...]:
    grad_out, grad_lse, q, k, v, out, lse, bounds, key_bounds, *tree, key_bias = ctx.saved_tensors
    moving = (tangent_q, tangent_k, tangent_v, None if key_bias is None else _contiguous(bias))
    if all(t is None for t in moving):
        return (None,) * 15
    tangents, grads = _second_order(
        grad_out, grad_lse, (q, k, v, out, lse), moving, (bounds, key_bounds, ctx.scale, *tree, key_bias)
    )
    *grads_qkv, grad_bias = grads
    tangent_lse = None if grad_lse is None else tangents[1]
    return tangents[0], tangent_lse, *grads_qkv, *(None,) * 9, _like_bias(grad_bias, key_bias)


def _second_order(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    values: tuple[Tensor, ...],
    moving: tuple[Tensor | None, ...],
    rest: tuple[Any, ...],
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, ...]]:
    tangents = OPS.block_sparse_attention_jvp(*values, *moving, *rest)
    return tangents, OPS.block_sparse_attention_second(grad_out, grad_lse, *values, *moving, *tangents, *rest)


def _tangents_of_backward(
    inputs: tuple[Any, ...], outputs: tuple[Tensor, ...], moving: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    grad_out, grad_lse, *values, bounds, key_bounds, scale, _, _, tree_words, tree_prefix, key_bias = inputs
    rest = (bounds, key_bounds, scale, tree_words, tree_prefix, key_bias)
    total: list[Tensor | None] = [None] * 4
    steps = (*moving[2:5], _contiguous(moving[14]))
    if any(t is not None for t in steps):
        total = list(_second_order(grad_out, grad_lse, tuple(values), steps, rest)[1])
    if moving[0] is not None or moving[1] is not None:
        step = torch.zeros_like(grad_out) if moving[0] is None else moving[0]
        more = OPS.block_sparse_attention_backward(
            step, moving[1], *values, bounds, key_bounds, scale, None, None, tree_words, tree_prefix, key_bias
        )
        total = [b if a is None else a + b for a, b in zip(total, more, strict=True)]
    if key_bias is None:
        total[3] = None
    return tuple(total)


register_derivatives(
    "block_sparse_attention_backward", _backward_of_backward, _setup_backward, _tangents_of_backward
)


# Inputs of the jvp: q, k, v, out, lse, tangent_q, tangent_k, tangent_v, tangent_key_bias, bounds, key_bounds, scale,
# tree_words, tree_prefix, key_bias.


def _setup_jvp(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, scale, tree_words, tree_prefix, key_bias = inputs
    ctx.save_for_backward(*tensors, tree_words, tree_prefix, key_bias, *output)
    ctx.scale = scale
    ctx.set_materialize_grads(False)


def _backward_of_jvp(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out is None and grad_lse is None:
        return (None,) * 15
    *values, bounds, key_bounds, tree_words, tree_prefix, key_bias, tangent_out, tangent_lse = (
        ctx.saved_tensors
    )
    q, k, v, out, lse, *moving = values
    grad_out = torch.zeros_like(tangent_out) if grad_out is None else grad_out
    mask = (bounds, key_bounds, ctx.scale)
    tree = (tree_words, tree_prefix, key_bias)
    *grads, grad_bias = OPS.block_sparse_attention_second(
        grad_out, grad_lse, q, k, v, out, lse, *moving, tangent_out, tangent_lse, *mask, *tree
    )
    *linear, linear_bias = OPS.block_sparse_attention_backward(
        grad_out, grad_lse, q, k, v, out, lse, *mask, None, None, *tree
    )
    steps = [
        None if t is None else g
        for t, g in zip(moving, (*linear, _like_bias(linear_bias, key_bias)), strict=True)
    ]
    return *grads, None, None, *steps, *(None,) * 5, _like_bias(grad_bias, key_bias)


def _no_second_forward(*_: Any) -> Any:
    raise RuntimeError(
        "arcore::block_sparse_attention has no nested forward-mode derivative; "
        "use reference_block_sparse_attention where you need one"
    )


register_derivatives("block_sparse_attention_jvp", _backward_of_jvp, _setup_jvp, _no_second_forward)
forbid_derivative(
    "block_sparse_attention_second",
    "arcore::block_sparse_attention has no third derivative; use reference_block_sparse_attention where you need one",
)


# In PyTorch, some query rows at a time: what no kernel does. Never O(Nq Nk) memory.


class _Rows:
    """Logits of some query rows; heads are folded into the rows of their key head, [B, Hkv, G * rows, ...]."""

    def __init__(
        self,
        begin: int,
        end: int,
        q: Tensor,
        k: Tensor,
        bounds: Tensor,
        key_bounds: Tensor | None,
        scale: float,
        tree_words: Tensor | None,
        tree_prefix: Tensor | None,
        key_bias: Tensor | None,
    ) -> None:
        self.begin, self.end, self.kv_heads = begin, end, k.shape[1]
        self.heads, self.nk = q.shape[1], k.shape[2]
        self.batch = q.shape[0]
        row = torch.arange(begin, end, device=q.device)
        key = torch.arange(self.nk, device=q.device)
        ranges = bounds[:, :, begin:end].unflatten(-1, (-1, 2)).unsqueeze(-2)  # [Bm, Hm, rows, I, 1, 2]
        allowed = ((ranges[..., 0] <= key) & (key < ranges[..., 1])).any(3)  # [Bm, Hm, rows, Nk]
        if key_bounds is not None:
            seen = key_bounds.unsqueeze(1)  # [Bm, 1, Nk, 2]
            allowed = allowed & ((seen[..., 0] <= row[:, None]) & (row[:, None] < seen[..., 1])).unsqueeze(1)
        if tree_words is not None and tree_prefix is not None:
            node = key - tree_prefix.unsqueeze(1)  # [Bp, Nk]
            words = tree_words[:, begin:end]  # [Bw, rows, W]
            at = node.clamp(0, 64 * words.shape[2] - 1)
            batch = max(words.shape[0], node.shape[0])
            word = words.expand(batch, -1, -1).gather(
                2, (at // 64).unsqueeze(1).expand(batch, end - begin, -1)
            )
            bit = (word >> (at % 64).unsqueeze(1) & 1).bool() & (node < 64 * words.shape[2]).unsqueeze(1)
            allowed = allowed & (bit | (node < 0).unsqueeze(1)).unsqueeze(1)
        self.allowed = self.fold(allowed.expand(self.batch, self.heads, -1, -1))
        self.q = self.rows(q) * scale
        logits = self.q @ k.float().transpose(2, 3)
        if key_bias is not None:
            logits = logits + self.bias(key_bias)
        self.logits = logits

    def fold(self, x: Tensor) -> Tensor:
        """[B, H, rows, ...] -> [B, Hkv, G * rows, ...]."""
        folded: Tensor = x.unflatten(1, (self.kv_heads, -1)).flatten(2, 3)
        return folded

    def unfold(self, x: Tensor) -> Tensor:
        rows: Tensor = x.unflatten(2, (-1, self.end - self.begin)).flatten(1, 2)
        return rows

    def rows(self, x: Tensor) -> Tensor:
        return self.fold(x[:, :, self.begin : self.end].float())

    def bias(self, x: Tensor) -> Tensor:
        whole = x.unsqueeze(2).expand(self.batch, self.heads, self.end - self.begin, self.nk)
        return self.fold(whole)

    def weights(self, lse: Tensor) -> Tensor:
        shift = self.rows(lse).unsqueeze(-1)
        return self.where(torch.exp(self.logits - shift.where(shift > -math.inf, 0.0)))

    def where(self, x: Tensor) -> Tensor:
        return x.where(self.allowed, 0.0)

    def moved(
        self,
        k: Tensor,
        tangent_q: Tensor | None,
        tangent_k: Tensor | None,
        tangent_bias: Tensor | None,
        scale: float,
    ) -> Tensor:
        """Tangents of the logits, 0 where forbidden."""
        total = torch.zeros_like(self.logits)
        if tangent_q is not None:
            total = total + self.rows(tangent_q) @ (k.float() * scale).transpose(2, 3)
        if tangent_k is not None:
            total = total + self.q @ tangent_k.float().transpose(2, 3)
        if tangent_bias is not None:
            total = total + self.bias(tangent_bias)
        return self.where(total)


def _some_rows(q: Tensor, k: Tensor, *rest: Any) -> Iterator[_Rows]:
    at_once = max(1, _LOGITS_AT_ONCE // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    for begin in range(0, q.shape[2], at_once):
        yield _Rows(begin, min(begin + at_once, q.shape[2]), q, k, *rest)


def _finite(x: Tensor) -> Tensor:
    """What a weight of 0 may be multiplied with; rows that see the others are NaN through their logits."""
    x = x.float()
    return x.where(x.isfinite(), 0.0)


def attention_by_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor,
    key_bounds: Tensor | None,
    scale: float,
    tree_words: Tensor | None,
    tree_prefix: Tensor | None,
    key_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Attention in PyTorch, in float32, for what has no CUDA kernel: trees and key biases.

    Differentiable by PyTorch in both modes and any number of times; the weights of some rows at a time are computed
    again for the backward. Where a row may see a number that is not finite, its own is NaN.
    """
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, key_bias))
    dtype = torch.get_autocast_dtype(q.device.type) if autocasts(q) else q.dtype
    at_once = max(1, _LOGITS_AT_ONCE // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    parts = []
    with torch.autocast(q.device.type, enabled=False):
        for begin in range(0, max(q.shape[2], 1), at_once):
            end = min(begin + at_once, q.shape[2])
            rest = (q, k, v, bounds, key_bounds, scale, tree_words, tree_prefix, key_bias)
            if wanted and at_once < q.shape[2]:
                parts.append(checkpoint(_attend, begin, end, *rest, use_reentrant=False))
            else:
                parts.append(_attend(begin, end, *rest))
    out, lse = (torch.cat(x, dim=2) for x in zip(*parts, strict=True))
    return out.to(dtype), lse


def _attend(begin: int, end: int, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    rows = _Rows(begin, end, q, k, *rest)
    empty = ~rows.allowed.any(-1, keepdim=True)
    # A row without keys keeps finite numbers on the way, for its gradient.
    logits = rows.logits.where(rows.allowed, -math.inf).masked_fill(empty, 0.0)
    lse = torch.logsumexp(logits, -1, keepdim=True)
    weights = rows.where(torch.exp(logits - lse))
    seen = rows.allowed.float() @ (~v.isfinite()).float() > 0
    out = (weights @ _finite(v)).masked_fill(seen, math.nan)
    return rows.unfold(out), rows.unfold(lse.masked_fill(empty, -math.inf)).squeeze(-1)


def tiled_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tangent_q: Tensor | None,
    tangent_k: Tensor | None,
    tangent_v: Tensor | None,
    tangent_key_bias: Tensor | None,
    bounds: Tensor,
    key_bounds: Tensor | None,
    scale: float,
    tree_words: Tensor | None = None,
    tree_prefix: Tensor | None = None,
    key_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``arcore::block_sparse_attention_jvp`` in PyTorch, where there is no kernel for it (CUDA)."""
    tangent_out = q.new_empty((*q.shape[:3], v.shape[3]))
    tangent_lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    mask = (bounds, key_bounds, scale, tree_words, tree_prefix, key_bias)
    poison = [_poison(x) for x in (v, tangent_v)]
    for rows in _some_rows(q, k, *mask):
        weights = rows.weights(lse)
        moved = rows.moved(k, tangent_q, tangent_k, tangent_key_bias, scale)
        mean = (weights * moved).sum(-1, keepdim=True)
        total = rows.where(weights * (moved - mean)) @ _finite(v)
        if tangent_v is not None:
            total = total + weights @ _finite(tangent_v)
        for x in poison:
            if x is not None:
                total = total.masked_fill(rows.allowed.float() @ x > 0, math.nan)
        tangent_out[:, :, rows.begin : rows.end] = rows.unfold(total).to(q.dtype)
        tangent_lse[:, :, rows.begin : rows.end] = rows.unfold(mean)[..., 0]
    return tangent_out, tangent_lse


def _poison(x: Tensor | None) -> Tensor | None:
    """Where x is not finite, as ones; None if it is finite everywhere."""
    bad = None if x is None else ~x.isfinite()
    return bad.float() if bad is not None and bool(bad.any()) else None


def _second(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tangent_q: Tensor | None,
    tangent_k: Tensor | None,
    tangent_v: Tensor | None,
    tangent_key_bias: Tensor | None,
    tangent_out: Tensor,
    tangent_lse: Tensor,
    bounds: Tensor,
    key_bounds: Tensor | None,
    scale: float,
    tree_words: Tensor | None = None,
    tree_prefix: Tensor | None = None,
    key_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradient of ``<grad_out, tangent_out> + <grad_lse, tangent_lse>`` in q, k, v and key_bias.

    With T the tangents of the logits, e = T - tangent_lse, a = grad_out v^T, b = grad_out tangent_v^T and row numbers
    m = <grad_out, out>, c = <grad_out, tangent_out>: the gradient is ``W = P (e (a - m + grad_lse) + b - c)`` in the
    logits, ``U = P (a - m + grad_lse)`` in T, and ``(P e)^T grad_out`` in v.
    """
    grad_q = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    grad_k = torch.zeros(k.shape, dtype=torch.float32, device=q.device)
    grad_v = torch.zeros(v.shape, dtype=torch.float32, device=q.device)
    grad_bias = None if key_bias is None else grad_q.new_zeros(q.shape[0], q.shape[1], k.shape[2])
    values, keys = v.float().transpose(2, 3), _finite(k)
    mask = (bounds, key_bounds, scale, tree_words, tree_prefix, key_bias)
    for rows in _some_rows(q, k, *mask):
        grads = rows.rows(grad_out)
        weights = rows.weights(lse)
        from_mean = rows.moved(k, tangent_q, tangent_k, tangent_key_bias, scale) - rows.rows(
            tangent_lse
        ).unsqueeze(-1)
        centre = (grads * rows.rows(out)).sum(-1, keepdim=True)
        spread = (grads * rows.rows(tangent_out)).sum(-1, keepdim=True)
        inner = grads @ values - centre
        if grad_lse is not None:
            inner = inner + rows.rows(grad_lse).unsqueeze(-1)
        of_logits = from_mean * inner - spread
        if tangent_v is not None:
            of_logits = of_logits + grads @ tangent_v.float().transpose(2, 3)
        of_logits = rows.where(weights * of_logits)
        of_tangents = rows.where(weights * inner)
        of_values = rows.where(weights * from_mean)
        # A row that is not finite reaches all keys that it may see, whatever their weight.
        bad_row = ~grads.isfinite().all(-1, keepdim=True)
        of_values = of_values.masked_fill(bad_row & rows.allowed, math.nan)

        grad = of_logits @ keys
        grad_k += of_logits.transpose(2, 3) @ _finite(rows.q)
        if tangent_k is not None:
            grad = grad + of_tangents @ _finite(tangent_k)
        if tangent_q is not None:
            grad_k += of_tangents.transpose(2, 3) @ (_finite(rows.rows(tangent_q)) * scale)
        grad_v += of_values.transpose(2, 3) @ _finite(grads)
        grad_q[:, :, rows.begin : rows.end] = rows.unfold(grad * scale)
        if grad_bias is not None:
            grad_bias += rows.unfold(of_logits).sum(2)
    bias = _no_bias(q) if grad_bias is None else grad_bias
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), bias


_LIBRARY.impl("block_sparse_attention_second", _second, "CompositeExplicitAutograd")
torch.library.impl("arcore::block_sparse_attention_jvp", "CUDA", tiled_jvp)


# vmap: the mapped dimension joins the batch. For each argument "rows" (one entry per batch entry), "mask" (one entry,
# or one per batch entry), or "" for what is no tensor or can be built again.

_MASK = {
    "bounds": "mask",
    "key_bounds": "mask",
    "tree_words": "mask",
    "tree_prefix": "mask",
    "key_bias": "mask",
}
_MASK |= {"tangent_key_bias": "mask", "scale": "", "plan_by_query": "", "plan_by_key": "", "plan_sm90": ""}


def _register_vmap(op: str) -> None:
    overload = getattr(OPS, op).default
    kinds = [_MASK.get(argument.name, "rows") for argument in overload._schema.arguments]
    q_at = [argument.name for argument in overload._schema.arguments].index("q")

    def rule(info: Any, dims: Sequence[int | None], *given: Any) -> tuple[Any, Any]:
        size = info.batch_size
        q, dim = given[q_at], dims[q_at]
        batch = (q if dim is None else q.movedim(dim, 0)[0]).shape[0]

        def merged(x: Any, dim: int | None, kind: str) -> Any:
            if not isinstance(x, Tensor):
                return x
            if kind == "":
                return None
            if dim is None:
                if kind == "mask" and x.shape[0] == 1:
                    return x
                whole = x.expand(size, *x.shape)
            else:
                whole = x.movedim(dim, 0)
                if kind == "mask":
                    whole = whole.expand(size, batch, *whole.shape[2:])
            joined = whole.flatten(0, 1)
            return joined.contiguous() if kind == "mask" else joined

        arguments = [merged(x, d, kind) for x, d, kind in zip(given, dims, kinds, strict=False)]
        results = overload(*arguments)
        split = [x if x.dim() == 1 else x.unflatten(0, (size, batch)) for x in results]
        return tuple(split), tuple(None if x.dim() == 1 else 0 for x in results)

    torch.library.register_vmap(f"arcore::{op}", rule)


for _op in ("", "_backward", "_jvp", "_second"):
    _register_vmap(f"block_sparse_attention{_op}")


def _register_autocast(device_type: str, key: str) -> torch.library.Library:
    library = torch.library.Library("arcore", "IMPL")
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        dtype = torch.get_autocast_dtype(device_type)
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            out, lse = OPS.block_sparse_attention(q.to(dtype), k.to(dtype), v.to(dtype), *rest)
        return out, lse

    library.impl("block_sparse_attention", cast, key)
    return library


_AUTOCAST = [_register_autocast("cpu", "AutocastCPU"), _register_autocast("cuda", "AutocastCUDA")]
