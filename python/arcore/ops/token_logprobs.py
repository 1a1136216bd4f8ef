"""Log-probability, log-sum-exp and entropy of tokens: public function, reference, the op's fake and autograd rules.

The formulas and the numerics are in csrc/token_logprobs/README.md. `linear_logprobs`, in its own file, is the same
with the last linear layer inside.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from arcore import _extension as _extension
from arcore.ops._checks import checked_call, integer, same_device
from arcore.ops._registration import forbid_derivative, register_derivatives, register_in_place

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MASK_BITS = 32


class TokenLogprobs(NamedTuple):
    """What `token_logprobs` and `linear_logprobs` return, each ``[...]``, in nats.

    Attributes:
        logp: log-probability of the target; never positive.
        logsumexp: log of the normaliser (the z-loss needs it).
        entropy: entropy of the distribution, or None if it was not asked for.
    """

    logp: Tensor
    logsumexp: Tensor
    entropy: Tensor | None


def token_logprobs(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
) -> TokenLogprobs:
    """Log-probability of each target token, with log-sum-exp and entropy, in one pass over the logits.

    Per row, with ``z = softcap * tanh(logits / softcap) / temperature`` on the kept columns and -inf elsewhere::

        logsumexp = log(sum(exp(z)))
        logp      = z[target] - logsumexp
        entropy   = -sum(p * log(p)),  p = exp(z - logsumexp)

    fp32 arithmetic whatever the storage type, with sums across blocks of columns in float64. Differentiable through
    all three outputs, in logits and in a temperature tensor, in reverse and in forward mode (``torch.func.grad``,
    ``jvp``, ``vmap`` and what is made of them; a second derivative is refused). The gradient is written in one pass, in
    the logits' dtype; apart from it, forward and backward hold 44 bytes a row. Forward mode takes a pass like the
    gradient's for each output and a float32 copy of the logits. Results do not depend on the number of threads, the
    layout or the other rows. Rows with a temperature or a softcap outside of [1e-30, 1e30] are computed in float64,
    several times slower.

    Args:
        logits: ``[..., V]``, float32, bfloat16 or float16; contiguous in the last dimension, any strides in the others
            (``logits[:, :-1]`` is read in place).
        target: column of each row, int64 or int32 ``[...]``, or `ignore_index`.
        temperature: divides the capped logits; a positive number, or a tensor that broadcasts to ``[...]`` (one
            temperature per row), which gets a gradient.
        softcap: bound of the logits (Gemma 2, arXiv:2408.00118, section 2), positive; None for none. It maps a logit of
            -inf to -softcap, so columns that must stay out belong into `mask`.
        mask: kept set; columns outside of it have probability 0. Bool, broadcastable to logits' shape, or int32 words
            of 32 columns each, ``[..., ceil(V / 32)]`` (bit ``v % 32`` of word ``v // 32``, as grammar libraries and
            `arcore.ops.sample` make it).
        ignore_index: rows with this target give 0 in every output, have zero gradient, and their logits are not read.
        return_entropy: also compute the entropy.

    Returns:
        `TokenLogprobs`, float32, each of target's shape. A target outside of the kept set, or with a logit of -inf,
        gives logp -inf, without a gradient. A row that keeps nothing gives logp and logsumexp -inf and entropy 0,
        without a gradient. A NaN or +inf (without softcap) makes its row NaN, and no other.

    Raises:
        TypeError: an unsupported dtype.
        ValueError: shapes, strides or devices do not fit, temperature or softcap is not positive and finite, or, on a
            CPU, a target is neither in [0, V) nor `ignore_index`.
    """
    op = "token_logprobs"
    x = prepare_tokens(op, logits, target, temperature, softcap, mask, ignore_index)
    logp, lse, entropy, _ = checked_call(op, torch.ops.arcore.token_logprobs, *x, return_entropy)
    return TokenLogprobs(logp, lse, entropy if return_entropy else None)


def prepare_tokens(
    op: str,
    logits: Tensor,
    target: Tensor,
    temperature: float | Tensor,
    softcap: float | None,
    mask: Tensor | None,
    ignore_index: int,
) -> tuple[Any, ...]:
    """Check the arguments of a public function of logits, and lay them out for its op."""
    same_device(f"arcore.{op}", logits=logits)
    check_rows(op, "logits", logits, logits.shape[-1:].numel(), target, softcap, mask, ignore_index)
    check_dtype(op, "logits", logits)
    for name, tensor in (("logits", logits), ("mask", mask)):
        if tensor is not None and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(
                f"arcore.{op}: expected {name} whose last dimension has stride 1 but got strides "
                f"{tensor.stride()}; pass {name}.contiguous()"
            )
    scalar, rows = split_temperature(op, temperature, target)
    kept = None if mask is None else mask.expand(*target.shape, mask.shape[-1])
    return logits, index_rows(target), float_rows(rows), kept, scalar, float(softcap or 0.0), ignore_index


def reference_token_logprobs(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
) -> TokenLogprobs:
    """`token_logprobs` in plain PyTorch, several times the memory of the logits, any float dtype and device.

    float64 logits give float64 results (the oracle of the tests), others float32. Arguments, returns and errors are
    those of `token_logprobs`, except that wrong targets raise PyTorch's own errors.
    """
    op = "token_logprobs"
    same_device(f"arcore.{op}", logits=logits)
    check_rows(op, "logits", logits, logits.shape[-1:].numel(), target, softcap, mask, ignore_index)
    scalar, rows = split_temperature(op, temperature, target)
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / (scalar if rows is None else rows.to(z.dtype).unsqueeze(-1))
    if mask is not None:
        z = torch.where(unpack_mask(mask, z.shape[-1]), z, -math.inf)
    counted = target != ignore_index
    absent = z == -math.inf
    empty = absent.all(dim=-1)
    # Rows without a distribution, and those that nobody asks for, must not send NaN into the gradient.
    z = torch.where((counted & ~empty).unsqueeze(-1), z, 0.0)
    lse = torch.logsumexp(z, dim=-1) if z.shape[-1] else z.new_zeros(target.shape)
    column = torch.where(counted, target, 0).long().unsqueeze(-1)
    if z.shape[-1]:
        present = ~absent.gather(-1, column).squeeze(-1)
        logp = torch.where(present, z.gather(-1, column).squeeze(-1) - lse, -math.inf)
    else:
        logp = lse
    lse = torch.where(empty, -math.inf, lse)

    def masked(x: Tensor) -> Tensor:
        return torch.where(counted, x, 0.0)

    entropy = None
    if return_entropy:
        safe = torch.where(absent | empty.unsqueeze(-1), 0.0, z - torch.logsumexp(z, dim=-1, keepdim=True))
        entropy = masked(-torch.where(absent, 0.0, safe.exp() * safe).sum(dim=-1))
    return TokenLogprobs(masked(logp), masked(lse), entropy)


def unpack_mask(mask: Tensor, columns: int) -> Tensor:
    """A bool kept set over `columns` columns from a bool one or from int32 words of 32 columns."""
    if mask.dtype == torch.bool:
        return mask
    bits = mask.unsqueeze(-1) >> torch.arange(MASK_BITS, dtype=torch.int32, device=mask.device) & 1
    return bits.flatten(-2)[..., :columns].bool()


def check_dtype(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in SUPPORTED_DTYPES:
        raise TypeError(
            f"arcore.{op}: expected {name} of dtype float32, bfloat16 or float16 but got "
            f"{str(tensor.dtype).removeprefix('torch.')}; for float64 (gradcheck) call reference_{op}"
        )


def check_rows(
    op: str,
    name: str,
    rows: Tensor,
    columns: int,
    target: Tensor,
    softcap: float | None,
    mask: Tensor | None,
    ignore_index: int,
) -> None:
    """What both public functions ask of `target`, `mask` and `softcap`; `rows` is the tensor of shape ``[..., _]``."""
    same_device(f"arcore.{op}", **{name: rows, "target": target, "mask": mask})
    if rows.dim() == 0:
        raise ValueError(f"arcore.{op}: expected {name} of shape [..., V] but got a scalar")
    if target.shape != rows.shape[:-1]:
        raise ValueError(
            f"arcore.{op}: expected target of shape {tuple(rows.shape[:-1])}, the rows of {name} "
            f"{tuple(rows.shape)}, but got {tuple(target.shape)}"
        )
    if target.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"arcore.{op}: expected target of dtype int64 or int32 but got {str(target.dtype).removeprefix('torch.')}"
        )
    if isinstance(softcap, (bool, str, Tensor)):
        raise TypeError(f"arcore.{op}: expected softcap to be a number but got {softcap!r}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(
            f"arcore.{op}: expected softcap to be positive and finite but got {softcap}; pass None for none"
        )
    integer(f"arcore.{op}", "ignore_index", ignore_index)
    if mask is None:
        return
    if mask.dtype not in (torch.bool, torch.int32):
        raise TypeError(
            f"arcore.{op}: expected mask of dtype bool, or int32 with 32 columns a word, but got "
            f"{str(mask.dtype).removeprefix('torch.')}"
        )
    width = columns if mask.dtype == torch.bool else -(-columns // MASK_BITS)
    leading = tuple(mask.shape[:-1])
    fits = mask.dim() >= 1 and len(leading) <= target.dim() and mask.shape[-1] == width
    if not fits or any(
        m not in (1, n) for m, n in zip(reversed(leading), reversed(target.shape), strict=False)
    ):
        raise ValueError(
            f"arcore.{op}: expected mask, {str(mask.dtype).removeprefix('torch.')}, to broadcast to "
            f"{(*target.shape, width)} with a last dimension of {width} for {columns} columns but got "
            f"{tuple(mask.shape)}"
        )


def split_temperature(op: str, temperature: float | Tensor, target: Tensor) -> tuple[float, Tensor | None]:
    """(number, None), or (1, a float tensor of target's shape that keeps its path to autograd)."""
    if not isinstance(temperature, Tensor):
        given: Any = temperature  # callers do not always keep to the annotation
        if given is None or isinstance(given, (bool, str, list, tuple)):
            raise TypeError(
                f"arcore.{op}: expected temperature to be a number or a tensor but got {temperature!r}"
            )
        if not 0 < temperature < math.inf:
            raise ValueError(
                f"arcore.{op}: expected temperature to be positive and finite but got {temperature}; "
                "for the most likely token take argmax"
            )
        return float(temperature), None
    same_device(f"arcore.{op}", target=target, temperature=temperature)
    if not temperature.is_floating_point():
        raise TypeError(
            f"arcore.{op}: expected temperature of a floating-point dtype but got "
            f"{str(temperature.dtype).removeprefix('torch.')}; convert it with .float()"
        )
    leading = tuple(temperature.shape)
    if len(leading) > target.dim() or any(
        t not in (1, n) for t, n in zip(reversed(leading), reversed(target.shape), strict=False)
    ):
        raise ValueError(
            f"arcore.{op}: expected temperature to broadcast to the rows {tuple(target.shape)} but got "
            f"{tuple(temperature.shape)}"
        )
    keep = torch.float64 if temperature.dtype == torch.float64 else torch.float32
    return 1.0, temperature.to(keep).expand(target.shape)


def index_rows(target: Tensor) -> Tensor:
    return target.long().contiguous()


def float_rows(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


@torch.library.register_fake("arcore::token_logprobs")
def _fake(
    logits: Tensor,
    target: Tensor,
    temperature_rows: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    softcap: float,
    ignore_index: int,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    same_device(
        "arcore.token_logprobs", logits=logits, target=target, temperature_rows=temperature_rows, mask=mask
    )
    logp, lse = (logits.new_empty(target.shape, dtype=torch.float32) for _ in range(2))
    entropies = logits.new_empty(target.shape if entropy else (0,), dtype=torch.float32)
    return logp, lse, entropies, logits.new_empty((target.numel(), 4), dtype=torch.float64)


@torch.library.register_fake("arcore::token_logprobs_backward")
def _fake_backward(
    grad_logp: Tensor | None,
    grad_logsumexp: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    target: Tensor,
    temperature_rows: Tensor | None,
    mask: Tensor | None,
    state: Tensor,
    temperature: float,
    softcap: float,
    ignore_index: int,
    grad_mean: Tensor | None = None,
    tally: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    same_device(
        "arcore.token_logprobs_backward", logits=logits, target=target, temperature_rows=temperature_rows, mask=mask,
        state=state, grad_logp=grad_logp, grad_logsumexp=grad_logsumexp, grad_entropy=grad_entropy,
        grad_mean=grad_mean, tally=tally,
    )  # fmt: skip
    rows = 0 if temperature_rows is None else target.numel()
    grad = torch.empty_like(logits)
    if grad.shape[-1] > 1 and grad.stride(-1) != 1:  # logits that overlap have no dense layout to follow
        grad = logits.new_empty(logits.shape)
    return grad, logits.new_empty((rows,), dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    logits, target, temperature_rows, mask, *ctx.numbers, entropy = inputs
    ctx.save_for_backward(logits, target, temperature_rows, mask, output[3])
    ctx.with_entropy = entropy
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any,
    grad_logp: Tensor | None,
    grad_logsumexp: Tensor | None,
    grad_entropy: Tensor | None,
    grad_state: Tensor | None,
) -> tuple[Tensor | None, ...]:
    logits, target, temperature_rows, mask, state = ctx.saved_tensors
    if not ctx.with_entropy:
        grad_entropy = None
    if grad_logp is None and grad_logsumexp is None and grad_entropy is None:
        return (None,) * 8
    grad, grad_rows = torch.ops.arcore.token_logprobs_backward(
        float_rows(grad_logp), float_rows(grad_logsumexp), float_rows(grad_entropy),
        logits, target, temperature_rows, mask, state, *ctx.numbers,
    )  # fmt: skip
    grad_temperature = None if temperature_rows is None else grad_rows.view(target.shape)
    return grad, None, grad_temperature, None, None, None, None, None


def _tangents(
    inputs: tuple[Any, ...], outputs: tuple[Tensor, ...], moving: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """Per row and output: its gradient times the tangents, in float32."""
    logits, target, temperature_rows, mask, *numbers, with_entropy = inputs
    state, d_logits, d_temperature = outputs[3], moving[0], moving[2]
    x = logits.float()
    x = x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()
    one = torch.ones(target.shape, dtype=torch.float32, device=logits.device)
    results: list[Tensor | None] = []
    for wanted in range(3 if with_entropy else 2):
        grads = [one if i == wanted else None for i in range(3)]
        grad, grad_rows = torch.ops.arcore.token_logprobs_backward(
            *grads, x, target, temperature_rows, mask, state, *numbers
        )
        total = torch.zeros_like(one)
        if d_logits is not None:
            # Columns without a share say nothing, whatever their tangents are.
            total = total + torch.where(grad == 0, 0.0, grad * d_logits.float()).sum(dim=-1)
        if d_temperature is not None:
            total = total + torch.where(grad_rows == 0, 0.0, grad_rows).view(target.shape) * d_temperature
        results.append(total)
    return (*results, *([] if with_entropy else [None]), None)


def _to_front(x: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """The batch of vmap as first dimension."""
    if x is None:
        return None
    return x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def _rows_to_front(x: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    full = _to_front(x, dim, size)
    return None if full is None else full.contiguous()


def _columns_to_front(x: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    full = _to_front(x, dim, size)
    return full if full is None or full.shape[-1] <= 1 or full.stride(-1) == 1 else full.contiguous()


@torch.library.register_vmap("arcore::token_logprobs")
def _vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    size, entropy = info.batch_size, args[7]
    logits, mask = (_columns_to_front(args[i], in_dims[i], size) for i in (0, 3))
    target, rows = (_rows_to_front(args[i], in_dims[i], size) for i in (1, 2))
    logp, lse, entropies, state = torch.ops.arcore.token_logprobs(logits, target, rows, mask, *args[4:])
    return (logp, lse, entropies, state.view(size, -1, 4)), (0, 0, 0 if entropy else None, 0)


@torch.library.register_vmap("arcore::token_logprobs_backward")
def _vmap_backward(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    size = info.batch_size
    grads = [_rows_to_front(args[i], in_dims[i], size) for i in range(3)]
    logits, mask = (_columns_to_front(args[i], in_dims[i], size) for i in (3, 6))
    target, rows, state = (_rows_to_front(args[i], in_dims[i], size) for i in (4, 5, 7))
    assert state is not None
    more = [_rows_to_front(args[i], in_dims[i], size) for i in range(11, len(args))]
    if len(more) == 2 and more[1] is not None:
        more[1] = more[1].view(-1, 4)
    grad, grad_rows = torch.ops.arcore.token_logprobs_backward(
        *grads, logits, target, rows, mask, state.view(-1, 4), *args[8:11], *more
    )
    if rows is None:
        return (grad, grad_rows), (0, None)
    return (grad, grad_rows.view(size, -1)), (0, 0)


register_derivatives("token_logprobs", _backward, _setup_context, _tangents)
forbid_derivative(
    "token_logprobs_backward",
    "arcore::token_logprobs has no second derivative; use reference_token_logprobs where you need one",
)
register_in_place("token_logprobs_update_")
register_in_place("token_logprobs_tally_")
register_in_place("token_logprobs_tile_backward_")
