"""Cross entropy with label smoothing and z-loss, and top-1 agreement, of logits and of a last linear layer.

The kernels are those of token_logprobs (csrc/token_logprobs/README.md). One more pass over the logits counts what
smoothing and agreement ask of a row; the gradient is written in the same pass as that of `token_logprobs`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from arcore.ops._checks import checked_call, same_device
from arcore.ops._linear_logprobs import (
    LinearArguments,
    check_linear,
    forward_by_tiles,
    gradients_by_tiles,
    prepare_linear,
    vmap_by_loop,
)
from arcore.ops._registration import forbid_derivative, register_derivatives
from arcore.ops.token_logprobs import (
    check_rows,
    float_rows,
    prepare_tokens,
    reference_token_logprobs,
    token_logprobs,
    unpack_mask,
)


class CrossEntropy(NamedTuple):
    """What `token_cross_entropy` and `linear_cross_entropy` return, each of target's shape ``[...]``.

    Attributes:
        loss: float32, cross entropy with label smoothing, plus `z_loss`, in nats. 0 at `ignore_index`.
        z_loss: float32, the part ``z_loss * logsumexp^2`` of it.
        agrees: bool, whether the target is the likeliest column (top-1), the lowest among equals; False at
            `ignore_index`, in rows that keep nothing and in rows with a NaN. Without gradient.
    """

    loss: Tensor
    z_loss: Tensor
    agrees: Tensor


def token_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    ignore_index: int = -100,
) -> CrossEntropy:
    """Cross entropy of each row with label smoothing and z-loss, and whether the target is the likeliest token.

    With `logp`, `logsumexp` and z of `token_logprobs`, and the mean of z over the n columns that can occur (kept by
    `mask`, and with a logit above -inf)::

        loss = (1 - label_smoothing) * -logp + label_smoothing * (logsumexp - mean(z)) + z_loss * logsumexp^2

    which is smoothing by ``label_smoothing / n`` on each of these columns; without mask and -inf it is that of
    `torch.nn.functional.cross_entropy` with ``reduction="none"``.

    Two passes over the logits and one for the gradient, which is the only tensor of their size that is made.
    Differentiable through `loss` and `z_loss` in reverse mode, in logits and in a temperature tensor; forward mode and
    second derivatives are refused. Results do not depend on the number of threads, the layout or the other rows.
    On a GPU the kernels of `token_logprobs` give logp and logsumexp; smoothing and agreement are PyTorch's, which makes
    float32 tensors of the logits' size on the way.

    Args:
        logits: ``[..., V]``, as for `token_logprobs`.
        target: as for `token_logprobs`.
        label_smoothing: from 0 to 1.
        z_loss: coefficient of the squared log-sum-exp, not negative.
        temperature: as for `token_logprobs`.
        softcap: as for `token_logprobs`.
        mask: as for `token_logprobs`.
        ignore_index: as for `token_logprobs`.

    Returns:
        `CrossEntropy`. The loss of a target that cannot occur is inf, as is that of a row that keeps nothing, without a
        gradient from what is infinite. A NaN or +inf (without softcap) makes its row NaN, and no other.

    Raises:
        TypeError: an unsupported dtype, or a number that is none.
        ValueError: shapes, strides or devices do not fit, a number is out of range, or a target is neither in [0, V)
            nor `ignore_index`.
        NotImplementedError: tensors on another device than a CPU or a CUDA GPU.

    Reference: label smoothing, Szegedy et al. (arXiv:1512.00567, section 7); z-loss, PaLM (arXiv:2204.02311, section
    5).
    """
    op = "token_cross_entropy"
    smoothing, coefficient = _weights(op, label_smoothing, z_loss)
    x = prepare_tokens(op, logits, target, temperature, softcap, mask, ignore_index)
    if logits.device.type == "cuda":
        return _by_logprobs(
            logits, target, smoothing, coefficient, temperature=temperature, softcap=softcap, mask=mask,
            ignore_index=ignore_index,
        )  # fmt: skip
    _refuse_gpu(op, logits)
    logp, lse, mean, agrees, *_ = checked_call(op, torch.ops.arcore.token_cross_entropy, *x)
    return _losses(logp, lse, mean, agrees, smoothing, coefficient)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    tile: tuple[int, int] | None = None,
) -> CrossEntropy:
    """`token_cross_entropy` of ``linear(hidden, weight, bias)``, without ever holding the logits.

    Tiles, memory, autocast and what rounding depends on are those of `linear_logprobs`. Differentiable through `loss`
    and `z_loss` in reverse mode, in hidden, weight, bias and a temperature tensor. On a GPU logits of some rows at a
    time, about 32 million numbers, go to `token_cross_entropy` and are computed again for the gradient; `tile` has no
    effect there.

    Args:
        hidden: ``[..., H]``, float32, bfloat16 or float16.
        weight: ``[V, H]``, hidden's dtype.
        target: int64 or int32 ``[...]``, or `ignore_index`.
        bias: ``[V]``, hidden's dtype.
        label_smoothing: as for `token_cross_entropy`.
        z_loss: as for `token_cross_entropy`.
        temperature: as for `token_logprobs`.
        softcap: as for `token_logprobs`.
        mask: as for `linear_logprobs`.
        ignore_index: as for `token_logprobs`.
        tile: as for `linear_logprobs`.

    Returns:
        `CrossEntropy`, as for `token_cross_entropy`.

    Raises:
        TypeError: unsupported or mixed dtypes, or a number that is none.
        ValueError: shapes or devices do not fit, a number is out of range, or a target is neither in [0, V) nor
            `ignore_index`.
        NotImplementedError: tensors on another device than a CPU or a CUDA GPU.
    """
    op = "linear_cross_entropy"
    smoothing, coefficient = _weights(op, label_smoothing, z_loss)
    x = prepare_linear(op, hidden, weight, bias, target, temperature, softcap, mask, ignore_index, tile)
    if hidden.device.type == "cuda":
        return CrossEntropy(*(part.view(target.shape) for part in _linear_by_rows(x, smoothing, coefficient)))
    _refuse_gpu(op, hidden)
    found = checked_call(op, torch.ops.arcore.linear_cross_entropy, *x.tensors, *x.numbers, *x.tile)
    logp, lse, mean, agrees = (part.view(target.shape) for part in found[:4])
    return _losses(logp, lse, mean, agrees, smoothing, coefficient)


# Logits that `linear_cross_entropy` holds at once on a GPU.
_LOGITS_AT_ONCE = 1 << 25


def _linear_by_rows(x: LinearArguments, smoothing: float, coefficient: float) -> CrossEntropy:
    """Of the flattened rows, where there is no kernel for smoothing and agreement (CUDA)."""
    hidden, weight, bias, target, heats, mask = x.tensors
    heat, cap, ignore_index = x.numbers

    def some(
        rows: Tensor, weight: Tensor, bias: Tensor | None, heats: Tensor | None, begin: int
    ) -> CrossEntropy:
        end = begin + len(rows)
        return _by_logprobs(
            linear(rows, weight, bias), target[begin:end], smoothing, coefficient,
            temperature=heat if heats is None else heats, softcap=cap or None,
            mask=None if mask is None else mask[begin:end], ignore_index=ignore_index,
        )  # fmt: skip

    step = max(1, _LOGITS_AT_ONCE // max(1, len(weight)))
    differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in x.tensors)
    parts = []
    for begin in range(0, max(len(hidden), 1), step):
        end = begin + step
        inputs = (hidden[begin:end], weight, bias, None if heats is None else heats[begin:end], begin)
        again = differentiable and len(hidden) > step
        parts.append(checkpoint(some, *inputs, use_reentrant=False) if again else some(*inputs))
    return CrossEntropy(*(torch.cat(part) for part in zip(*parts, strict=True)))


def reference_token_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    ignore_index: int = -100,
) -> CrossEntropy:
    """`token_cross_entropy` in plain PyTorch, any float dtype and device; wrong targets raise PyTorch's errors."""
    op = "token_cross_entropy"
    smoothing, coefficient = _weights(op, label_smoothing, z_loss)
    check_rows(op, "logits", logits, logits.shape[-1:].numel(), target, softcap, mask, ignore_index)
    out = reference_token_logprobs(
        logits, target, temperature=temperature, softcap=softcap, mask=mask, ignore_index=ignore_index
    )
    z = _capped(logits, softcap, mask)
    mean = _mean(z, target != ignore_index, temperature)
    agrees = _agreement(z, target, ignore_index)
    return _losses(out.logp, out.logsumexp, mean, agrees, smoothing, coefficient)


