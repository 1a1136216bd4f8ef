"""`token_logprobs` with the last linear layer inside: logits exist one tile at a time, forward and backward.

The matrix products are torch's, in float32 where it has plain loops alone for a type; statistics and gradients of a
tile are the pieces of token_logprobs' kernel (csrc/token_logprobs/README.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from arcore.matmul import slow_halves
from arcore.ops._checks import autocasts, checked_call, integer, same_device
from arcore.ops._registration import forbid_derivative, register_derivatives
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
    bias and a temperature tensor, in reverse and in forward mode, which takes three products per tile and output;
    gradients that nobody needs, such as that of a frozen head, are not computed. Under autocast hidden, weight and bias
    take its dtype. The products are torch's, and what rounding does to a row in them depends on how many rows there
    are: alone and in a batch a row may differ in its last bits.

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
        ValueError: shapes or devices do not fit; temperature, softcap or tile is out of range; or, on a CPU, a target
            is neither in [0, V) nor `ignore_index`.
    """
    op = "linear_logprobs"
    x = prepare_linear(op, hidden, weight, bias, target, temperature, softcap, mask, ignore_index, tile)
    logp, lse, entropy, _ = checked_call(
        op, torch.ops.arcore.linear_logprobs, *x.tensors, *x.numbers, return_entropy, *x.tile
    )
    return TokenLogprobs(
        logp.view(target.shape),
        lse.view(target.shape),
        entropy.view(target.shape) if return_entropy else None,
    )


class LinearArguments(NamedTuple):
    """Checked arguments in the form of the ops."""

    # hidden [rows, H], weight, bias, target, temperature of rows, mask
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]
    numbers: tuple[Any, ...]  # temperature, softcap, ignore_index
    tile: tuple[int, int]


