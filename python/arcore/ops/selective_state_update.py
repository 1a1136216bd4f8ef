"""One step of the selective scan against a state in memory: public function, reference, fake rule.

The loops and the numerics are in csrc/selective_state_update/README.md.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from arcore import _extension as _extension
from arcore.ops._checks import in_words, same_device
from arcore.ops._registration import call_in_place, mark_written, refuse_derivatives, register_in_place

OP = "arcore.selective_state_update"
SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_STATES = 256


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
    pad_slot_id: int = -1,
    *,
    num_steps: Tensor | None = None,
    snapshots: Tensor | None = None,
) -> Tensor:
    """One token of a selective scan per row, or a few; the state is changed in place.

    With ``dt = softplus(dt + dt_bias)`` (softplus optional), per channel and state:
    ``state = exp(dt A) state + dt B x``, ``y = sum_n C state + D x``, ``out = y silu(z)``. Equals one step of
    `selective_scan`; with heads, one of Mamba-2. fp32 arithmetic whatever the storage; no gradient: where one would be
    expected it raises. Several tokens in one call give the bits of as many calls; they need tensors on a CPU.

    Args:
        state: ``[rows, dim, d_state]`` or with heads ``[rows, heads, dim, d_state]``, float32, bfloat16 or float16, any
            strides; d_state at most 256.
        x: ``[batch, dim]`` or ``[batch, heads, dim]``, as dt and z: float32, bfloat16 or float16, any strides. Several
            tokens: ``[batch, steps, dim]`` or ``[batch, steps, heads, dim]``; dt, z, B and C then have steps too.
        dt: x's shape; with heads it may be one number per head, expanded over dim.
        A: ``[dim, d_state]`` or ``[heads, dim, d_state]``, real. One number per head, expanded over the last two
            dimensions (Mamba-2), costs one exponential per channel instead of d_state.
        B: ``[batch, d_state]`` or ``[batch, groups, d_state]``, where groups divide the heads.
        C: B's shape.
        D: ``[dim]`` or ``[heads, dim]``.
        z: gate, x's shape.
        dt_bias: ``[dim]`` or ``[heads, dim]``.
        dt_softplus: apply softplus to ``dt + dt_bias``.
        state_batch_indices: integers ``[batch]``, row of `state` for each row of x. A row that is named twice is
            updated twice, in the order of the batch.
        pad_slot_id: an index of this value, or a negative one, marks padding: its output is 0 and no state is touched.
        num_steps: integers ``[batch]`` from 0 to steps: only so many of a row's tokens count; the output of the others
            is 0.
        snapshots: ``[batch, steps + 1, *state.shape[1:]]`` in state's dtype; receives the state before the first token
            and after each. Speculative decoding puts back the one after the tokens that were accepted. Rows of padding
            are left as they are.

    Returns:
        The outputs, x's shape and dtype.

    Raises:
        TypeError: an argument is not a tensor, or has an unsupported dtype.
        ValueError: shapes or devices do not fit, d_state is above 256, an index lies outside `state`, or the state's
            elements share memory with each other or with another argument.
        RuntimeError: a gradient would be expected.
        NotImplementedError: several tokens of tensors on a GPU.

    Reference: Mamba (arXiv:2312.00752, section 3.3.2), Mamba-2 (arXiv:2405.21060, section 8); names and order are those
    of mamba_ssm's function.
    """
    # The op checks everything itself; here are only found the words, and no time is lost when nothing is wrong.
    arguments = (state, x, dt, A, B, C, D, z, dt_bias)
    settings = (dt_softplus, state_batch_indices, pad_slot_id)
    try:
        refuse_derivatives("selective_state_update", *arguments)
        out: Tensor
        if x.dim() == state.dim() or num_steps is not None or snapshots is not None:
            out = call_in_place(
                torch.ops.arcore.selective_state_update_steps.default,
                *arguments,
                *settings,
                num_steps,
                snapshots,
            )
        else:
            out = call_in_place(torch.ops.arcore.selective_state_update.default, *arguments, *settings)
        mark_written(state, snapshots)
        return out
    except (RuntimeError, TypeError, AttributeError) as error:
        refused = error
    _check(*arguments, state_batch_indices, num_steps, snapshots)
    for name, tensor in zip(_NAMES, (state, x, dt, A, B, C, D, z, dt_bias), strict=True):
        if tensor is not None and tensor.dtype not in SUPPORTED_DTYPES:
            raise TypeError(
                f"{OP}: expected {name} of dtype float32, bfloat16 or float16 but got "
                f"{str(tensor.dtype).removeprefix('torch.')}; for float64 call reference_selective_state_update"
            )
    raise in_words("selective_state_update", refused)


def reference_selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
    pad_slot_id: int = -1,
    *,
    num_steps: Tensor | None = None,
    snapshots: Tensor | None = None,
) -> Tensor:
    """`selective_state_update` in plain PyTorch, any float dtype and device.

    Works in float64 if the state is float64, else in float32. Arguments, returns and errors are those of
    `selective_state_update`.
    """
    stepped = _check(state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices, num_steps, snapshots)
    work = torch.float64 if state.dtype == torch.float64 else torch.float32
    headed = state.dim() == 4
    if not stepped:
        x, dt, B, C = (t.unsqueeze(1) for t in (x, dt, B, C))
        z = None if z is None else z.unsqueeze(1)
    out = torch.zeros_like(x)
    step = dt.to(work) if dt_bias is None else dt.to(work) + dt_bias.to(work)
    if dt_softplus:
        step = F.softplus(step)
    if headed:
        B, C = (t.repeat_interleave(state.shape[1] // t.shape[2], dim=2) for t in (B, C))
    for b in range(x.shape[0]):
        row = b if state_batch_indices is None else int(state_batch_indices[b])
        if state_batch_indices is not None and (row == pad_slot_id or row < 0):
            continue
        if not row < state.shape[0]:
            raise RuntimeError(
                f"{OP}: expected state_batch_indices from 0 to {state.shape[0] - 1}, or negative or "
                f"pad_slot_id={pad_slot_id} for padding, but got {row}"
            )
        count = x.shape[1] if num_steps is None else int(num_steps[b])
        if snapshots is not None:
            snapshots[b] = state[row]
        for t in range(count):
            decay = torch.exp(step[b, t][..., None] * A.to(work))
            drive = (step[b, t] * x[b, t].to(work))[..., None] * B[b, t].to(work).unsqueeze(-2)
            after = decay * state[row].to(work) + drive
            y = (after * C[b, t].to(work).unsqueeze(-2)).sum(-1)
            if D is not None:
                y = y + D.to(work) * x[b, t].to(work)
            if z is not None:
                y = y * F.silu(z[b, t].to(work))
            state[row] = after.to(state.dtype)
            out[b, t] = y.to(x.dtype)
            if snapshots is not None:
                snapshots[b, t + 1 :] = state[row]
    return out if stepped else out.squeeze(1)


_NAMES = ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias")


def _check(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    rows: Tensor | None,
    num_steps: Tensor | None = None,
    snapshots: Tensor | None = None,
) -> bool:
    """Whether x holds several tokens."""
    tensors = (
        *zip(_NAMES, (state, x, dt, A, B, C, D, z, dt_bias), strict=True),
        ("state_batch_indices", rows),
        ("num_steps", num_steps),
        ("snapshots", snapshots),
    )
    for name, tensor in tensors:
        optional = name in ("D", "z", "dt_bias", "state_batch_indices", "num_steps", "snapshots")
        if not isinstance(tensor, Tensor) and not (optional and tensor is None):
            wanted = "a tensor or None" if optional else "a tensor"
            raise TypeError(f"{OP}: expected {name} to be {wanted} but got {type(tensor).__name__}")
    same_device(OP, **dict(tensors))
    if state.dim() not in (3, 4):
        raise ValueError(
            f"{OP}: expected state of shape (rows, dim, d_state) or (rows, heads, dim, d_state) but got "
            f"{tuple(state.shape)}"
        )
    if A.is_complex():
        raise TypeError(f"{OP}: expected a real A but got {str(A.dtype).removeprefix('torch.')}")
    heads = tuple(state.shape[1:-2])
    dim, d_state = state.shape[-2:]
    if not 1 <= d_state <= MAX_STATES:
        raise ValueError(f"{OP}: expected state with d_state 1 to {MAX_STATES} but got {d_state}")
    stepped = x.dim() == state.dim()
    if x.dim() != state.dim() - 1 + stepped or x.shape[1 + stepped :] != (*heads, dim):
        raise ValueError(
            f"{OP}: expected x of shape ({_list('batch', *heads, dim)}) or with several tokens "
            f"({_list('batch', 'steps', *heads, dim)}) but got {tuple(x.shape)}"
        )
    if not stepped and (num_steps is not None or snapshots is not None):
        raise ValueError(
            f"{OP}: expected x of shape ({_list('batch', 'steps', *heads, dim)}) with num_steps or snapshots but got "
            f"{tuple(x.shape)}; x.unsqueeze(1) makes one token of it"
        )
    if stepped and state.is_cuda:
        raise NotImplementedError(
            f"{OP}: expected one token per row on a GPU but got x of shape {tuple(x.shape)}; call it once per token"
        )
    batch = x.shape[0]
    tokens = tuple(x.shape[: 1 + stepped])
    groups = tuple(B.shape[1 + stepped : -1]) if heads and B.dim() == 3 + stepped else (1,) * len(heads)
    shapes = {
        "dt": (dt, (*tokens, *heads, dim)),
        "A": (A, (*heads, dim, d_state)),
        "B": (B, (*tokens, *groups, d_state)),
        "C": (C, (*tokens, *groups, d_state)),
        "D": (D, (*heads, dim)),
        "z": (z, (*tokens, *heads, dim)),
        "dt_bias": (dt_bias, (*heads, dim)),
        "state_batch_indices": (rows, (batch,)),
        "num_steps": (num_steps, (batch,)),
        "snapshots": (snapshots, (batch, tokens[-1] + 1, *heads, dim, d_state)),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{OP}: expected {name} of shape ({_list(*shape)}) but got {tuple(tensor.shape)}"
            )
    if groups and (groups[0] == 0 or heads[0] % groups[0] != 0):
        raise ValueError(f"{OP}: expected B with groups that divide the {heads[0]} heads but got {groups[0]}")
    if rows is None and state.shape[0] != batch:
        raise ValueError(
            f"{OP}: expected state with one row per row of x ({batch}) but got {state.shape[0]}; "
            "give state_batch_indices to pick rows"
        )
    for name, counts in (("state_batch_indices", rows), ("num_steps", num_steps)):
        if counts is not None and counts.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"{OP}: expected {name} int32 or int64 but got {str(counts.dtype).removeprefix('torch.')}"
            )
    if snapshots is not None and snapshots.dtype != state.dtype:
        raise ValueError(
            f"{OP}: expected snapshots of state's dtype {str(state.dtype).removeprefix('torch.')} but got "
            f"{str(snapshots.dtype).removeprefix('torch.')}"
        )
    return stepped


def _list(*sizes: int | str) -> str:
    return ", ".join(map(str, sizes)) + ("," if len(sizes) == 1 else "")


@torch.library.register_fake("arcore::selective_state_update")
def _fake(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    state_batch_indices: Tensor | None,
    pad_slot_id: int,
) -> Tensor:
    _check(state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices)
    return torch.empty_like(x)


@torch.library.register_fake("arcore::selective_state_update_steps")
def _fake_steps(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    state_batch_indices: Tensor | None,
    pad_slot_id: int,
    num_steps: Tensor | None,
    snapshots: Tensor | None,
) -> Tensor:
    _check(state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices, num_steps, snapshots)
    return torch.empty_like(x)


register_in_place("selective_state_update")
register_in_place("selective_state_update_steps")