def _capped(logits: Tensor, softcap: float | None, mask: Tensor | None) -> Tensor:
    """z before the temperature, -inf where the mask forbids."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z if mask is None else torch.where(unpack_mask(mask, z.shape[-1]), z, -math.inf)


def _mean(z: Tensor, counted: Tensor, temperature: float | Tensor) -> Tensor:
    """Of the columns that can occur; 0 in rows that are not counted."""
    absent = z == -math.inf
    count = (~absent).sum(-1).clamp(min=1)
    heat = temperature.to(z.dtype) if isinstance(temperature, Tensor) else temperature
    return torch.where(absent | ~counted.unsqueeze(-1), 0.0, z).sum(-1) / count / heat


def _agreement(z: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    found = (target != ignore_index) & ~(z == -math.inf).all(-1) & ~z.isnan().any(-1)
    best = z.max(-1, keepdim=True).values if z.shape[-1] else z
    first = (z == best).int().argmax(-1) if z.shape[-1] else torch.zeros_like(target)
    return found & (first == target)


def _by_logprobs(
    logits: Tensor, target: Tensor, smoothing: float, coefficient: float, *, temperature: float | Tensor,
    softcap: float | None, mask: Tensor | None, ignore_index: int,
) -> CrossEntropy:  # fmt: skip
    """Where there is no kernel for smoothing and agreement (CUDA)."""
    if smoothing > 0.0:
        # Two gradients meet at the logits: in float32, so that 16-bit ones are rounded once.
        logits = logits.float()
    out = token_logprobs(
        logits, target, temperature=temperature, softcap=softcap, mask=mask, ignore_index=ignore_index
    )
    with torch.no_grad():
        agrees = _agreement(_capped(logits, softcap, mask), target, ignore_index)
    mean = torch.zeros_like(out.logp)
    if smoothing > 0.0:
        mean = _mean(_capped(logits, softcap, mask), target != ignore_index, temperature)
    return _losses(out.logp, out.logsumexp, mean, agrees, smoothing, coefficient)


def reference_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    tile: tuple[int, int] | None = None,
) -> CrossEntropy:
    """`linear_cross_entropy` by way of the whole logits, any float dtype and device; `tile` has no effect."""
    check_linear("linear_cross_entropy", hidden, weight, bias, target, softcap, mask, ignore_index)
    return reference_token_cross_entropy(
        linear(hidden, weight, bias), target, label_smoothing=label_smoothing, z_loss=z_loss,
        temperature=temperature, softcap=softcap, mask=mask, ignore_index=ignore_index,
    )  # fmt: skip


def _weights(op: str, label_smoothing: Any, z_loss: Any) -> tuple[float, float]:
    for name, value, high in (("label_smoothing", label_smoothing, 1.0), ("z_loss", z_loss, math.inf)):
        if isinstance(value, (bool, str, Tensor)) or not hasattr(value, "__float__"):
            raise TypeError(f"arcore.{op}: expected {name} to be a number but got {value!r}")
        if not 0.0 <= value <= high or value == math.inf:
            what = "from 0 to 1" if high == 1.0 else ">= 0 and finite"
            raise ValueError(f"arcore.{op}: expected {name} {what} but got {value}")
    return float(label_smoothing), float(z_loss)


def _refuse_gpu(op: str, x: Tensor) -> None:
    if x.device.type not in ("cpu", "meta"):
        raise NotImplementedError(
            f"arcore.{op}: expected tensors on a CPU or a CUDA GPU but got {x.device}; call reference_{op}"
        )


def _losses(
    logp: Tensor, lse: Tensor, mean: Tensor, agrees: Tensor, smoothing: float, coefficient: float
) -> CrossEntropy:
    """Numbers of rows; a term of weight 0 is left out, since 0 * inf would be NaN."""
    loss = None if smoothing == 1.0 else (smoothing - 1.0) * logp
    if smoothing > 0.0:
        # inf for a row that keeps nothing, or whose numbers float32 has no room for; not inf - inf.
        spread = smoothing * torch.where(lse.isinf(), math.inf, lse - mean)
        loss = spread if loss is None else loss + spread
    assert loss is not None
    penalty = coefficient * lse.square() if coefficient > 0.0 else torch.zeros_like(loss)
    return CrossEntropy(loss + penalty if coefficient > 0.0 else loss, penalty, agrees)


# ---- the ops ----


def _new_tally(like: Tensor, rows: int) -> Tensor:
    tally = like.new_zeros(rows, 4, dtype=torch.float64)
    tally[:, 2], tally[:, 3] = -math.inf, -1.0
    return tally


def _read_tally(
    tally: Tensor, target: Tensor, lse: Tensor, temperature_rows: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """Mean of z over the columns that can occur, and whether the target is the likeliest, in target's shape."""
    total, count, _, column = tally.view(*target.shape, 4).unbind(-1)
    heat = temperature if temperature_rows is None else temperature_rows.view(target.shape).double()
    mean = torch.where(count > 0, total / count.clamp(min=1) / heat, 0.0)
    agrees = (column == target) & ~lse.isnan() & (count > 0)
    return mean.float(), agrees


