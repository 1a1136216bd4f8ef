"""Mamba-2's scan (structured state space duality): public function, reference, and the op's fake and autograd rules.

The loops and the numerics are in csrc/ssd/README.md; gradients with a derivative of their own in _ssd_backward.py.
"""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from arcore import _extension as _extension
from arcore.ops._checks import checked_call, same_device
from arcore.ops._registration import (
    forbid_further_derivatives,
    has_tangents,
    register_derivatives,
    register_vmap,
    untracked,
)
from arcore.ops._ssd_backward import Inputs, backward
from arcore.ops.selective_scan import reference_selective_scan, selective_scan

OP = "arcore.ssd"
SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_STATES = 256
# What shared memory of a GPU holds of a float32 gradient; csrc/ssd/params.h has it too (kMostStatesOfThreeParts).
CUDA_STATES = 128


@overload
def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    return_last_state: Literal[False] = False,
    *,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
    reverse: bool = False,
) -> Tensor: ...
@overload
def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    *,
    return_last_state: Literal[True],
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]: ...
@overload
def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    return_last_state: bool = False,
    *,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
    reverse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]: ...


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    return_last_state: bool = False,
    *,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
    reverse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective scan whose decay is one number per head: Mamba-2's, as products of matrices over chunks.

    Per head, with ``dt = clamp(softplus(dt + dt_bias), *dt_limit)`` (softplus optional):
    ``state = exp(dt A) state + dt x B^T``, ``y = state C + D x``, ``out = y silu(z)``. fp32 sums and state
    whatever the storage; factors of products are bfloat16 where x, B and C are and the CPU has units for it, else fp32.
    Differentiable in all float arguments, and through the last state, in reverse mode.
    Deterministic; results and gradients do not depend on the number of threads or on batch mates. Gradients that are to
    be differentiated again (`create_graph=True`, `torch.func.grad`) are computed by PyTorch, several times slower.
    On a GPU the products run on tensor cores, with numbers in two parts of 16 bits (three for float32), to the same
    bounds. Two things go through the kernels of `selective_scan` there, with A and dt written out for every channel:
    forward mode, which a CPU does not have, and gradients of float32 with more than 128 states; such gradients are not
    differentiated again.

    Args:
        x: ``[B, L, H, P]``, H heads of P channels; as all inputs float32, bfloat16 or float16, any strides.
        dt: ``[B, L, H]``.
        A: ``[H]``, real, usually negative.
        B: ``[B, L, G, N]``, where G divides H: heads of a group share it. N at most 256.
        C: B's shape.
        D: ``[H]`` or ``[H, P]``.
        z: gate, x's shape.
        dt_bias: ``[H]``.
        dt_softplus: apply softplus to ``dt + dt_bias``.
        return_last_state: also return the state after the last step.
        dt_limit: lowest and highest step size.
        initial_state: ``[B, H, P, N]``, with `cu_seqlens` one per sequence; zero when None. With `seq_idx` it
            belongs to the first sequence of the row.
        cu_seqlens: boundaries of sequences packed into one row, int32 or int64 ``[S + 1]``; the batch is then 1.
        seq_idx: int32 ``[B, L]``, sequence of each step; a change starts from zero. Negative: padding, the step is
            skipped and its output is 0.
        reverse: scan from the last step to the first; equals flipping inputs and output in time.

    Returns:
        ``[B, L, H, P]`` in x's dtype; with `return_last_state` also float32 ``[B, H, P, N]``, with `cu_seqlens` one
        per sequence.

    Raises:
        TypeError: an argument is not a tensor, or has an unsupported dtype.
        ValueError: shapes or devices do not fit, or `dt_limit` is no range.
        NotImplementedError: the tensors are on another device than a CPU or a CUDA GPU, or have forward-mode tangents
            on a CPU.

    Reference: Mamba-2 (arXiv:2405.21060, sections 6 and 7). mamba_ssm's `mamba_chunk_scan_combined` computes the same;
    names follow `selective_scan`, and the size of chunks is not an argument, since it changes no result.
    """
    v = _check(x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, seq_idx, dt_limit)
    for name, tensor in v._asdict().items():
        if tensor is not None and tensor.dtype not in SUPPORTED_DTYPES:
            raise TypeError(
                f"{OP}: expected {name} of dtype float32, bfloat16 or float16 but got {_name(tensor.dtype)}; "
                "for float64 (gradcheck) call reference_ssd"
            )
    if x.device.type == "cuda" and _beyond_the_kernels(v):
        out, last_state = _by_selective_scan(v, dt_softplus, dt_limit, cu_seqlens, seq_idx, reverse)
    elif x.device.type in ("cpu", "cuda", "meta"):
        out, last_state = checked_call(
            "ssd", torch.ops.arcore.ssd, *v, cu_seqlens, seq_idx, dt_softplus, *dt_limit, reverse
        )
    else:
        raise NotImplementedError(
            f"{OP}: expected tensors on a CPU or a CUDA GPU but got {x.device}. Move its arguments to the CPU, or call "
            "reference_ssd, which runs on any device one step at a time"
        )
    return (out, last_state) if return_last_state else out


def _beyond_the_kernels(v: Inputs) -> bool:
    """Whether a GPU needs other kernels: for forward mode, and for float32 gradients with many states."""
    wide = v.B.shape[3] > CUDA_STATES and torch.float32 in (v.x.dtype, v.B.dtype, v.C.dtype)
    return (wide and not untracked(*v)) or has_tangents(*v)


def _channels(t: Tensor) -> Tensor:
    """``[B, L, H, P]`` as ``[B, H * P, L]``; no copy where heads and channels lie one after the other."""
    return t.flatten(2).transpose(1, 2)


def _by_selective_scan(
    v: Inputs,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """`ssd` by the kernels of `selective_scan`: every channel of a head has the head's A and dt."""
    _, _, heads, dim = v.x.shape
    # What the kernels would do, but before it is written out for every channel, and with limits.
    step = v.dt.float() if v.dt_bias is None else v.dt.float() + v.dt_bias.float()
    step = F.softplus(step) if dt_softplus else step
    if dt_limit != (0.0, math.inf):
        step = step.clamp(*dt_limit)
    elif not dt_softplus:
        step = step.clamp_min(0.0)
    out, last_state = selective_scan(
        _channels(v.x),
        _channels(step[..., None].expand(v.x.shape)),
        v.A.float().repeat_interleave(dim)[:, None].expand(-1, v.B.shape[3]),
        v.B.permute(0, 2, 3, 1),
        v.C.permute(0, 2, 3, 1),
        None if v.D is None else v.D.flatten(),
        None if v.z is None else _channels(v.z),
        return_last_state=True,
        initial_state=None if v.initial_state is None else v.initial_state.flatten(1, 2),
        cu_seqlens=cu_seqlens,
        seq_idx=seq_idx,
        reverse=reverse,
    )
    out = out.transpose(1, 2).unflatten(2, (heads, dim)).to(v.x.dtype)
    return out, last_state.unflatten(1, (heads, dim))


