"""One step of the selective scan against a state in memory: public function, reference, fake rule.

The loops and the numerics are in csrc/selective_state_update/README.md.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from arcore import _extension as _extension

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
) -> Tensor:
    """One token of a selective scan per row; the state is changed in place.

    With ``dt = softplus(dt + dt_bias)`` (softplus optional), per channel and state:
    ``state = exp(dt A) state + dt B x``, ``y = sum_n C state + D x``, ``out = y silu(z)``. Equals one step of
    `selective_scan`; with heads, one of Mamba-2. fp32 arithmetic whatever the storage; no gradient.

    Args:
        state: ``[rows, dim, d_state]`` or with heads ``[rows, heads, dim, d_state]``, float32, bfloat16 or float16, any
            strides; d_state at most 256.
        x: ``[batch, dim]`` or ``[batch, heads, dim]``, as dt and z: float32, bfloat16 or float16, any strides.
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
        pad_slot_id: an index of this value marks padding: its output is 0 and no state is touched.

    Returns:
        The outputs, x's shape and dtype.

    Raises:
        TypeError: an argument is not a tensor, or has an unsupported dtype.
        ValueError: shapes or devices do not fit, or d_state is above 256.
        RuntimeError: an index lies outside `state`.

    Reference: Mamba (arXiv:2312.00752, section 3.3.2), Mamba-2 (arXiv:2405.21060, section 8); names and order are those
    of mamba_ssm's function.
    """
    # The op checks everything itself; here are only found the words, and no time is lost when nothing is wrong.
    try:
        out: Tensor = torch.ops.arcore.selective_state_update.default(
            state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices, pad_slot_id
        )
        return out
    except (RuntimeError, TypeError) as error:
        refused = error
    _check(state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices)
    for name, tensor in zip(_NAMES, (state, x, dt, A, B, C, D, z, dt_bias), strict=True):
        if tensor is not None and tensor.dtype not in SUPPORTED_DTYPES:
            raise TypeError(
                f"{OP}: expected {name} of dtype float32, bfloat16 or float16 but got "
                f"{str(tensor.dtype).removeprefix('torch.')}; for float64 call reference_selective_state_update"
            )
    raise refused


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
) -> Tensor:
    """`selective_state_update` in plain PyTorch, any float dtype and device.

    Works in float64 if the state is float64, else in float32. Arguments, returns and errors are those of
    `selective_state_update`.
    """
    _check(state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices)
    work = torch.float64 if state.dtype == torch.float64 else torch.float32
    headed = state.dim() == 4
    out = torch.zeros_like(x)
    step = dt.to(work) if dt_bias is None else dt.to(work) + dt_bias.to(work)
    if dt_softplus:
        step = F.softplus(step)
    if headed:
        B, C = (t.repeat_interleave(state.shape[1] // t.shape[1], dim=1) for t in (B, C))
    for b in range(x.shape[0]):
        row = b if state_batch_indices is None else int(state_batch_indices[b])
        if state_batch_indices is not None and row == pad_slot_id:
            continue
        if not 0 <= row < state.shape[0]:
            raise RuntimeError(
                f"{OP}: expected state_batch_indices from 0 to {state.shape[0] - 1}, or pad_slot_id={pad_slot_id}, "
                f"but got {row}"
            )
        decay = torch.exp(step[b][..., None] * A.to(work))
        drive = (step[b] * x[b].to(work))[..., None] * B[b].to(work).unsqueeze(-2)
        after = decay * state[row].to(work) + drive
        y = (after * C[b].to(work).unsqueeze(-2)).sum(-1)
        if D is not None:
            y = y + D.to(work) * x[b].to(work)
        if z is not None:
            y = y * F.silu(z[b].to(work))
        state[row] = after.to(state.dtype)
        out[b] = y.to(x.dtype)
    return out


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
) -> None:
    tensors = (
        *zip(_NAMES, (state, x, dt, A, B, C, D, z, dt_bias), strict=True),
        ("state_batch_indices", rows),
    )
    for name, tensor in tensors:
        optional = name in ("D", "z", "dt_bias", "state_batch_indices")
        if not isinstance(tensor, Tensor) and not (optional and tensor is None):
            wanted = "a tensor or None" if optional else "a tensor"
            raise TypeError(f"{OP}: expected {name} to be {wanted} but got {type(tensor).__name__}")
        if tensor is not None and tensor.device != state.device:
            raise ValueError(
                f"{OP}: expected {name} on state's device {state.device} but got {tensor.device}"
            )
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
    if x.dim() != state.dim() - 1 or x.shape[1:] != (*heads, dim):
        raise ValueError(
            f"{OP}: expected x of shape ({_list('batch', *heads, dim)}) but got {tuple(x.shape)}"
        )
    batch = x.shape[0]
    groups = tuple(B.shape[1:-1]) if heads and B.dim() == 3 else (1,) * len(heads)
    shapes = {
        "dt": (dt, (batch, *heads, dim)),
        "A": (A, (*heads, dim, d_state)),
        "B": (B, (batch, *groups, d_state)),
        "C": (C, (batch, *groups, d_state)),
        "D": (D, (*heads, dim)),
        "z": (z, (batch, *heads, dim)),
        "dt_bias": (dt_bias, (*heads, dim)),
        "state_batch_indices": (rows, (batch,)),
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
    if rows is not None and rows.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{OP}: expected state_batch_indices int32 or int64 but got {str(rows.dtype).removeprefix('torch.')}"
        )


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
