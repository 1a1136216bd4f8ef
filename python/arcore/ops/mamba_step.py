"""One Mamba layer for one token per row: public function, reference, and the op's fake rule.

The passes and the numerics are in csrc/mamba_step/README.md.
"""

from __future__ import annotations

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor

from arcore import _extension as _extension
from arcore.ops._block_values import reference_block_values
from arcore.ops._checks import checked_call, same_device
from arcore.ops._registration import call_in_place, mark_written, refuse_derivatives, register_in_place

OP = "arcore.mamba_step"
# Most rows, taps and states: kMaxTokens of csrc/common/weights.h, kMostTaps and kMostStates of
# csrc/mamba_step/params.h.
MAX_ROWS, MAX_TAPS, MAX_STATES = 64, 8, 256
DTYPES = (torch.float32, torch.bfloat16)
_LOOP = "it writes in place; call it once for all rows, or in a loop"


def mamba_step(
    x: Tensor,
    *,
    norm: Tensor,
    in_proj: Tensor,
    conv_weight: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    A: Tensor,
    D: Tensor,
    out_proj: Tensor,
    conv_state: Tensor,
    state: Tensor,
    in_bias: Tensor | None = None,
    conv_bias: Tensor | None = None,
    dt_bias: Tensor | None = None,
    out_bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Take one token of each row through a layer of Mamba, whose states move on.

    ``u, z`` are the halves of ``in_proj(rms_norm(x))``; u is convolved with the inputs before it and passes a SiLU;
    ``dt, b, c = x_proj u``; ``state = exp(delta A) state + delta b u`` with ``delta = softplus(dt_proj dt + dt_bias)``;
    and ``x += out_proj((c state + D u) silu(z))``. The weights are read once for all rows, and a row's result depends
    neither on the others nor on the number of threads.

    Each of `in_proj`, `x_proj`, `dt_proj` and `out_proj` is float32, bfloat16 or in blocks, uint8
    `[rows, columns / 32, bytes]` as for `arcore.ops.block_values`, whatever the others are. Numbers become float32 in
    registers, so blocks give the bits of float32 weights of the same numbers. Sums and what passes from product to
    product are float32.

    For decoding on CPUs, without gradient. A model does the same in a dozen ops, between which the weights push code
    and data out of the caches.

    Args:
        x: hidden states ``[B, C]``, float32 or bfloat16, contiguous; written in place. B is at most 64.
        norm: weight of the RMS norm, ``[C]``; like all small parameters float32 or bfloat16.
        in_proj: ``[2 D, C]``, what is convolved first, then the gate.
        conv_weight: ``[D, W]``, the tap of the newest input last, W from 2 to 8, any strides; float32 whose channels
            lie side by side is read fastest.
        x_proj: ``[R + 2 N, D]``: rank of the step sizes, input matrix, output matrix. N is at most 256.
        dt_proj: ``[D, R]``.
        A: ``[D, N]``, of the continuous system, negative.
        D: ``[D]``, weights of the way past the scan.
        out_proj: ``[C, D]``.
        conv_state: the last inputs of the convolution ``[B, W - 1, D]``, oldest first, float32 or bfloat16, channels
            side by side; written in place.
        state: float32 ``[B, D, N]``, the numbers of a row side by side; written in place.
        in_bias: ``[2 D]`` or None.
        conv_bias: ``[D]`` or None.
        dt_bias: ``[D]`` or None.
        out_bias: ``[C]`` or None.
        eps: added to the mean square, at least 0.

    Returns:
        x.

    Raises:
        TypeError: an argument is no tensor, or no number, where it should be one.
        ValueError: a shape, dtype, device or layout does not fit, or what is written shares memory with itself or with
            another argument.
        RuntimeError: a gradient would be expected, or a transform of `torch.func` is active.
        NotImplementedError: an argument has a forward-mode tangent, or the tensors are not on a CPU.

    Reference: Mamba (arXiv:2312.00752), sections 3.2 and 3.4.
    """
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"{OP}: expected eps to be a number but got {eps!r}")
    optional = (in_bias, conv_bias, dt_bias, out_bias)
    needed = (x, norm, in_proj, conv_weight, x_proj, dt_proj, A, D, out_proj, conv_state, state)
    if not all(isinstance(t, Tensor) for t in needed):
        _check_tensors(*needed)
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(f"{OP}: expected no transform of torch.func around it but got one; {_LOOP}")
    _refuse_gradients(*needed, *optional)
    checked_call(
        "mamba_step", call_in_place, torch.ops.arcore.mamba_step.default,
        x, norm, in_proj, in_bias, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, out_proj, out_bias,
        conv_state, state, eps,
    )  # fmt: skip
    mark_written(x, conv_state, state)
    return x


def reference_mamba_step(
    x: Tensor,
    *,
    norm: Tensor,
    in_proj: Tensor,
    conv_weight: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    A: Tensor,
    D: Tensor,
    out_proj: Tensor,
    conv_state: Tensor,
    state: Tensor,
    in_bias: Tensor | None = None,
    conv_bias: Tensor | None = None,
    dt_bias: Tensor | None = None,
    out_bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`mamba_step` in plain PyTorch; any device and sizes. It computes in the dtype of `state`."""
    _refuse_gradients(x, norm, in_proj, conv_weight, x_proj, dt_proj, A, D, out_proj, conv_state, state)
    dtype, ranks = state.dtype, [dt_proj.shape[1] * (32 if dt_proj.dtype == torch.uint8 else 1)]

    def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        numbers = reference_block_values(weight) if weight.dtype == torch.uint8 else weight
        return F.linear(inputs, numbers.to(dtype), None if bias is None else bias.to(dtype))

    wide = x.to(dtype)
    h = F.rms_norm(wide, norm.shape, norm.to(dtype), eps)
    u, z = linear(h, in_proj, in_bias).chunk(2, -1)
    inputs = torch.cat([conv_state.to(dtype), u.unsqueeze(1)], 1)  # [B, W, D]
    conv_state.copy_(inputs[:, 1:])
    u = (inputs * conv_weight.to(dtype).t()).sum(1)
    u = F.silu(u if conv_bias is None else u + conv_bias.to(dtype))
    dt, b, c = linear(u, x_proj).split([*ranks, state.shape[2], state.shape[2]], -1)
    delta = F.softplus(linear(dt, dt_proj, dt_bias)).unsqueeze(-1)  # [B, D, 1]
    state.mul_((delta * A.to(dtype)).exp()).add_(delta * u.unsqueeze(-1) * b.unsqueeze(1))
    y = (state * c.unsqueeze(1)).sum(-1) + D.to(dtype) * u
    return x.copy_(wide + linear(y * F.silu(z), out_proj, out_bias))


def _refuse_gradients(*tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(f"{OP}: this op has no gradient; call it under torch.no_grad()")
    if forward_ad._current_level >= 0:
        refuse_derivatives("mamba_step", *tensors)


def _check_tensors(*tensors: Tensor) -> None:
    """Raise unless all are tensors on one device."""
    names = (
        *("x", "norm", "in_proj", "conv_weight", "x_proj", "dt_proj", "A", "D", "out_proj"),
        *("conv_state", "state"),
    )
    same_device(OP, **dict(zip(names, tensors, strict=True)))


@torch.library.register_fake("arcore::mamba_step")
def _fake(
    x: Tensor,
    norm: Tensor,
    in_proj: Tensor,
    in_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor,
    out_proj: Tensor,
    out_bias: Tensor | None,
    conv_state: Tensor,
    state: Tensor,
    eps: float,
) -> None:
    _check_tensors(x, norm, in_proj, conv_weight, x_proj, dt_proj, A, D, out_proj, conv_state, state)
    same_device(OP, x=x, in_bias=in_bias, conv_bias=conv_bias, dt_bias=dt_bias, out_bias=out_bias)


register_in_place("mamba_step")
