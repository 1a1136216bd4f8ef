"""Mamba's selective scan: public function, reference, and the op's fake and autograd rules.

The math, the loops and the numerics are in csrc/selective_scan/README.md.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.nn.functional import softplus

from arcore import _extension as _extension
from arcore.ops import _selective_scan_tangent as _selective_scan_tangent
from arcore.ops._checks import REFUSALS, checked_call, same_device
from arcore.ops._registration import (
    call_below,
    forbid_further_derivatives,
    register_derivatives,
    register_vmap,
    untracked,
)

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_STATE = 256
_FORWARD = torch.ops.arcore.selective_scan.default._op
# Steps between the states that the forward keeps for the backward; csrc/selective_scan/params.h has it too.
CHUNK = 64
CUDA_CHUNK = 32  # kCudaChunk of csrc/selective_scan/params.h


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: Literal[False] = False,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
    reverse: bool = False,
    deterministic: bool = True,
) -> Tensor: ...
@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    return_last_state: Literal[True],
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
    reverse: bool = False,
    deterministic: bool = True,
) -> tuple[Tensor, Tensor]: ...
@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
    reverse: bool = False,
    deterministic: bool = True,
) -> Tensor | tuple[Tensor, Tensor]: ...


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
    reverse: bool = False,
    deterministic: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective state-space scan of Mamba-1, with carried states, packed sequences and both directions.

    Per batch b, channel d and state n, with ``dt = delta + delta_bias`` (through softplus if `delta_softplus`)::

        h[t, n] = exp(dt[t] * A[d, n]) * h[t-1, n] + dt[t] * B[t, n] * u[t]
        y[t]    = sum_n C[t, n] * h[t, n] + D[d] * u[t]
        out[t]  = y[t] * silu(z[t])

    All arithmetic is fp32 whatever the storage types, which may differ between arguments. Differentiable in every
    float argument, through `out` and through the last state; memory is O(B * D * L), never times N. Forward-mode
    derivatives (`torch.func.jvp` and what builds on it) take one more scan, about twice as long, and have no derivative
    of their own. Deterministic;
    results depend neither on the number of threads, nor on the layout, nor on batch mates.

    Args:
        u: input, ``[B, D, L]``, float32, bfloat16 or float16. Any strides, here and in every other argument:
            channel-last views and slices are read in place.
        delta: step sizes before bias and softplus, ``[B, D, L]``.
        A: state matrix, real, ``[D, N]``, float32; N at most 256. Negative for a stable system.
        B: input matrix: ``[D, N]`` (constant in time), ``[B, N, L]`` or ``[B, G, N, L]`` with G groups of D/G
            consecutive channels.
        C: output matrix, shapes as `B`, chosen independently.
        D: skip weight ``[D]``, float32.
        z: gate, ``[B, D, L]``.
        delta_bias: ``[D]``, float32.
        delta_softplus: apply softplus to delta + delta_bias.
        return_last_state: also return the state after the last step.
        initial_state: state before the first step, ``[B, D, N]``, any supported float dtype; zero when None. With
            `cu_seqlens` one per sequence, ``[num_sequences, D, N]``.
        cu_seqlens: int32 or int64 ``[num_sequences + 1]``, boundaries 0 = c0 <= c1 <= ... = L of sequences packed
            into one row (B = 1); equals separate calls.
        seq_idx: int32 ``[B, L]``, sequence of each token; the state starts from zero where the id changes. Tokens
            with a negative id are padding: they are skipped (output 0, gradient 0, state unchanged).
        reverse: run from the last step to the first; equals flipping all ``L`` axes before and after.
        deterministic: accepted for callers that ask; the backward is always deterministic.

    Returns:
        ``[B, D, L]`` in u's dtype and memory layout; with `return_last_state` also the state after the last step in
        scan direction, float32 ``[B, D, N]`` (``[num_sequences, D, N]`` with `cu_seqlens`).

    Raises:
        TypeError: an argument is not a tensor, or has an unsupported dtype (complex A, float64).
        ValueError: shapes, lengths or devices do not fit, or `cu_seqlens` and `seq_idx` are both given.

    Reference: Mamba (arXiv:2312.00752, section 3.2, algorithm 2; B is discretised by Euler's rule).
    """
    if untracked(u, delta, A, B, C, D, z, delta_bias, initial_state):
        try:  # the op checks tensors itself; the words for what it refuses are found below
            found = call_below(
                _FORWARD, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, seq_idx,
                delta_softplus, reverse, False,
            )  # fmt: skip
            return (found[0], found[1]) if return_last_state else found[0]
        except REFUSALS:
            pass
    inputs = _check(
        "selective_scan", _Inputs(u, delta, A, B, C, D, z, delta_bias, initial_state), cu_seqlens, seq_idx
    )
    for name, tensor in inputs._asdict().items():
        if tensor is not None and tensor.dtype not in SUPPORTED_DTYPES:
            raise TypeError(
                f"arcore.selective_scan: expected {name} of dtype float32, bfloat16 or float16 but got "
                f"{_name(tensor.dtype)}; for float64 (gradcheck) call reference_selective_scan"
            )
    # Inside torch.vmap nothing seems to require a gradient; the backward then makes the states again.
    save_states = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    out, last_state, _ = checked_call(
        "selective_scan",
        torch.ops.arcore.selective_scan,
        *inputs,
        cu_seqlens,
        seq_idx,
        delta_softplus,
        reverse,
        save_states,
    )
    return (out, last_state) if return_last_state else out


