"""The first-order linear recurrence: public function, reference, and the op's fake and autograd rules.

The loops are in csrc/selective_scan/linear_scan.h and linear_sm80.cuh.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from arcore import _extension as _extension
from arcore.ops._checks import same_device
from arcore.ops._registration import register_derivatives, register_vmap

SUPPORTED_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def linear_scan(a: Tensor, b: Tensor, *, initial: Tensor | None = None, reverse: bool = False) -> Tensor:
    """The recurrence ``h[t] = a[t] * h[t - 1] + b[t]`` over the last dimension.

    Returns, advantages (GAE) and every other discounted sum are such a recurrence from the last step to the first, with
    ``a = 0`` where an episode ends. Any real `a` is meant: zero, negative and above 1 too. float64 and float32 are
    computed in their own type; bfloat16 and float16 in float32. On CPUs and CUDA GPUs each row is one sequential loop
    in native code, so the result is that of the plain loop and depends neither on the number of threads nor on the
    other rows; on other devices the scan takes log2(T) passes of plain PyTorch, which round in another order, and whose
    products of `a` over long stretches must not overflow. Differentiable in all three any number of times, in reverse
    and forward mode.

    Args:
        a: factors ``[..., T]``.
        b: what is added, ``[..., T]``. Leading dimensions of a and b broadcast.
        initial: state before the first step in scan direction, ``[...]``; zero when None.
        reverse: run from the last step to the first: ``h[t] = a[t] * h[t + 1] + b[t]``.

    Returns:
        ``[..., T]`` in the promoted dtype of a and b.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: shapes or devices do not fit.
    """
    a, b, initial, shape, dtype = _checked(a, b, initial)
    length = shape[-1]
    rows = math.prod(shape[:-1])
    flat = [t.expand(shape).reshape(rows, length).contiguous() for t in (a, b)]
    first = None if initial is None else initial.expand(shape[:-1]).reshape(rows).contiguous()
    out: Tensor = torch.ops.arcore.linear_scan(*flat, first, reverse)
    return out.view(shape).to(dtype)


def reference_linear_scan(
    a: Tensor, b: Tensor, *, initial: Tensor | None = None, reverse: bool = False
) -> Tensor:
    """`linear_scan` in plain PyTorch, one step at a time. Arguments, returns and errors are the same."""
    a, b, initial, shape, dtype = _checked(a, b, initial)
    a, b = a.expand(shape), b.expand(shape)
    state = a.new_zeros(shape[:-1]) if initial is None else initial.expand(shape[:-1])
    outs = [state] * shape[-1]
    for t in reversed(range(shape[-1])) if reverse else range(shape[-1]):
        state = a[..., t] * state + b[..., t]
        outs[t] = state
    return (torch.stack(outs, -1) if outs else b).to(dtype)


def _checked(
    a: Tensor, b: Tensor, initial: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, torch.Size, torch.dtype]:
    op = "arcore.linear_scan"
    for name, tensor in (("a", a), ("b", b), ("initial", initial)):
        if name == "initial" and tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: expected {name} to be a tensor but got {type(tensor).__name__}")
        if tensor.dtype not in SUPPORTED_DTYPES:
            raise TypeError(
                f"{op}: expected {name} of dtype float64, float32, bfloat16 or float16 but got "
                f"{str(tensor.dtype).removeprefix('torch.')}; convert it with .float()"
            )
    same_device(op, a=a, b=b, initial=initial)
    if a.dim() < 1 or b.dim() < 1 or a.shape[-1] != b.shape[-1]:
        raise ValueError(
            f"{op}: expected a and b of shapes (..., T) with one T but got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    try:
        shape = torch.broadcast_shapes(a.shape, b.shape)
    except RuntimeError:
        raise ValueError(
            f"{op}: expected a and b whose leading dimensions broadcast but got {tuple(a.shape)} and {tuple(b.shape)}"
        ) from None
    if initial is not None:
        fits = initial.dim() <= len(shape) - 1 and all(
            n in (1, m) for n, m in zip(reversed(initial.shape), reversed(shape[:-1]), strict=False)
        )
        if not fits:
            raise ValueError(
                f"{op}: expected initial to broadcast to the rows {tuple(shape[:-1])} but got {tuple(initial.shape)}"
            )
    dtype = torch.promote_types(a.dtype, b.dtype)
    work = torch.promote_types(dtype, torch.float32)
    if initial is not None:
        initial = initial.to(work)
    return a.to(work), b.to(work), initial, shape, dtype


def _doubling(a: Tensor, b: Tensor, initial: Tensor | None, reverse: bool) -> Tensor:
    """The scan on devices without a kernel of their own: twice as many steps are joined in each pass."""
    if reverse:
        return _doubling(a.flip(-1), b.flip(-1), initial, False).flip(-1)
    if initial is not None and a.shape[-1]:
        b = torch.cat([b[:, :1] + a[:, :1] * initial[:, None], b[:, 1:]], -1)
    joined, reach = a, 1
    while reach < a.shape[-1]:
        b = torch.cat([b[:, :reach], b[:, reach:] + joined[:, reach:] * b[:, :-reach]], -1)
        joined = torch.cat([joined[:, :reach], joined[:, reach:] * joined[:, :-reach]], -1)
        reach *= 2
    return b.clone() if reach == 1 else b


torch.library.impl("arcore::linear_scan", "CompositeExplicitAutograd", _doubling)


@torch.library.register_fake("arcore::linear_scan")
def _fake(a: Tensor, b: Tensor, initial: Tensor | None, reverse: bool) -> Tensor:
    return torch.empty_like(a)


def _before(out: Tensor, initial: Tensor | None, reverse: bool) -> Tensor:
    """The state that each step started from."""
    first = (out.new_zeros(len(out)) if initial is None else initial)[:, None]
    return torch.cat([out[:, 1:], first], -1) if reverse else torch.cat([first, out[:, :-1]], -1)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, _, initial, reverse = inputs
    ctx.save_for_backward(a, initial, output)
    ctx.reverse = reverse


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    a, initial, out = ctx.saved_tensors
    # What reaches step t from later ones passes through their factors, so the factors move by one.
    nothing = a.new_zeros(len(a), 1)
    factors = torch.cat([nothing, a[:, :-1]], -1) if ctx.reverse else torch.cat([a[:, 1:], nothing], -1)
    total = torch.ops.arcore.linear_scan(factors.contiguous(), grad.contiguous(), None, not ctx.reverse)
    grad_initial = None
    if initial is not None:
        end = -1 if ctx.reverse else 0
        grad_initial = total[:, end] * a[:, end] if a.shape[-1] else grad.new_zeros(len(a))
    return total * _before(out, initial, ctx.reverse), total, grad_initial, None


def _tangents(
    inputs: tuple[Any, ...], outputs: tuple[Tensor, ...], along: tuple[Tensor | None, ...]
) -> tuple[Tensor]:
    a, b, initial, reverse = inputs
    moving = torch.zeros_like(b) if along[1] is None else along[1]
    if along[0] is not None:
        moving = moving + along[0] * _before(outputs[0], initial, reverse)
    first = None if along[2] is None else along[2].contiguous()
    return (torch.ops.arcore.linear_scan(a, moving.contiguous(), first, reverse),)


register_derivatives("linear_scan", _backward, _setup_context, _tangents)
register_vmap("linear_scan")
