"""`token_logprobs` with the last linear layer inside: logits exist one tile at a time, forward and backward.

The matrix products are torch's; statistics and gradients of a tile are the pieces of token_logprobs' kernel
(csrc/token_logprobs/README.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from arcore.ops._registration import forbid_second_derivative
from arcore.ops.token_logprobs import (
    MASK_BITS,
    TokenLogprobs,
    check_dtype,
    check_rows,
    float_rows,
    index_rows,
    reference_token_logprobs,
    split_temperature,
)

# One tile has at most this many rows and elements: large enough for matrix products at full speed, small beside the
# logits of a large vocabulary (8 MiB in float32).
TILE_ROWS = 1024
TILE_ELEMENTS = 2**21
TILE_COLUMNS = 4096


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    tile: tuple[int, int] | None = None,
) -> TokenLogprobs:
    """`token_logprobs` of ``linear(hidden, weight, bias)``, without ever holding the logits.

    Works through tiles of rows and columns of the logits; the backward computes each tile again (a third more
    multiplications than a head that keeps its logits). The logits of a tile have hidden's dtype, as those of `linear`
    do; gradients that add up over tiles are summed in float32. Differentiable through all outputs in hidden, weight,
    bias and a temperature tensor; gradients that nobody needs, such as that of a frozen head, are not computed.
    Under autocast hidden, weight and bias take its dtype.

    Args:
        hidden: ``[..., H]``, float32, bfloat16 or float16.
        weight: ``[V, H]``, hidden's dtype.
        target: int64 or int32 ``[...]``, or `ignore_index`.
        bias: ``[V]``, hidden's dtype.
        temperature: as in `token_logprobs`.
        softcap: as in `token_logprobs`.
        mask: as in `token_logprobs`. One that varies over some leading dimensions and broadcasts over others is copied.
        ignore_index: as in `token_logprobs`.
        return_entropy: also compute the entropy.
        tile: (rows, columns) of a tile, columns a multiple of 32; chosen by size when None.

    Returns:
        `TokenLogprobs`, float32, each of target's shape.

    Raises:
        TypeError: unsupported or mixed dtypes.
        ValueError: shapes or devices do not fit; temperature, softcap or tile is out of range.
        RuntimeError: a target is neither in [0, V) nor `ignore_index`, or an element of a temperature tensor is not
            positive and finite.
    """
    op = "linear_logprobs"
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    _check(hidden, weight, bias, target, softcap, mask, ignore_index)
    check_dtype(op, "hidden", hidden)
    scalar, rows = split_temperature(op, temperature, target)
    count = target.numel()
    tile_rows, tile_columns = _default_tile(count) if tile is None else tile
    if tile_rows < 1 or tile_columns < MASK_BITS or tile_columns % MASK_BITS:
        raise ValueError(
            f"arcore.{op}: expected tile to be (rows >= 1, a positive multiple of 32 columns) but got {tile}"
        )
    if mask is not None:
        width = mask.shape[-1]
        alike = mask.numel() == width
        mask = mask.reshape(1, width) if alike else mask.expand(*target.shape, width).reshape(count, width)
        mask = (mask if mask.stride(-1) == 1 else mask.contiguous()).expand(count, width)
    flat = None if rows is None else float_rows(rows.reshape(-1))
    logp, lse, entropy, _ = torch.ops.arcore.linear_logprobs(
        hidden.reshape(count, hidden.shape[-1]), weight, bias, index_rows(target).view(-1), flat, mask,
        scalar, softcap or 0.0, ignore_index, return_entropy, tile_rows, tile_columns,
    )  # fmt: skip
    return TokenLogprobs(
        logp.view(target.shape),
        lse.view(target.shape),
        entropy.view(target.shape) if return_entropy else None,
    )


def reference_linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    tile: tuple[int, int] | None = None,
) -> TokenLogprobs:
    """`linear_logprobs` by way of the whole logits, any float dtype and device; `tile` has no effect."""
    _check(hidden, weight, bias, target, softcap, mask, ignore_index)
    return reference_token_logprobs(
        linear(hidden, weight, bias), target, temperature=temperature, softcap=softcap, mask=mask,
        ignore_index=ignore_index, return_entropy=return_entropy,
    )  # fmt: skip


def _check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    softcap: float | None,
    mask: Tensor | None,
    ignore_index: int,
) -> None:
    op = "linear_logprobs"
    if hidden.dim() == 0 or weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"arcore.{op}: expected weight of shape (V, H={hidden.shape[-1] if hidden.dim() else '?'}), to fit hidden "
            f"{tuple(hidden.shape)}, but got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"arcore.{op}: expected bias of shape ({weight.shape[0]},), one per row of weight, "
            f"but got {tuple(bias.shape)}"
        )
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.dtype != hidden.dtype:
            raise TypeError(
                f"arcore.{op}: expected {name} of hidden's dtype {str(hidden.dtype).removeprefix('torch.')} but got "
                f"{str(x.dtype).removeprefix('torch.')}; convert one, or run under torch.autocast"
            )
        if x is not None and x.device != hidden.device:
            raise ValueError(
                f"arcore.{op}: expected {name} on hidden's device {hidden.device} but got {x.device}"
            )
    check_rows(op, "hidden", hidden, weight.shape[0], target, softcap, mask, ignore_index)


def _default_tile(rows: int) -> tuple[int, int]:
    tile_rows = min(max(rows, 1), TILE_ROWS)
    columns = min(TILE_COLUMNS, TILE_ELEMENTS // tile_rows)
    return tile_rows, columns // MASK_BITS * MASK_BITS


def _spans(total: int, size: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, total, size):
        yield begin, min(begin + size, total)


def _part(x: Tensor | None, begin: int, end: int) -> Tensor | None:
    return None if x is None else x[begin:end]


def _logits(out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """linear(hidden, weight, bias) in the memory of `out`."""
    logits = out.view(-1)[: hidden.shape[0] * weight.shape[0]].view(hidden.shape[0], weight.shape[0])
    if bias is None:
        return torch.mm(hidden, weight.t(), out=logits)
    return torch.addmm(bias, hidden, weight.t(), out=logits)


@torch.library.custom_op("arcore::linear_logprobs", mutates_args=(), device_types="cpu")
def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    temperature_rows: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    softcap: float,
    ignore_index: int,
    entropy: bool,
    tile_rows: int,
    tile_columns: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, vocab = hidden.shape[0], weight.shape[0]
    state = hidden.new_zeros(rows, 4, dtype=torch.float64)
    state[:, 0] = state[:, 3] = -math.inf
    buffer = hidden.new_empty(min(tile_rows, rows), min(tile_columns, vocab))
    for v0, v1 in _spans(vocab, tile_columns):
        for r0, r1 in _spans(rows, tile_rows):
            logits = _logits(buffer, hidden[r0:r1], weight[v0:v1], _part(bias, v0, v1))
            torch.ops.arcore.token_logprobs_update_(
                logits, target[r0:r1], _part(temperature_rows, r0, r1), _part(mask, r0, r1), temperature, softcap,
                ignore_index, v0, vocab, entropy, state[r0:r1],
            )  # fmt: skip
    logp, lse, entropies = torch.ops.arcore.token_logprobs_finish(
        state, target, temperature_rows, temperature, ignore_index, vocab, entropy
    )
    return logp, lse, entropies, state


@_forward.register_fake
def _fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    temperature_rows: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    softcap: float,
    ignore_index: int,
    entropy: bool,
    tile_rows: int,
    tile_columns: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = hidden.shape[0]
    logp, lse = (hidden.new_empty((rows,), dtype=torch.float32) for _ in range(2))
    entropies = hidden.new_empty((rows if entropy else 0,), dtype=torch.float32)
    return logp, lse, entropies, hidden.new_empty((rows, 4), dtype=torch.float64)


@torch.library.custom_op("arcore::linear_logprobs_backward", mutates_args=(), device_types="cpu")
def _gradients(
    grad_logp: Tensor | None,
    grad_logsumexp: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    temperature_rows: Tensor | None,
    mask: Tensor | None,
    state: Tensor,
    temperature: float,
    softcap: float,
    ignore_index: int,
    tile_rows: int,
    tile_columns: int,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight, bias and temperature_rows; an empty one where `need` is False."""
    rows, (vocab, width) = hidden.shape[0], weight.shape
    need_hidden, need_weight, need_bias, need_temperature = need
    single = hidden.dtype == torch.float32
    row_blocks = -(-rows // tile_rows)
    # Sums over tiles are float32: in place for float32 gradients, else in a buffer that is stored at the end.
    sum_hidden = hidden.new_zeros((rows, width) if need_hidden else (0,), dtype=torch.float32)
    if not need_weight:
        grad_weight = weight.new_empty((0,))
    else:
        grad_weight = torch.empty_like(weight) if row_blocks == 1 else torch.zeros_like(weight)
    grad_bias = weight.new_zeros((vocab if need_bias else 0,))
    grad_temperature = hidden.new_zeros((rows if need_temperature else 0,), dtype=torch.float32)
    buffer = hidden.new_empty(min(tile_rows, rows), min(tile_columns, vocab))
    for v0, v1 in _spans(vocab, tile_columns):
        sum_weight = grad_weight[v0:v1]
        if need_weight and not single and row_blocks > 1:
            sum_weight = hidden.new_zeros((v1 - v0, width), dtype=torch.float32)
        sum_bias = hidden.new_zeros((v1 - v0,), dtype=torch.float32)
        for r0, r1 in _spans(rows, tile_rows):
            part, head = hidden[r0:r1], weight[v0:v1]
            dz = _logits(buffer, part, head, _part(bias, v0, v1))
            shares = torch.ops.arcore.token_logprobs_tile_backward_(
                _part(grad_logp, r0, r1), _part(grad_logsumexp, r0, r1), _part(grad_entropy, r0, r1), dz,
                target[r0:r1], _part(temperature_rows, r0, r1), _part(mask, r0, r1), state[r0:r1], temperature,
                softcap, ignore_index, v0, vocab, need_temperature,
            )  # fmt: skip
            if need_temperature:
                grad_temperature[r0:r1] += shares
            if need_hidden and single:
                sum_hidden[r0:r1].addmm_(dz, head)
            elif need_hidden:
                sum_hidden[r0:r1] += dz @ head
            if need_weight and row_blocks == 1:
                torch.mm(dz.t(), part, out=sum_weight)
            elif need_weight and single:
                sum_weight.addmm_(dz.t(), part)
            elif need_weight:
                sum_weight += dz.t() @ part
            if need_bias:
                sum_bias += dz.sum(0, dtype=torch.float32)
        if need_weight and sum_weight.dtype != weight.dtype:
            grad_weight[v0:v1] = sum_weight
        if need_bias:
            grad_bias[v0:v1] = sum_bias
    return sum_hidden.to(hidden.dtype), grad_weight, grad_bias, grad_temperature


@_gradients.register_fake
def _fake_gradients(
    grad_logp: Tensor | None,
    grad_logsumexp: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    temperature_rows: Tensor | None,
    mask: Tensor | None,
    state: Tensor,
    temperature: float,
    softcap: float,
    ignore_index: int,
    tile_rows: int,
    tile_columns: int,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, (vocab, width) = hidden.shape[0], weight.shape
    return (
        hidden.new_empty((rows, width) if need[0] else (0,)),
        torch.empty_like(weight) if need[1] else weight.new_empty((0,)),
        weight.new_empty((vocab if need[2] else 0,)),
        hidden.new_empty((rows if need[3] else 0,), dtype=torch.float32),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:6], output[3])
    temperature, softcap, ignore_index, ctx.with_entropy, *ctx.tile = inputs[6:]
    ctx.numbers = (temperature, softcap, ignore_index)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any,
    grad_logp: Tensor | None,
    grad_logsumexp: Tensor | None,
    grad_entropy: Tensor | None,
    grad_state: Tensor | None,
) -> tuple[Tensor | None, ...]:
    *inputs, state = ctx.saved_tensors
    if not ctx.with_entropy:
        grad_entropy = None
    if grad_logp is None and grad_logsumexp is None and grad_entropy is None:
        return (None,) * 12
    asked = ctx.needs_input_grad
    need = [asked[0], asked[1], asked[2], asked[4]]
    hidden, weight, bias, temperature = torch.ops.arcore.linear_logprobs_backward(
        float_rows(grad_logp), float_rows(grad_logsumexp), float_rows(grad_entropy), *inputs, state, *ctx.numbers,
        *ctx.tile, need,
    )  # fmt: skip
    grads = [
        g if needed else None for g, needed in zip((hidden, weight, bias, temperature), need, strict=True)
    ]
    return grads[0], grads[1], grads[2], None, grads[3], *(None,) * 7


_forward.register_autograd(_backward, setup_context=_setup_context)
forbid_second_derivative("linear_logprobs")
