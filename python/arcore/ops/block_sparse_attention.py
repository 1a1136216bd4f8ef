"""Attention under an `IntervalMask`: public function, reference, and the op's fake, autograd and autocast rules.

The math, the tiles and the numerics are in csrc/block_sparse_attention/README.md.
"""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from arcore import _extension as _extension
from arcore.masks import IntervalMask
from arcore.ops._constants import capturing
from arcore.ops._registration import forbid_second_derivative

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256


@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: IntervalMask,
    *,
    scale: float | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...
@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: IntervalMask,
    *,
    scale: float | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: IntervalMask,
    *,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention restricted to the pairs that `mask` allows; forbidden tiles cost nothing.

    Computes ``softmax(scale * q @ k^T + M) @ v`` where ``M`` is 0 on allowed pairs and -inf elsewhere, with fp32
    accumulation whatever the storage type. Differentiable in q, k, v, and through the returned lse. The backward
    is deterministic; results do not depend on the number of threads or on the other entries of the batch.

    Args:
        q: queries, ``[B, H, Nq, D]``, float32, bfloat16 or float16. Any strides in the first three dimensions, so
            a ``[B, N, H, D]`` tensor may be passed as ``x.transpose(1, 2)`` without a copy. D is a multiple of 8,
            at most 256.
        k: keys, ``[B, Hkv, Nk, D]``; H must be a multiple of Hkv (grouped-query attention: head h reads key head
            ``h // (H // Hkv)``).
        v: values, ``[B, Hkv, Nk, D]``.
        mask: `arcore.masks.IntervalMask` for ``(Nq, Nk)``; its batch and head sizes are 1 or B and 1 or H.
        scale: factor on the logits; ``1 / sqrt(D)`` when None.
        return_lse: also return the log-sum-exp of each row's scaled, masked logits.

    Returns:
        ``[B, H, Nq, D]`` in q's dtype and memory layout; with `return_lse` also the lse, float32 ``[B, H, Nq]``,
        natural logarithm. A row that may see no key gives 0 and lse -inf, and has zero gradient.

    Raises:
        TypeError: `mask` is not an IntervalMask, or q, k, v have an unsupported or mixed dtype.
        ValueError: shapes, head counts, lengths, devices or `scale` do not fit.

    Reference: VAR (arXiv:2404.02905, section 3.2) for the block-causal mask; online softmax and its backward follow
    FlashAttention-2 (arXiv:2307.08691, section 3.1).
    """
    _check(q, k, v, mask, scale)
    if q.dtype not in SUPPORTED_DTYPES and not torch.is_autocast_enabled(q.device.type):
        raise TypeError(
            "arcore.block_sparse_attention: expected q of dtype float32, bfloat16 or float16 but got "
            f"{_name(q.dtype)}; for float64 (gradcheck) call reference_block_sparse_attention"
        )
    factor = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    plans = _cuda_plans(mask) if q.device.type == "cuda" else (None, None)
    out, lse = torch.ops.arcore.block_sparse_attention(q, k, v, mask.bounds, mask.key_bounds, factor, *plans)
    return (out, lse) if return_lse else out


# Queries and keys of a tile, and whether the plan goes by key: kForwardTile* and kBackwardTile* of params.h.
CUDA_TILES = ((128, 64, False), (64, 128, True))


def _cuda_plans(mask: IntervalMask) -> tuple[Tensor, Tensor]:
    """The tiles that the CUDA kernels visit, built on the device once per mask.

    In a compiled graph they are part of the graph, where equal calls of all layers become one. While a CUDA graph is
    captured nothing runs: plans built then exist from its first replay on, so they belong to the graph and not to the
    mask.
    """

    def build() -> tuple[Tensor, Tensor]:
        plan = torch.ops.arcore.interval_tile_plan
        forward, backward = (
            plan(mask.bounds, mask.key_bounds, mask.nk, tile_q, tile_k, by_key)
            for tile_q, tile_k, by_key in CUDA_TILES
        )
        return forward, backward

    if torch.compiler.is_compiling():
        return build()
    if capturing() and ("cuda_plans",) not in mask._cache:
        return build()

    def build_for_all_modes() -> tuple[Tensor, Tensor]:
        with torch.inference_mode(False):  # a later training step may save them
            return build()

    return mask._cached(("cuda_plans",), build_for_all_modes)


def reference_block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: IntervalMask,
    *,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`block_sparse_attention` in plain PyTorch, O(Nq * Nk) memory, any float dtype and device.

    Works in the dtype of its inputs, so float64 inputs give the oracle of the tests. Arguments, returns and errors
    are those of `block_sparse_attention`.
    """
    _check(q, k, v, mask, scale)
    factor = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    group = q.shape[1] // k.shape[1]
    allowed = mask.to_bool()  # [Bm, Hm, Nq, Nk]
    keys, values = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    logits = torch.where(allowed, q @ keys.transpose(-1, -2) * factor, -math.inf)  # [B, H, Nq, Nk]
    lse = torch.logsumexp(logits, dim=-1)
    # A row without keys would be exp(-inf + inf): give it a finite shift, its weights are 0 anyway.
    shift = torch.where(lse == -math.inf, 0.0, lse)
    weights = torch.exp(logits - shift.unsqueeze(-1))
    out = weights @ values
    if values.numel() and not torch.isfinite(values).all():
        # 0 * NaN is NaN: only values that a row may see can reach it.
        out = _weighted_sum_of_seen(weights, values, allowed)
    # logsumexp has a NaN gradient in rows without keys.
    empty = ~allowed.any(dim=-1)
    lse = torch.where(
        empty, -math.inf, torch.logsumexp(torch.where(empty.unsqueeze(-1), 0.0, logits), dim=-1)
    )
    return (out, lse.to(torch.promote_types(q.dtype, torch.float32))) if return_lse else out


def _weighted_sum_of_seen(weights: Tensor, values: Tensor, allowed: Tensor) -> Tensor:
    products = weights.unsqueeze(-1) * values.unsqueeze(2)  # [B, H, Nq, Nk, D]
    return torch.where(allowed.unsqueeze(-1), products, 0.0).sum(dim=3)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, scale: float | None) -> None:
    op = "arcore.block_sparse_attention"
    if not isinstance(mask, IntervalMask):
        raise TypeError(
            f"{op}: expected mask to be an arcore.masks.IntervalMask but got {type(mask).__name__}; "
            "build one with arcore.masks (causal, next_scale, from_bool, ...)"
        )
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{op}: expected {name} to be a tensor but got {type(x).__name__}")
        if x.dim() != 4:
            raise ValueError(f"{op}: expected {name} of shape [B, H, N, D] but got {tuple(x.shape)}")
    batch, heads, nq, dim = q.shape
    kv_heads, nk = k.shape[1], k.shape[2]
    if k.shape != (batch, kv_heads, nk, dim):
        raise ValueError(
            f"{op}: expected k of shape (B={batch}, Hkv, Nk, D={dim}), to fit q {tuple(q.shape)}, "
            f"but got {tuple(k.shape)}"
        )
    if v.shape != k.shape:
        raise ValueError(f"{op}: expected v of k's shape {tuple(k.shape)} but got {tuple(v.shape)}")
    if (kv_heads == 0) != (heads == 0) or (kv_heads and heads % kv_heads):
        raise ValueError(
            f"{op}: expected the heads of q to be a multiple of those of k but got H={heads} and Hkv={kv_heads}"
        )
    if dim % 8 or not 8 <= dim <= MAX_HEAD_DIM:
        raise ValueError(
            f"{op}: expected head_dim to be a multiple of 8 from 8 to {MAX_HEAD_DIM} but got {dim}; pad it"
        )
    # Autocast brings mixed inputs to one dtype.
    if (q.dtype != k.dtype or q.dtype != v.dtype) and not torch.is_autocast_enabled(q.device.type):
        raise TypeError(
            f"{op}: expected q, k and v of one dtype but got {_name(q.dtype)}, {_name(k.dtype)} and {_name(v.dtype)}"
        )
    if not (q.device == k.device == v.device == mask.bounds.device):
        raise ValueError(
            f"{op}: expected q, k, v and mask on one device but got {q.device}, {k.device}, {v.device} and "
            f"{mask.bounds.device}; move the mask with mask.to(device)"
        )
    if mask.nq != nq or mask.nk != nk:
        raise ValueError(
            f"{op}: expected a mask for Nq={nq} queries and Nk={nk} keys but got one for {mask.nq} and {mask.nk}; "
            "slice it, or build it for these lengths"
        )
    mask_batch, mask_heads = mask.bounds.shape[0], mask.bounds.shape[1]
    if mask_batch not in (1, batch) or mask_heads not in (1, heads):
        raise ValueError(
            f"{op}: expected the mask's batch and heads to be 1 or (B={batch}, H={heads}) "
            f"but got ({mask_batch}, {mask_heads})"
        )
    if mask.key_bounds is not None and mask.key_bounds.shape[0] not in (1, batch):
        raise ValueError(
            f"{op}: expected the batch of mask.key_bounds to be 1 or B={batch} but got {mask.key_bounds.shape[0]}"
        )
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"{op}: expected scale to be finite but got {scale}")


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
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


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
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@torch.library.register_fake("arcore::interval_tile_plan")
def _fake_plan(
    bounds: Tensor, key_bounds: Tensor | None, nk: int, tile_q: int, tile_k: int, by_key: bool
) -> Tensor:
    batch = bounds.shape[0] if key_bounds is None else max(bounds.shape[0], key_bounds.shape[0])
    across_q, across_k = (bounds.shape[2] + tile_q - 1) // tile_q, (nk + tile_k - 1) // tile_k
    rows, columns = (across_k, across_q) if by_key else (across_q, across_k)
    return bounds.new_empty(batch, bounds.shape[1], rows, 2 + columns)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bounds, key_bounds, scale, plan_by_query, plan_by_key = inputs
    ctx.save_for_backward(q, k, v, *output, bounds, key_bounds, plan_by_query, plan_by_key)
    ctx.scale = scale
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, bounds, key_bounds, plan_by_query, plan_by_key = ctx.saved_tensors
    if grad_out is None and grad_lse is None:
        return (None,) * 8
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = torch.ops.arcore.block_sparse_attention_backward(
        grad_out, grad_lse, q, k, v, out, lse, bounds, key_bounds, ctx.scale, plan_by_query, plan_by_key
    )
    return *grads, None, None, None, None, None


torch.library.register_autograd("arcore::block_sparse_attention", _backward, setup_context=_setup_context)


forbid_second_derivative("block_sparse_attention")


def _register_autocast(device_type: str, key: str) -> torch.library.Library:
    library = torch.library.Library("arcore", "IMPL")
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bounds: Tensor,
        key_bounds: Tensor | None,
        scale: float,
        plan_by_query: Tensor | None = None,
        plan_by_key: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.get_autocast_dtype(device_type)
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            out, lse = torch.ops.arcore.block_sparse_attention(
                q.to(dtype),
                k.to(dtype),
                v.to(dtype),
                bounds,
                key_bounds,
                scale,
                plan_by_query,
                plan_by_key,
            )
        return out, lse

    library.impl("block_sparse_attention", cast, key)
    return library


_AUTOCAST = [_register_autocast("cpu", "AutocastCPU"), _register_autocast("cuda", "AutocastCUDA")]
