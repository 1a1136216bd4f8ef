"""Attention under an `IntervalMask` or a `TreeMask`: the public function and its reference.

The math, the tiles and the numerics are in csrc/block_sparse_attention/README.md; what torch is told about the op is in
_block_sparse_attention_rules.py.
"""

from __future__ import annotations

import math
import os
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn.functional import pad

from arcore import _extension as _extension
from arcore.masks import IntervalMask, TreeMask
from arcore.ops import _block_sparse_attention_rules as _rules
from arcore.ops._checks import REFUSALS, autocasts, checked_call, integer, same_device
from arcore.ops._constants import OnAnyStream, capturing
from arcore.ops._registration import call_below, untracked

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OP = "arcore.block_sparse_attention"
_MOST = torch.finfo(torch.float32).max  # the kernels multiply in float32
_FORWARD = torch.ops.arcore.block_sparse_attention.default._op


@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: IntervalMask | TreeMask,
    *,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...
@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: IntervalMask | TreeMask,
    *,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: IntervalMask | TreeMask,
    *,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention restricted to the pairs that `mask` allows; forbidden tiles cost nothing.

    Computes ``softmax(scale * q @ k^T + key_bias + M) @ v`` where ``M`` is 0 on allowed pairs and -inf elsewhere, with
    fp32 accumulation whatever the storage type. Differentiable in q, k, v, key_bias, sinks, and through the returned
    lse: once and twice, in reverse and in forward mode (`torch.func`'s grad, jvp and vmap; forward mode is not nested).
    The derivatives are deterministic; results do not depend on the number of threads or on the other entries of the
    batch. Reverse mode costs 2.5 times the forward, forward mode as much; second derivatives are written in PyTorch,
    some query rows at a time, and take several times as long. None holds a matrix of Nq times Nk.

    Args:
        q: queries, ``[B, H, Nq, D]``, float32, bfloat16 or float16. Any strides in the first three dimensions, so
            a ``[B, N, H, D]`` tensor may be passed as ``x.transpose(1, 2)`` without a copy. Any D on a CPU; on CUDA up
            to 128, padded with zeros where it is no multiple of 8.
        k: keys, ``[B, Hkv, Nk, D]``; H must be a multiple of Hkv (grouped-query attention: head h reads key head
            ``h // (H // Hkv)``). A batch of 1 serves all entries of q.
        v: values, ``[B, Hkv, Nk, Dv]`` with k's batch. Dv may differ from D; on CUDA the smaller is padded with zeros.
        mask: `arcore.masks.IntervalMask` for ``(Nq, Nk)``, whose batch and head sizes are 1 or B and 1 or H; or
            `arcore.masks.TreeMask` for Nq nodes and Nk keys, whose batch size is 1 or B (on CUDA in PyTorch).
        scale: factor on the logits; ``1 / sqrt(D)`` when None.
        key_bias: added to the logits of each key, ``[Nk]``, ``[H, Nk]`` or ``[1 or B, 1 or H, Nk]``, float32 (others
            are converted); on CUDA in PyTorch, some query rows at a time. Attention with linear biases (ALiBi,
            arXiv:2108.12409) is `alibi_bias`.
        sinks: one logit per head, ``[H]``, that takes part in the softmax and has the value 0: a place for weight that
            no key deserves (gpt-oss). Counted in the lse.
        return_lse: also return the log-sum-exp of each row's scaled, masked logits.

    Returns:
        ``[B, H, Nq, Dv]`` in q's dtype, and in its memory layout where Dv is D; with `return_lse` also the lse, float32
        ``[B, H, Nq]``, natural logarithm. A row that may see no key gives 0 and lse -inf (with sinks: the sink), and
        has zero gradient.

    Raises:
        TypeError: `mask` is no mask, or q, k, v have an unsupported or mixed dtype.
        ValueError: shapes, head counts, lengths, devices or `scale` do not fit.

    Reference: VAR (arXiv:2404.02905, section 3.2) for the block-causal mask; online softmax and its backward follow
    FlashAttention-2 (arXiv:2307.08691, section 3.1).
    """
    if key_bias is None and sinks is None and type(mask) is IntervalMask and untracked(q, k, v):
        # The op checks tensors itself. Where something is wrong, or has to be brought into form, it is done below.
        try:
            plain = scale is None or (type(scale) is float and abs(scale) <= _MOST)
            if plain and q.is_cpu and k.shape[2] == mask.nk:
                factor = 1.0 / math.sqrt(q.shape[3]) if scale is None else scale
                both: tuple[Tensor, Tensor] = call_below(
                    _FORWARD, q, k, v, mask.bounds, mask.key_bounds, factor
                )
                return both if return_lse else both[0]
        except REFUSALS:
            pass
    _check(q, k, v, mask, scale, key_bias, sinks)
    if q.dtype not in SUPPORTED_DTYPES and not autocasts(q):
        raise TypeError(
            f"{_OP}: expected q of dtype float32, bfloat16 or float16 but got "
            f"{_name(q.dtype)}; for float64 (gradcheck) call reference_block_sparse_attention"
        )
    factor = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    batch, heads, value_dim = q.shape[0], q.shape[1], v.shape[-1]
    if k.shape[0] != batch:
        k, v = k.expand(batch, -1, -1, -1), v.expand(batch, -1, -1, -1)
    bias = None if key_bias is None else _three_dimensional(key_bias).float().contiguous()
    plans: tuple[Tensor | None, ...] = (None, None)
    words = prefix = key_bounds = None
    if isinstance(mask, TreeMask):
        words = mask.words if mask.words.dim() == 3 else mask.words.unsqueeze(2)
        prefix = mask.prefix
    else:
        key_bounds = mask.key_bounds
    if q.device.type == "cuda" and (words is not None or bias is not None):
        out, lse = _rules.attention_by_rows(q, k, v, mask.bounds, key_bounds, factor, words, prefix, bias)
    else:
        if q.device.type == "cuda":
            plans = _cuda_plans(mask)  # type: ignore[arg-type]
            q, k, v = _padded(q, k, v)
        out, lse = checked_call(
            "block_sparse_attention",
            torch.ops.arcore.block_sparse_attention,
            q,
            k,
            v,
            mask.bounds,
            key_bounds,
            factor,
            *plans[:2],
            words,
            prefix,
            bias,
            *plans[2:],
        )
    out = out[..., :value_dim] if out.shape[-1] != value_dim else out
    if sinks is not None:
        out, lse = _with_sinks(out, lse, sinks.float().view(1, heads, 1))
    return (out, lse) if return_lse else out


def alibi_bias(slopes: Tensor, nk: int) -> Tensor:
    """The `key_bias` of attention with linear biases: ``slope * (j - (nk - 1))`` for key j.

    The bias of ALiBi (arXiv:2108.12409, section 3), ``slope * (j - i)``, differs from it by a number per row, which the
    softmax does not see (the lse does). Keys far before the last one have large biases: their logits carry the rounding
    of float32 at that size, 1e-4 at 2,000.

    Args:
        slopes: one per head, ``[H]``.
        nk: number of keys.

    Returns:
        ``[H, nk]`` in the dtype of `slopes`.

    Raises:
        TypeError: `slopes` is no tensor of floats, or `nk` no integer.
        ValueError: `slopes` has another shape, or `nk` is negative.
    """
    same_device("arcore.alibi_bias", slopes=slopes)
    if integer("arcore.alibi_bias", "nk", nk) < 0:
        raise ValueError(f"arcore.alibi_bias: expected nk to be at least 0 but got {nk}")
    if not slopes.is_floating_point():
        raise TypeError(
            f"arcore.alibi_bias: expected slopes of a floating-point dtype but got {_name(slopes.dtype)}; "
            "convert them with .float()"
        )
    if slopes.dim() != 1:
        raise ValueError(f"arcore.alibi_bias: expected slopes of shape [H] but got {tuple(slopes.shape)}")
    place = torch.arange(1 - nk, 1, dtype=slopes.dtype, device=slopes.device)
    return slopes.unsqueeze(1) * place


def _with_sinks(out: Tensor, lse: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """One key more, of logit `sink` and value 0, from the result without it."""
    # -inf would meet -inf in a row without keys whose sink is -inf too.
    bottom = torch.finfo(torch.float32).min
    known = lse.clamp(min=bottom)
    share = torch.sigmoid(known - sink)
    total = torch.logaddexp(known, sink)
    total = total.masked_fill(total <= bottom, -math.inf)
    return (out.float() * share.unsqueeze(-1)).to(out.dtype), total


def _three_dimensional(key_bias: Tensor) -> Tensor:
    return key_bias.reshape((1,) * (3 - key_bias.dim()) + key_bias.shape)


def _padded(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The head_dim of all three brought to one multiple of 8 by zeros, which change no product."""
    dim, value_dim = q.shape[-1], v.shape[-1]
    wide = -(-max(dim, value_dim) // 8) * 8
    if wide != dim:
        q, k = pad(q, (0, wide - dim)), pad(k, (0, wide - dim))
    return q, k, v if wide == value_dim else pad(v, (0, wide - value_dim))


# Queries and keys of a tile, and whether the plan goes by key: kForwardTile* and kBackwardTile* of params.h.
CUDA_TILES = ((128, 64, False), (64, 128, True))
# The sm_90a forward's own: kTile*Sm90, with halves.
SM90_TILES = (128, 128, False, True)
# Of the second of CUDA_TILES for the fused sm_90a backward: with visits.
FUSED_TILES = (64, 128, True, False, True)


def _wants_sm90(device: torch.device) -> bool:
    """Whether a plan for the sm_90a kernels pays; csrc/block_sparse_attention/cuda.cpp decides on their use."""
    wish = os.environ.get("ARCORE_SM90A", "0")
    return wish not in ("", "0") and torch.cuda.get_device_capability(device) == (9, 0)


def _plans_wanted(device: torch.device) -> tuple[tuple[int | bool, ...], ...]:
    """Arguments of interval_tile_plan: by query, by key, and where they pay those of the sm_90a kernels."""
    if not _wants_sm90(device):
        return CUDA_TILES
    fused = os.environ.get("ARCORE_SM90A_BACKWARD", "two") == "fused"
    return (CUDA_TILES[0], FUSED_TILES if fused else CUDA_TILES[1], SM90_TILES)


def _cuda_plans(mask: IntervalMask) -> tuple[Tensor, ...]:
    """The tiles that the CUDA kernels visit, built on the device once per mask: by query, by key, and for sm_90a.

    The plan by key also holds the order of the fused sm_90a backward's sums where that one is asked for.

    In a compiled graph they are part of the graph, where equal calls of all layers become one. While a CUDA graph is
    captured nothing runs: plans built then exist from its first replay on, so they belong to the graph and not to the
    mask.
    """
    tiles = _plans_wanted(mask.device)

    def build() -> tuple[Tensor, ...]:
        plan = torch.ops.arcore.interval_tile_plan
        return tuple(plan(mask.bounds, mask.key_bounds, mask.nk, *t) for t in tiles)

    if torch.compiler.is_compiling():
        return build()
    key = ("cuda_plans", tiles)
    if key in mask._cache:
        kept: OnAnyStream[tuple[Tensor, ...]] = mask._cache[key]
        plans = kept.get()
        return build() if plans is None else plans
    if capturing():
        return build()
    with torch.inference_mode(False):  # a later training step may save them
        plans = build()
    mask._cache[key] = OnAnyStream(plans, plans)
    return plans


def reference_block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: IntervalMask | TreeMask,
    *,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`block_sparse_attention` in plain PyTorch, O(Nq * Nk) memory, any float dtype and device.

    Works in the dtype of its inputs, so float64 inputs give the oracle of the tests. Arguments, returns and errors
    are those of `block_sparse_attention`.
    """
    _check(q, k, v, mask, scale, key_bias, sinks)
    factor = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    group = q.shape[1] // k.shape[1] if k.shape[1] else 1
    allowed = mask.to_bool()  # [Bm, Hm, Nq, Nk]
    keys, values = (x.repeat_interleave(group, dim=1).expand(q.shape[0], -1, -1, -1) for x in (k, v))
    logits = q @ keys.transpose(-1, -2) * factor
    if key_bias is not None:
        logits = logits + _three_dimensional(key_bias).unsqueeze(2).to(logits.dtype)
    logits = torch.where(allowed, logits, -math.inf)  # [B, H, Nq, Nk]
    empty = ~allowed.any(dim=-1)
    if sinks is not None:
        # One key more, whose value is 0.
        sink = sinks.to(logits.dtype).view(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], 1)
        logits = torch.cat([logits, sink], dim=-1)
        allowed = pad(allowed, (0, 1), value=True)
        values, empty = pad(values, (0, 0, 0, 1)), torch.zeros_like(empty)
    lse = torch.logsumexp(logits, dim=-1)
    # A row without keys would be exp(-inf + inf): give it a finite shift, its weights are 0 anyway.
    shift = torch.where(lse == -math.inf, 0.0, lse)
    weights = torch.exp(logits - shift.unsqueeze(-1))
    out = weights @ values
    if values.numel() and not torch.isfinite(values).all():
        # 0 * NaN is NaN: only values that a row may see can reach it.
        out = _weighted_sum_of_seen(weights, values, allowed)
    # logsumexp has a NaN gradient in rows without keys.
    lse = torch.where(
        empty, -math.inf, torch.logsumexp(torch.where(empty.unsqueeze(-1), 0.0, logits), dim=-1)
    )
    return (out, lse.to(torch.promote_types(q.dtype, torch.float32))) if return_lse else out


def _weighted_sum_of_seen(weights: Tensor, values: Tensor, allowed: Tensor) -> Tensor:
    products = weights.unsqueeze(-1) * values.unsqueeze(2)  # [B, H, Nq, Nk, D]
    return torch.where(allowed.unsqueeze(-1), products, 0.0).sum(dim=3)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: IntervalMask | TreeMask,
    scale: Any,
    key_bias: Tensor | None,
    sinks: Tensor | None,
) -> None:
    op = _OP
    if not isinstance(mask, (IntervalMask, TreeMask)):
        raise TypeError(
            f"{op}: expected mask to be an arcore.masks.IntervalMask or TreeMask but got {type(mask).__name__}; "
            "build one with arcore.masks (causal, next_scale, from_bool, tree, ...)"
        )
    tree = isinstance(mask, TreeMask)
    same_device(op, q=q, k=k, v=v, mask=mask.bounds, key_bias=key_bias, sinks=sinks)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{op}: expected {name} of shape [B, H, N, D] but got {tuple(x.shape)}")
    batch, heads, nq, dim = q.shape
    kv_heads, nk = k.shape[1], k.shape[2]
    if k.shape[0] not in (1, batch) or k.shape[3] != dim:
        raise ValueError(
            f"{op}: expected k of shape (1 or B={batch}, Hkv, Nk, D={dim}), to fit q {tuple(q.shape)}, "
            f"but got {tuple(k.shape)}"
        )
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"{op}: expected v of shape ({k.shape[0]}, {kv_heads}, {nk}, Dv), to fit k, but got {tuple(v.shape)}"
        )
    if (kv_heads == 0) != (heads == 0) or (kv_heads and heads % kv_heads):
        raise ValueError(
            f"{op}: expected the heads of q to be a multiple of those of k but got H={heads} and Hkv={kv_heads}"
        )
    if dim == 0 or v.shape[3] == 0:
        raise ValueError(
            f"{op}: expected a head_dim of at least 1 but got D={dim} and Dv={v.shape[3]}; drop the empty heads"
        )
    # Autocast brings mixed inputs to one dtype.
    if (q.dtype != k.dtype or q.dtype != v.dtype) and not autocasts(q):
        raise TypeError(
            f"{op}: expected q, k and v of one dtype but got {_name(q.dtype)}, {_name(k.dtype)} and {_name(v.dtype)}"
        )
    if mask.nq != nq or mask.nk != nk:
        fix = "cut the cache at mask.nk keys" if tree else "slice it, or build it for these lengths"
        raise ValueError(
            f"{op}: expected a mask for Nq={nq} queries and Nk={nk} keys but got one for {mask.nq} and {mask.nk}; {fix}"
        )
    if mask.batch not in (1, batch) or mask.heads not in (1, heads):
        raise ValueError(
            f"{op}: expected the mask's batch and heads to be 1 or (B={batch}, H={heads}) "
            f"but got ({mask.batch}, {mask.heads})"
        )
    if isinstance(scale, str) or (isinstance(scale, Tensor) and scale.numel() != 1):
        raise TypeError(f"{op}: expected scale to be a number but got {scale!r}")
    # The kernels multiply in float32.
    if scale is not None and not abs(float(scale)) <= torch.finfo(torch.float32).max:
        raise ValueError(f"{op}: expected scale to be finite in float32 but got {scale}")
    if key_bias is not None:
        shape = tuple(_three_dimensional(key_bias).shape) if 1 <= key_bias.dim() <= 3 else ()
        fits = shape and shape[0] in (1, batch) and shape[1] in (1, heads) and shape[2] == nk
        if not fits or not key_bias.is_floating_point():
            raise ValueError(
                f"{op}: expected key_bias of shape [Nk={nk}], [H={heads}, Nk] or [1 or B={batch}, 1 or H, Nk] and a "
                f"floating-point dtype but got {tuple(key_bias.shape)} {_name(key_bias.dtype)}"
            )
    if sinks is not None and (sinks.shape != (heads,) or not sinks.is_floating_point()):
        raise ValueError(
            f"{op}: expected sinks of shape [H={heads}] and a floating-point dtype but got {tuple(sinks.shape)} "
            f"{_name(sinks.dtype)}"
        )