def reference_ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    return_last_state: bool = False,
    *,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
    reverse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`ssd` in plain PyTorch, one step at a time, any real float dtype and device.

    Works in float64 if any input is float64, else in float32. Arguments, returns and errors are those of `ssd`. It is
    `reference_selective_scan` with A and dt written out for every channel.
    """
    v = _check(x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, seq_idx, dt_limit)
    batch, length, heads, dim = x.shape
    given = [t for t in v if t is not None]
    work = torch.float64 if any(t.dtype == torch.float64 for t in given) else torch.float32
    step = dt.to(work) if dt_bias is None else dt.to(work) + dt_bias.to(work)
    step = (F.softplus(step) if dt_softplus else step).clamp(*dt_limit)

    def channels_first(t: Tensor) -> Tensor:
        return t.to(work).flatten(2).transpose(1, 2)

    states = B.shape[3]
    out, last_state = reference_selective_scan(
        channels_first(x),
        channels_first(step[..., None].expand(x.shape)),
        v.A.to(work).repeat_interleave(dim)[:, None].expand(-1, states),
        B.to(work).permute(0, 2, 3, 1),
        C.to(work).permute(0, 2, 3, 1),
        None if v.D is None else v.D.to(work).flatten(),
        None if z is None else channels_first(z),
        return_last_state=True,
        initial_state=None if initial_state is None else initial_state.to(work).flatten(1, 2),
        cu_seqlens=cu_seqlens,
        seq_idx=seq_idx,
        reverse=reverse,
    )
    out = out.transpose(1, 2).reshape(batch, length, heads, dim).to(x.dtype)
    last_state = last_state.unflatten(1, (heads, dim))
    return (out, last_state) if return_last_state else out


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    dt_limit: tuple[float, float],
) -> Inputs:
    """The float arguments, with D written out as ``[H, P]``."""
    v = Inputs(x, dt, A, B, C, D, z, dt_bias, initial_state)
    for name, tensor in {**v._asdict(), "cu_seqlens": cu_seqlens, "seq_idx": seq_idx}.items():
        optional = name not in ("x", "dt", "A", "B", "C")
        if not isinstance(tensor, Tensor) and not (optional and tensor is None):
            wanted = "a tensor or None" if optional else "a tensor"
            raise TypeError(f"{OP}: expected {name} to be {wanted} but got {type(tensor).__name__}")
    same_device(OP, **v._asdict(), cu_seqlens=cu_seqlens, seq_idx=seq_idx)
    if A.is_complex():
        raise TypeError(f"{OP}: expected a real A but got {_name(A.dtype)}")
    if x.dim() != 4:
        raise ValueError(f"{OP}: expected x of shape (batch, length, heads, dim) but got {tuple(x.shape)}")
    batch, length, heads, dim = x.shape
    if B.dim() != 4 or B.shape[:2] != x.shape[:2] or not 1 <= B.shape[3] <= MAX_STATES:
        raise ValueError(
            f"{OP}: expected B of shape (batch={batch}, length={length}, groups, d_state) with d_state 1 to "
            f"{MAX_STATES} but got {tuple(B.shape)}"
        )
    groups, states = B.shape[2:]
    if groups == 0 or heads % groups != 0:
        raise ValueError(f"{OP}: expected B with groups that divide the {heads} heads but got {groups}")
    rows = batch
    if cu_seqlens is not None:
        if seq_idx is not None:
            raise ValueError(f"{OP}: expected cu_seqlens or seq_idx but got both")
        if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.dim() != 1 or len(cu_seqlens) < 1:
            raise ValueError(
                f"{OP}: expected cu_seqlens int32 or int64 of shape (num_sequences + 1,) but got "
                f"{_name(cu_seqlens.dtype)} {tuple(cu_seqlens.shape)}"
            )
        if batch != 1:
            raise ValueError(f"{OP}: expected batch 1 with cu_seqlens (one packed row) but got {batch}")
        rows = cu_seqlens.shape[0] - 1
    if seq_idx is not None and (seq_idx.shape != (batch, length) or seq_idx.dtype != torch.int32):
        raise ValueError(
            f"{OP}: expected seq_idx int32 of shape (batch={batch}, length={length}) but got "
            f"{_name(seq_idx.dtype)} {tuple(seq_idx.shape)}"
        )
    wanted_shapes = {
        "dt": (dt, (batch, length, heads)),
        "A": (A, (heads,)),
        "C": (C, (batch, length, groups, states)),
        "z": (z, (batch, length, heads, dim)),
        "dt_bias": (dt_bias, (heads,)),
        "initial_state": (initial_state, (rows, heads, dim, states)),
    }
    for name, (tensor, shape) in wanted_shapes.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{OP}: expected {name} of shape {shape} but got {tuple(tensor.shape)}")
    if D is not None:
        if D.shape not in ((heads,), (heads, dim)):
            raise ValueError(
                f"{OP}: expected D of shape (heads={heads},) or (heads={heads}, dim={dim}) but got {tuple(D.shape)}"
            )
        v = v._replace(D=D if D.dim() == 2 else D[:, None].expand(heads, dim))
    if not (len(dt_limit) == 2 and 0.0 <= dt_limit[0] <= dt_limit[1]):
        raise ValueError(f"{OP}: expected dt_limit as (low, high) with 0 <= low <= high but got {dt_limit}")
    return v


@torch.library.register_fake("arcore::ssd")
def _fake(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    dt_softplus: bool,
    dt_low: float,
    dt_high: float,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    v = Inputs(x, dt, A, B, C, D, z, dt_bias, initial_state)
    same_device(OP, **v._asdict(), cu_seqlens=cu_seqlens, seq_idx=seq_idx)
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    last_state = x.new_empty((rows, x.shape[2], x.shape[3], B.shape[3]), dtype=torch.float32)
    return torch.empty_like(x), last_state


@torch.library.register_fake("arcore::ssd_backward")
def _fake_backward(
    grad_out: Tensor | None,
    grad_last_state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    dt_softplus: bool,
    dt_low: float,
    dt_high: float,
    reverse: bool,
) -> tuple[Tensor, ...]:
    v = Inputs(x, dt, A, B, C, D, z, dt_bias, initial_state)
    same_device(
        "arcore.ssd_backward",
        **v._asdict(),
        grad_out=grad_out,
        grad_last_state=grad_last_state,
        cu_seqlens=cu_seqlens,
        seq_idx=seq_idx,
    )

    def dense(t: Tensor | None) -> Tensor:
        return x.new_empty((0,), dtype=torch.float32) if t is None else t.new_empty(t.shape)

    def like(t: Tensor | None) -> Tensor:
        return x.new_empty((0,), dtype=torch.float32) if t is None else torch.empty_like(t)

    return (
        like(x),
        like(dt),
        dense(A),
        like(B),
        like(C),
        dense(D),
        like(z),
        dense(dt_bias),
        dense(initial_state),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, dt_softplus, dt_low, dt_high, reverse = inputs
    ctx.save_for_backward(*tensors)
    ctx.settings = (dt_softplus, dt_low, dt_high, reverse)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_last: Tensor | None) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    none: tuple[Tensor | None, ...] = (None,) * 6
    if grad_out is None and grad_last is None:
        return (None,) * 9 + none
    if torch.is_grad_enabled():  # to be differentiated again
        *floats, cu_seqlens, seq_idx = tensors
        # Inside a region of autocast the products would run in 16 bits.
        with torch.autocast(tensors[0].device.type, enabled=False):
            named = backward(Inputs(*floats), grad_out, grad_last, seq_idx, cu_seqlens, *ctx.settings)
        given = Inputs(*floats)._asdict()
        return *(None if t is None else named[n].to(t.dtype) for n, t in given.items()), *none
    grads = torch.ops.arcore.ssd_backward(grad_out, grad_last, *tensors, *ctx.settings)
    return *(None if t is None else g for t, g in zip(tensors[:9], grads, strict=True)), *none


register_derivatives("ssd", _backward, _setup_context)
forbid_further_derivatives("ssd", "backward")
register_vmap("ssd")
register_vmap("ssd_backward")