def prepare_linear(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    temperature: float | Tensor,
    softcap: float | None,
    mask: Tensor | None,
    ignore_index: int,
    tile: tuple[int, int] | None,
) -> LinearArguments:
    """Check the arguments of a public function of a head, and lay them out for its op."""
    if autocasts(hidden):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    check_linear(op, hidden, weight, bias, target, softcap, mask, ignore_index)
    check_dtype(op, "hidden", hidden)
    scalar, rows = split_temperature(op, temperature, target)
    count = target.numel()
    tile_rows, tile_columns = (
        _default_tile(count) if tile is None else (integer(f"arcore.{op}", "tile", size) for size in tile)
    )
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
    return LinearArguments(
        (hidden.reshape(count, hidden.shape[-1]), weight, bias, index_rows(target).view(-1), flat, mask),
        (scalar, float(softcap or 0.0), ignore_index),
        (tile_rows, tile_columns),
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
    check_linear("linear_logprobs", hidden, weight, bias, target, softcap, mask, ignore_index)
    return reference_token_logprobs(
        linear(hidden, weight, bias), target, temperature=temperature, softcap=softcap, mask=mask,
        ignore_index=ignore_index, return_entropy=return_entropy,
    )  # fmt: skip


def check_linear(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    softcap: float | None,
    mask: Tensor | None,
    ignore_index: int,
) -> None:
    """What is asked of the arguments of `op` and of its reference."""
    same_device(f"arcore.{op}", hidden=hidden, weight=weight, bias=bias, target=target, mask=mask)
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
    if _is_slow(hidden):
        wide = None if bias is None else bias.float()
        return logits.copy_(linear(hidden.float(), weight.float(), wide))
    if bias is None:
        return torch.mm(hidden, weight.t(), out=logits)
    return torch.addmm(bias, hidden, weight.t(), out=logits)


def _is_slow(x: Tensor) -> bool:
    """Whether torch multiplies numbers of this type in plain loops here, so that float32 is many times faster."""
    return x.is_cpu and x.dtype in slow_halves()


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b, out in float32, a and b of any type."""
    if out.dtype == a.dtype:
        out.addmm_(a, b)
    elif _is_slow(a):
        out.addmm_(a.float(), b.float())
    else:
        out += a @ b


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
    """The op's forward."""
    return forward_by_tiles(
        hidden, weight, bias, target, temperature_rows, mask, temperature, softcap, ignore_index, entropy, tile_rows,
        tile_columns,
    )  # fmt: skip


def forward_by_tiles(
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
    tally: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logp, logsumexp, entropy and state of each row; `tally` receives what `token_logprobs_tally_` counts."""
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
            if tally is not None:
                torch.ops.arcore.token_logprobs_tally_(
                    logits, target[r0:r1], _part(mask, r0, r1), softcap, ignore_index, v0, vocab, tally[r0:r1]
                )
    logp, lse, entropies = torch.ops.arcore.token_logprobs_finish(
        state, target, temperature_rows, temperature, ignore_index, vocab, entropy
    )
    return logp, lse, entropies, state


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
    same_device(
        "arcore.linear_logprobs", hidden=hidden, weight=weight, bias=bias, target=target,
        temperature_rows=temperature_rows, mask=mask,
    )  # fmt: skip
    rows = hidden.shape[0]
    logp, lse = (hidden.new_empty((rows,), dtype=torch.float32) for _ in range(2))
    entropies = hidden.new_empty((rows if entropy else 0,), dtype=torch.float32)
    return logp, lse, entropies, hidden.new_empty((rows, 4), dtype=torch.float64)


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
    """The op's backward."""
    return gradients_by_tiles(
        grad_logp, grad_logsumexp, grad_entropy, hidden, weight, bias, target, temperature_rows, mask, state,
        temperature, softcap, ignore_index, tile_rows, tile_columns, need,
    )  # fmt: skip


def gradients_by_tiles(
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
    grad_mean: Tensor | None = None,
    tally: Tensor | None = None,
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
                softcap, ignore_index, v0, vocab, need_temperature, _part(grad_mean, r0, r1), _part(tally, r0, r1),
            )  # fmt: skip
            if need_temperature:
                grad_temperature[r0:r1] += shares
            if need_hidden:
                _add_product(sum_hidden[r0:r1], dz, head)
            if need_weight and row_blocks > 1:
                _add_product(sum_weight, dz.t(), part)
            elif need_weight and _is_slow(dz):
                sum_weight.copy_(dz.t().float() @ part.float())
            elif need_weight:
                torch.mm(dz.t(), part, out=sum_weight)
            if need_bias:
                sum_bias += dz.sum(0, dtype=torch.float32)
        if need_weight and sum_weight.dtype != weight.dtype:
            grad_weight[v0:v1] = sum_weight
        if need_bias:
            grad_bias[v0:v1] = sum_bias
    return sum_hidden.to(hidden.dtype), grad_weight, grad_bias, grad_temperature


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
    same_device(
        "arcore.linear_logprobs_backward", hidden=hidden, weight=weight, bias=bias, target=target,
        temperature_rows=temperature_rows, mask=mask, state=state, grad_logp=grad_logp,
        grad_logsumexp=grad_logsumexp, grad_entropy=grad_entropy,
    )  # fmt: skip
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


def _tangents(
    inputs: tuple[Any, ...], outputs: tuple[Tensor, ...], moving: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, target, rows, mask, temperature, softcap, ignore_index, entropy, *tile = inputs
    given = [moving[0], moving[1], moving[2], moving[4]]
    fixed = (hidden, weight, bias, target, rows, mask, outputs[3], temperature, softcap, ignore_index, *tile)
    results = [_tangent(wanted, given, *fixed) for wanted in range(3 if entropy else 2)]
    return (*results, *([] if entropy else [None]), None)


def _tangent(
    wanted: int,
    tangents: list[Tensor | None],
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
) -> Tensor:
    """Tangent of output `wanted`: its derivatives by the logits of a tile times the tangents of these."""
    d_hidden, d_weight, d_bias, d_temperature = tangents
    rows, vocab = hidden.shape[0], weight.shape[0]
    sums = []
    for r0, r1 in _spans(rows, tile_rows):
        total = torch.zeros(r1 - r0, dtype=torch.float32, device=hidden.device)
        one = torch.ones_like(total)
        grads = [one if i == wanted else None for i in range(3)]
        for v0, v1 in _spans(vocab, tile_columns):
            part, head = hidden[r0:r1], weight[v0:v1]
            logits = linear(part, head, _part(bias, v0, v1))
            share, by_temperature = torch.ops.arcore.linear_logprobs_tile_gradient(
                *grads, logits, target[r0:r1], _part(temperature_rows, r0, r1), _part(mask, r0, r1), state[r0:r1],
                temperature, softcap, ignore_index, v0, vocab,
            )  # fmt: skip
            change = torch.zeros((), dtype=torch.float32, device=hidden.device)
            if d_hidden is not None:
                change = change + linear(d_hidden[r0:r1], head).float()
            if d_weight is not None:
                change = change + linear(part, d_weight[v0:v1]).float()
            if d_bias is not None:
                change = change + d_bias[v0:v1].float()
            total = total + torch.where(share == 0, 0.0, share * change).sum(dim=1)
            if d_temperature is not None and temperature_rows is not None:
                total = total + by_temperature * d_temperature[r0:r1]
        sums.append(total)
    return torch.cat(sums) if sums else torch.zeros(0, dtype=torch.float32, device=hidden.device)


def _tile_gradient(
    grad_logp: Tensor | None,
    grad_logsumexp: Tensor | None,
    grad_entropy: Tensor | None,
    tile: Tensor,
    target: Tensor,
    temperature_rows: Tensor | None,
    mask: Tensor | None,
    state: Tensor,
    temperature: float,
    softcap: float,
    ignore_index: int,
    first_column: int,
    vocab: int,
) -> tuple[Tensor, Tensor]:
    """token_logprobs_tile_backward_ in float32, into memory of its own."""
    share = tile.float().clone() if tile.dtype == torch.float32 else tile.float()
    by_temperature = torch.ops.arcore.token_logprobs_tile_backward_(
        grad_logp, grad_logsumexp, grad_entropy, share, target, temperature_rows, mask, state, temperature, softcap,
        ignore_index, first_column, vocab, True,
    )  # fmt: skip
    return share, by_temperature


def _fake_tile_gradient(*args: Any) -> tuple[Tensor, Tensor]:
    tile = args[3]
    return tile.new_empty(tile.shape, dtype=torch.float32), tile.new_empty(
        tile.shape[:1], dtype=torch.float32
    )


def vmap_by_loop(op: str) -> Any:
    """One call per example: a head or gradients of one's own leave nothing to share."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        kernel = getattr(torch.ops.arcore, op)
        calls = []
        for i in range(info.batch_size):
            example = [
                x.select(d, i).contiguous() if isinstance(x, Tensor) and d is not None else x
                for x, d in zip(args, in_dims, strict=True)
            ]
            calls.append(kernel(*example))
        return tuple(torch.stack(part) for part in zip(*calls, strict=True)), (0,) * len(calls[0])

    return rule


_library = torch.library.Library("arcore", "FRAGMENT")
for _name, _kernel, _fake_kernel in (
    ("linear_logprobs", _forward, _fake),
    ("linear_logprobs_backward", _gradients, _fake_gradients),
    ("linear_logprobs_tile_gradient", _tile_gradient, _fake_tile_gradient),
):
    _library.define(_name + torch.library.infer_schema(_kernel, mutates_args=()))
    _library.impl(_name, _kernel, "CPU")
    torch.library.register_fake(f"arcore::{_name}", _fake_kernel, lib=_library)
    torch.library.register_vmap(f"arcore::{_name}", vmap_by_loop(_name), lib=_library)
register_derivatives("linear_logprobs", _backward, _setup_context, _tangents)
for _name in ("linear_logprobs_backward", "linear_logprobs_tile_gradient"):
    forbid_derivative(
        _name,
        "arcore::linear_logprobs has no second derivative; use reference_linear_logprobs where you need one",
    )