def _token_forward(
    logits: Tensor,
    target: Tensor,
    temperature_rows: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    softcap: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    logp, lse, _, state = torch.ops.arcore.token_logprobs(
        logits, target, temperature_rows, mask, temperature, softcap, ignore_index, False
    )
    tally = _new_tally(logits, target.numel())
    torch.ops.arcore.token_logprobs_tally_(
        logits, target, mask, softcap, ignore_index, 0, logits.shape[-1], tally
    )
    mean, agrees = _read_tally(tally, target, lse, temperature_rows, temperature)
    return logp, lse, mean, agrees, state, tally


def _fake_rows(target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    logp, lse, mean = (target.new_empty(target.shape, dtype=torch.float32) for _ in range(3))
    state, tally = (target.new_empty((target.numel(), 4), dtype=torch.float64) for _ in range(2))
    return logp, lse, mean, target.new_empty(target.shape, dtype=torch.bool), state, tally


def _fake_token(
    logits: Tensor,
    target: Tensor,
    temperature_rows: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    softcap: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    same_device(
        "arcore.token_cross_entropy", logits=logits, target=target, temperature_rows=temperature_rows, mask=mask
    )  # fmt: skip
    return _fake_rows(target)


def _linear_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    temperature_rows: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    softcap: float,
    ignore_index: int,
    tile_rows: int,
    tile_columns: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tally = _new_tally(hidden, len(target))
    logp, lse, _, state = forward_by_tiles(
        hidden, weight, bias, target, temperature_rows, mask, temperature, softcap, ignore_index, False, tile_rows,
        tile_columns, tally,
    )  # fmt: skip
    mean, agrees = _read_tally(tally, target, lse, temperature_rows, temperature)
    return logp, lse, mean, agrees, state, tally


def _fake_linear(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    temperature_rows: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    softcap: float,
    ignore_index: int,
    tile_rows: int,
    tile_columns: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    same_device(
        "arcore.linear_cross_entropy", hidden=hidden, weight=weight, bias=bias, target=target,
        temperature_rows=temperature_rows, mask=mask,
    )  # fmt: skip
    return _fake_rows(target)


def _linear_gradients(
    grad_logp: Tensor | None,
    grad_logsumexp: Tensor | None,
    grad_mean: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    temperature_rows: Tensor | None,
    mask: Tensor | None,
    state: Tensor,
    tally: Tensor,
    temperature: float,
    softcap: float,
    ignore_index: int,
    tile_rows: int,
    tile_columns: int,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return gradients_by_tiles(
        grad_logp, grad_logsumexp, None, hidden, weight, bias, target, temperature_rows, mask, state, temperature,
        softcap, ignore_index, tile_rows, tile_columns, need, grad_mean, tally,
    )  # fmt: skip


def _fake_linear_gradients(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, weight, need = args[3], args[4], args[16]
    rows, (vocab, width) = hidden.shape[0], weight.shape
    return (
        hidden.new_empty((rows, width) if need[0] else (0,)),
        torch.empty_like(weight) if need[1] else weight.new_empty((0,)),
        weight.new_empty((vocab if need[2] else 0,)),
        hidden.new_empty((rows if need[3] else 0,), dtype=torch.float32),
    )


def _setup_token(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:4], output[4], output[5])
    ctx.numbers = inputs[4:]
    ctx.mark_non_differentiable(output[3])
    ctx.set_materialize_grads(False)


def _token_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    logits, target, temperature_rows, mask, state, tally = ctx.saved_tensors
    logp, lse, mean = (float_rows(g) for g in grads[:3])
    if logp is None and lse is None and mean is None:
        return (None,) * 7
    grad, grad_rows = torch.ops.arcore.token_logprobs_backward(
        logp, lse, None, logits, target, temperature_rows, mask, state, *ctx.numbers, mean, tally
    )
    grad_temperature = None if temperature_rows is None else grad_rows.view(target.shape)
    return grad, None, grad_temperature, None, None, None, None


def _setup_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:6], output[4], output[5])
    ctx.numbers = inputs[6:]
    ctx.mark_non_differentiable(output[3])
    ctx.set_materialize_grads(False)


def _linear_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    rows = [float_rows(g) for g in grads[:3]]
    if all(g is None for g in rows):
        return (None,) * 11
    asked = ctx.needs_input_grad
    need = [asked[0], asked[1], asked[2], asked[4]]
    found = torch.ops.arcore.linear_cross_entropy_backward(*rows, *ctx.saved_tensors, *ctx.numbers, need)
    hidden, weight, bias, temperature = (g if needed else None for g, needed in zip(found, need, strict=True))
    return hidden, weight, bias, None, temperature, *(None,) * 6


_library = torch.library.Library("arcore", "FRAGMENT")
for _name, _kernel, _fake in (
    ("token_cross_entropy", _token_forward, _fake_token),
    ("linear_cross_entropy", _linear_forward, _fake_linear),
    ("linear_cross_entropy_backward", _linear_gradients, _fake_linear_gradients),
):
    _library.define(_name + torch.library.infer_schema(_kernel, mutates_args=()))
    _library.impl(_name, _kernel, "CPU")
    torch.library.register_fake(f"arcore::{_name}", _fake, lib=_library)
    torch.library.register_vmap(f"arcore::{_name}", vmap_by_loop(_name), lib=_library)
register_derivatives("token_cross_entropy", _token_backward, _setup_token)
register_derivatives("linear_cross_entropy", _linear_backward, _setup_linear)
forbid_derivative(
    "linear_cross_entropy_backward",
    "arcore::linear_cross_entropy has no second derivative; use reference_linear_cross_entropy where you need one",
)