def reference_selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
    reverse: bool = False,
    deterministic: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """`selective_scan` in plain PyTorch, one step at a time, any real float dtype and device.

    Works in float64 if any input is float64, else in float32. Arguments, returns and errors are those of
    `selective_scan`.
    """
    inputs = _check(
        "selective_scan", _Inputs(u, delta, A, B, C, D, z, delta_bias, initial_state), cu_seqlens, seq_idx
    )
    dtype = (
        torch.float64 if any(t is not None and t.dtype == torch.float64 for t in inputs) else torch.float32
    )
    tensors: list[Any] = [None if t is None else t.to(dtype) for t in inputs]
    x = _Inputs(*tensors)
    if cu_seqlens is not None:
        out, state = _packed(x, cu_seqlens.tolist(), delta_softplus, reverse)
    else:
        out, state = _steps(x, seq_idx, delta_softplus, reverse)
    return (out.to(u.dtype), state) if return_last_state else out.to(u.dtype)


class _Inputs(NamedTuple):
    """The float arguments, in the op's order."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    initial_state: Tensor | None


def _packed(x: _Inputs, bounds: list[int], delta_softplus: bool, reverse: bool) -> tuple[Tensor, Tensor]:
    def part(t: Tensor | None, start: int, stop: int) -> Any:
        return t if t is None or t.dim() == 2 else t[..., start:stop]

    outs, states = [x.u[..., :0]], [x.u.new_zeros(0, *x.A.shape)]
    for i in range(len(bounds) - 1):
        start, stop = bounds[i], bounds[i + 1]
        piece = x._replace(
            **{name: part(getattr(x, name), start, stop) for name in ("u", "delta", "B", "C", "z")},
            initial_state=None if x.initial_state is None else x.initial_state[i : i + 1],
        )
        out, state = _steps(piece, None, delta_softplus, reverse)
        outs.append(out)
        states.append(state)
    return torch.cat(outs, dim=-1), torch.cat(states)


def _steps(x: _Inputs, seq_idx: Tensor | None, delta_softplus: bool, reverse: bool) -> tuple[Tensor, Tensor]:
    batch, dim, length = x.u.shape
    state = x.u.new_zeros(batch, dim, x.A.shape[1]) if x.initial_state is None else x.initial_state
    dt = x.delta if x.delta_bias is None else x.delta + x.delta_bias[:, None]
    dt = softplus(dt) if delta_softplus else dt
    current = torch.full((batch,), -1, device=x.u.device)  # id of the sequence that `state` belongs to
    outs: list[Tensor] = [x.u.new_zeros(batch, dim)] * length
    for t in reversed(range(length)) if reverse else range(length):
        real = None
        before = state
        if seq_idx is not None:
            ids = seq_idx[:, t]
            real = (ids >= 0)[:, None]
            fresh = (ids >= 0) & (current >= 0) & (ids != current)
            before = torch.where(fresh[:, None, None], 0.0, state)
            current = torch.where(ids >= 0, ids, current)
        u, step = x.u[..., t], dt[..., t]
        after = torch.exp(step[..., None] * x.A) * before + (step * u)[..., None] * _at(x.B, t, dim)
        y = (after * _at(x.C, t, dim)).sum(-1)
        if x.D is not None:
            y = y + x.D * u
        if x.z is not None:
            y = y * torch.nn.functional.silu(x.z[..., t])
        outs[t] = y if real is None else torch.where(real, y, 0.0)
        state = after if real is None else torch.where(real[..., None], after, state)
    return torch.stack(outs, dim=-1) if outs else x.u, state


def _at(matrix: Tensor, t: int, dim: int) -> Tensor:
    """B or C at step t, broadcastable to ``[B, D, N]``."""
    if matrix.dim() == 2:
        return matrix
    if matrix.dim() == 3:
        return matrix[:, None, :, t]
    return matrix[..., t].repeat_interleave(dim // matrix.shape[1], dim=1)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check(op: str, inputs: _Inputs, cu_seqlens: Tensor | None, seq_idx: Tensor | None) -> _Inputs:
    op = f"arcore.{op}"
    optional = ("D", "z", "delta_bias", "initial_state")
    for name, tensor in inputs._asdict().items():
        if not isinstance(tensor, Tensor) and not (tensor is None and name in optional):
            raise TypeError(f"{op}: expected {name} to be a tensor but got {type(tensor).__name__}")
    same_device(op, **inputs._asdict(), cu_seqlens=cu_seqlens, seq_idx=seq_idx)
    u, delta, A, B, C, D, z, delta_bias, initial_state = inputs
    if u.dim() != 3:
        raise ValueError(f"{op}: expected u of shape (batch, dim, length) but got {tuple(u.shape)}")
    batch, dim, length = u.shape
    if A.is_complex():
        raise TypeError(
            f"{op}: expected a real A but got {_name(A.dtype)}; complex state matrices are not supported"
        )
    if A.dim() != 2 or A.shape[0] != dim or not 1 <= A.shape[1] <= MAX_STATE:
        raise ValueError(
            f"{op}: expected A of shape (dim={dim}, d_state) but got {tuple(A.shape)}; d_state must be 1 to {MAX_STATE}"
        )
    state = A.shape[1]
    for name, tensor in (("delta", delta), ("z", z)):
        if tensor is not None and tensor.shape != u.shape:
            raise ValueError(
                f"{op}: expected {name} of u's shape {tuple(u.shape)} but got {tuple(tensor.shape)}"
            )
    for name, tensor in (("D", D), ("delta_bias", delta_bias)):
        if tensor is not None and tensor.shape != (dim,):
            raise ValueError(f"{op}: expected {name} of shape (dim={dim},) but got {tuple(tensor.shape)}")
    for name, tensor in (("B", B), ("C", C)):
        fits = (
            tensor.shape == (dim, state)
            or tensor.shape == (batch, state, length)
            or (
                tensor.dim() == 4
                and tensor.shape == (batch, tensor.shape[1], state, length)
                and (dim % tensor.shape[1] == 0 if tensor.shape[1] else dim == 0)
            )
        )
        if not fits:
            raise ValueError(
                f"{op}: expected {name} of shape (dim={dim}, d_state={state}), (batch={batch}, {state}, "
                f"length={length}) or ({batch}, groups, {state}, {length}) with groups that divide dim, "
                f"but got {tuple(tensor.shape)}"
            )
    rows = batch
    if cu_seqlens is not None:
        if seq_idx is not None:
            raise ValueError(f"{op}: expected cu_seqlens or seq_idx but got both; give one")
        if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64) or len(cu_seqlens) < 1:
            raise ValueError(
                f"{op}: expected cu_seqlens int32 or int64 of shape (num_sequences + 1,) but got "
                f"{_name(cu_seqlens.dtype)} {tuple(cu_seqlens.shape)}"
            )
        if batch != 1:
            raise ValueError(
                f"{op}: expected batch 1 with cu_seqlens (sequences packed into one row) but got {batch}; "
                "give seq_idx for several packed rows"
            )
        rows = len(cu_seqlens) - 1
    if seq_idx is not None and (seq_idx.shape != (batch, length) or seq_idx.dtype != torch.int32):
        raise ValueError(
            f"{op}: expected seq_idx int32 of shape (batch={batch}, length={length}) but got "
            f"{_name(seq_idx.dtype)} {tuple(seq_idx.shape)}"
        )
    if initial_state is not None and initial_state.shape != (rows, dim, state):
        raise ValueError(
            f"{op}: expected initial_state of shape ({rows}, dim={dim}, d_state={state}), one row per sequence, "
            f"but got {tuple(initial_state.shape)}"
        )
    return inputs


@torch.library.register_fake("arcore::selective_scan")
def _fake(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = _Inputs(u, delta, A, B, C, D, z, delta_bias, initial_state)
    same_device("arcore.selective_scan", **inputs._asdict(), cu_seqlens=cu_seqlens, seq_idx=seq_idx)
    batch, dim, length = u.shape
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    chunk = CUDA_CHUNK if u.device.type == "cuda" else CHUNK
    slots = torch.sym_max((length + chunk - 1) // chunk - 1, 0)
    return (
        torch.empty_like(u),
        u.new_empty((rows, dim, A.shape[1]), dtype=torch.float32),
        u.new_empty((batch if save_states else 0, slots, A.shape[1], dim), dtype=torch.float32),
    )


@torch.library.register_fake("arcore::selective_scan_backward")
def _fake_backward(
    grad_out: Tensor | None,
    grad_last_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    states: Tensor,
    delta_softplus: bool,
    reverse: bool,
) -> tuple[Tensor, ...]:
    inputs = _Inputs(u, delta, A, B, C, D, z, delta_bias, initial_state)
    gradients = {"grad_out": grad_out, "grad_last_state": grad_last_state, "states": states}
    same_device(
        "arcore.selective_scan_backward",
        **inputs._asdict(),
        **gradients,
        cu_seqlens=cu_seqlens,
        seq_idx=seq_idx,
    )

    def dense(t: Tensor | None) -> Tensor:
        return u.new_empty((0,), dtype=torch.float32) if t is None else t.new_empty(t.shape)

    def like(t: Tensor | None) -> Tensor:
        return u.new_empty((0,), dtype=torch.float32) if t is None else torch.empty_like(t)

    return (
        like(u),
        like(delta),
        dense(A),
        dense(B) if B.dim() == 2 else like(B),
        dense(C) if C.dim() == 2 else like(C),
        dense(D),
        like(z),
        dense(delta_bias),
        dense(initial_state),
    )


@torch.library.register_fake("arcore::selective_scan_tangent")
def _fake_tangent(u: Tensor, delta: Tensor, A: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *tensors, _, _ = rest
    same_device(
        "arcore.selective_scan_tangent",
        u=u,
        delta=delta,
        A=A,
        **{f"argument_{i + 4}": t for i, t in enumerate(tensors)},
    )
    cu_seqlens = tensors[15]
    rows = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return torch.empty_like(u), u.new_empty((rows, u.shape[1], A.shape[1]), dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, delta_softplus, reverse, save_states = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.flags = (delta_softplus, reverse)
    ctx.saved_states = save_states
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_out: Tensor | None, grad_last_state: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    *tensors, states = ctx.saved_tensors
    if grad_out is None and grad_last_state is None:
        return (None,) * 14
    if not ctx.saved_states:
        _, _, states = torch.ops.arcore.selective_scan(*tensors, *ctx.flags, True)
    grads = torch.ops.arcore.selective_scan_backward(grad_out, grad_last_state, *tensors, states, *ctx.flags)
    return *(None if t is None else g for t, g in zip(tensors[:9], grads, strict=True)), *(None,) * 5


def _tangents(
    inputs: tuple[Any, ...], outputs: tuple[Tensor, ...], along: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    *tensors, delta_softplus, reverse, _ = inputs
    if outputs[0].device.type not in ("cpu", "cuda", "meta"):
        raise NotImplementedError(
            f"arcore.selective_scan: expected tensors on a CPU or a CUDA GPU for forward-mode derivatives but got "
            f"{outputs[0].device}; move them there or call reference_selective_scan"
        )
    out, last_state = torch.ops.arcore.selective_scan_tangent(
        *tensors[:9], *along[:9], *tensors[9:], delta_softplus, reverse
    )
    return out, last_state, None


register_derivatives("selective_scan", _backward, _setup_context, _tangents)
forbid_further_derivatives("selective_scan", "backward", "tangent")
for _op in ("selective_scan", "selective_scan_backward", "selective_scan_tangent"):
    register_vmap(_op)
