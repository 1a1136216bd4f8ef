"""Mamba-3's scan and its single step: public functions, references, and the ops' fake and autograd rules.

The loops and the numerics are in csrc/mamba3_scan/README.md; the same by other ops in _mamba3_by_ssd.py.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from arcore import _extension as _extension
from arcore.ops._checks import checked_call, same_device
from arcore.ops._mamba3_by_ssd import Arguments, by_ssd, turned
from arcore.ops._registration import (
    call_in_place,
    forbid_further_derivatives,
    mark_written,
    refuse_derivatives,
    register_derivatives,
    register_in_place,
    register_vmap,
)

OP = "arcore.mamba3_scan"
UPDATE = "arcore.mamba3_update"
SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_STATES = 256
MAX_RANK = 16
_FLOATS = ("x", "dt", "log_decay", "weight", "B", "C", "turn", "B_bias", "C_bias", "D", "z")
_OPTIONAL = ("B_bias", "C_bias", "D", "z")


class Mamba3State(NamedTuple):
    """What a sequence leaves to its continuation: B rows (or packed sequences), H heads, P channels, R ranks.

    Attributes:
        state: ``[B, H, P, N]``, without what the last token gives to the next step.
        angle: ``[B, H, S]``, the sum of the turns, from 0 to 2 pi.
        B: ``[B, H, R, N]``, the last token's, with its bias and turned.
        x: ``[B, H, R, P]``, the last token's.
    """

    state: Tensor
    angle: Tensor
    B: Tensor
    x: Tensor


@overload
def mamba3_scan(
    x: Tensor,
    dt: Tensor,
    log_decay: Tensor,
    weight: Tensor,
    B: Tensor,
    C: Tensor,
    turn: Tensor,
    B_bias: Tensor | None = None,
    C_bias: Tensor | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    return_last_state: Literal[False] = False,
    *,
    initial_state: Mamba3State | None = None,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
    halves: bool = False,
    reverse: bool = False,
) -> Tensor: ...
@overload
def mamba3_scan(
    x: Tensor,
    dt: Tensor,
    log_decay: Tensor,
    weight: Tensor,
    B: Tensor,
    C: Tensor,
    turn: Tensor,
    B_bias: Tensor | None = None,
    C_bias: Tensor | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    return_last_state: Literal[True],
    initial_state: Mamba3State | None = None,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
    halves: bool = False,
    reverse: bool = False,
) -> tuple[Tensor, Mamba3State]: ...


def mamba3_scan(
    x: Tensor,
    dt: Tensor,
    log_decay: Tensor,
    weight: Tensor,
    B: Tensor,
    C: Tensor,
    turn: Tensor,
    B_bias: Tensor | None = None,
    C_bias: Tensor | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    return_last_state: bool = False,
    *,
    initial_state: Mamba3State | None = None,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
    halves: bool = False,
    reverse: bool = False,
) -> Tensor | tuple[Tensor, Mamba3State]:
    """Mamba-3's scan: trapezoidal steps, pairs of states that turn, R inputs and outputs per head with one state.

    Per head, with a = exp(log_decay), w = weight, and B and C (plus biases) turned by the sum of the turns so far:
    ``state_t = a_t state_(t-1) + (1 - w_t) dt_t a_t sum_r x_(t-1)r B_(t-1)r^T + w_t dt_t sum_r x_tr B_tr^T``,
    ``y_tr = state_t C_tr + D x_tr``, ``out = y silu(z)``. fp32 arithmetic and state whatever the storage; angles are
    summed in float64. Differentiable in all float arguments and states in reverse mode. Deterministic; results and
    gradients do not depend on the number of threads or on batch mates. Gradients that are to be differentiated again
    (`create_graph=True`, `torch.func.grad`), and tensors on a GPU, go through `ssd`, several times slower.

    Args:
        x: ``[B, L, H, R, P]``, H heads with R inputs of P channels, R at most 16; as all inputs float32, bfloat16 or
            float16, any strides.
        dt: ``[B, L, H]``, step sizes, positive.
        log_decay: ``[B, L, H]``, usually dt times a negative A.
        weight: ``[B, L, H]``, in (0, 1): the share of the step's end; 1 is Mamba-2's rule.
        B: ``[B, L, R, G, N]``, where G divides H: heads of a group share it. N even and at most 256.
        C: B's shape.
        turn: ``[B, L, H, S]``, S at most N / 2: the angle by which each pair of states turns; pairs beyond S stay.
        B_bias: ``[H, R, N]``.
        C_bias: ``[H, R, N]``.
        D: ``[H]``.
        z: gate, x's shape.
        return_last_state: also return the state after the last step.
        initial_state: that of a call before, with `cu_seqlens` one row per sequence; zero when None. With `seq_idx` it
            belongs to the first sequence of the row.
        cu_seqlens: boundaries of sequences packed into one row, int32 or int64 ``[S + 1]``; the batch is then 1.
        seq_idx: int32 ``[B, L]``, sequence of each step; a change starts from zero. Negative: padding, the step is
            skipped and its output is 0.
        halves: states n and n + N / 2 are a pair, not 2 n and 2 n + 1.
        reverse: scan from the last step to the first; equals flipping inputs and output in time.

    Returns:
        ``[B, L, H, R, P]`` in x's dtype; with `return_last_state` also a `Mamba3State`, state and angle in float32.

    Raises:
        TypeError: an argument is not a tensor, or has an unsupported dtype.
        ValueError: shapes or devices do not fit.
        NotImplementedError: the tensors are on another device than a CPU or a CUDA GPU, or have forward-mode tangents.

    Reference: Mamba-3 (state-spaces/mamba, 2026), whose code calls C, B and x queries, keys and values.
    """
    _check(x, dt, log_decay, weight, B, C, turn, B_bias, C_bias, D, z, initial_state, cu_seqlens, seq_idx)
    given = dict(zip(_FLOATS, (x, dt, log_decay, weight, B, C, turn, B_bias, C_bias, D, z), strict=True))
    for name, tensor in (given | _parts(initial_state)).items():
        if tensor is not None and tensor.dtype not in SUPPORTED_DTYPES:
            raise TypeError(
                f"{OP}: expected {name} of dtype float32, bfloat16 or float16 but got {_name(tensor.dtype)}; "
                "for float64 (gradcheck) call reference_mamba3_scan"
            )
    if x.device.type not in ("cpu", "meta", "cuda"):
        raise NotImplementedError(
            f"{OP}: expected tensors on a CPU or a CUDA GPU but got {x.device}. Move its arguments to the CPU, or call "
            "reference_mamba3_scan, which runs on any device one step at a time"
        )
    step, share = dt.float(), weight.float()
    if seq_idx is not None:  # padding may hold anything
        step, share = (torch.where((seq_idx >= 0)[..., None], t, 0.0) for t in (step, share))
    own = share * step
    later = step - own
    kept = own + _of_the_next(later, cu_seqlens, seq_idx, reverse)
    before, angle = None, None
    if initial_state is not None:
        first = _at_the_ends(later, cu_seqlens, seq_idx, reverse)
        added = torch.einsum("bhrn,bhrp->bhpn", initial_state.B.float(), initial_state.x.float())
        before = initial_state.state.float() + first[..., None, None] * added
        angle = initial_state.angle.float()
    v = Arguments(x, log_decay.float(), kept, own, B, C, turn, B_bias, C_bias, D, z, before, angle)
    if x.device.type == "cuda":
        out, state, angle = by_ssd(v, cu_seqlens, seq_idx, halves, reverse)
    else:
        out, state, angle = checked_call(
            "mamba3_scan", torch.ops.arcore.mamba3_scan, *v, cu_seqlens, seq_idx, halves, reverse
        )
    if not return_last_state:
        return out
    rows_B = B if B_bias is None else B.float()
    last_B = _at_the_ends(rows_B, cu_seqlens, seq_idx, not reverse)  # [rows, R, G, N]
    last_B = last_B.repeat_interleave(x.shape[2] // B.shape[3], dim=2).transpose(1, 2).float()
    last_x = _at_the_ends(x, cu_seqlens, seq_idx, not reverse)
    last_B = turned(last_B if B_bias is None else last_B + B_bias.float(), angle, halves)
    some = _has_steps(x, cu_seqlens, seq_idx)[:, None, None, None]
    old = (torch.zeros_like(last_B), torch.zeros_like(last_x)) if initial_state is None else initial_state[2:]
    return out, Mamba3State(
        state, angle, torch.where(some, last_B, old[0].float()), torch.where(some, last_x, old[1].to(x.dtype))
    )


def _of_the_next(values: Tensor, cu_seqlens: Tensor | None, seq_idx: Tensor | None, reverse: bool) -> Tensor:
    """`values` ``[B, L, H]`` of the step that follows in the same sequence, padding passed over; 0 where none does."""
    if reverse:
        ids = None if seq_idx is None else seq_idx.flip(1)
        bounds = None if cu_seqlens is None else values.shape[1] - cu_seqlens.flip(0)
        return _of_the_next(values.flip(1), bounds, ids, False).flip(1)
    length = values.shape[1]
    places = torch.arange(length, device=values.device)
    if seq_idx is not None:
        nearest = torch.where(seq_idx >= 0, places, length).flip(1).cummin(1).values.flip(1)
        after = F.pad(nearest[:, 1:], (0, min(length, 1)), value=length)
        follows = after < length
        after = after.clamp(max=max(length - 1, 0))
        follows = follows & (seq_idx.gather(1, after) == seq_idx)
        return torch.where(follows[..., None], values.gather(1, after[..., None].expand_as(values)), 0.0)
    shifted = F.pad(values[:, 1:], (0, 0, 0, min(length, 1)))
    if cu_seqlens is None:
        return shifted
    ends = torch.searchsorted(cu_seqlens[1:].contiguous(), places.to(cu_seqlens.dtype), right=True)
    same = F.pad(ends[1:] == ends[:-1], (0, min(length, 1)))
    return torch.where(same[None, :, None], shifted, 0.0)


def _at_the_ends(values: Tensor, cu_seqlens: Tensor | None, seq_idx: Tensor | None, last: bool) -> Tensor:
    """`values` ``[B, L, ...]`` at the first (or last) step of every row or packed sequence, 0 where there is none."""
    batch, length = values.shape[:2]
    rest = values.shape[2:]
    if cu_seqlens is not None:
        at = (cu_seqlens[1:] - 1 if last else cu_seqlens[:-1]).long().clamp(0, max(length - 1, 0))
        found = values[0].index_select(0, at) if length else values.new_zeros(len(cu_seqlens) - 1, *rest)
        some = cu_seqlens[1:] > cu_seqlens[:-1]
    elif length == 0:
        return values.new_zeros(batch, *rest)
    elif seq_idx is None:
        return values[:, -1 if last else 0]
    else:
        real = (seq_idx >= 0).int()
        at = length - 1 - real.flip(1).argmax(1) if last else real.argmax(1)
        found = values[torch.arange(batch, device=values.device), at]
        some = real.any(1)
    return torch.where(some.view(-1, *[1] * len(rest)), found, torch.zeros_like(found))


def _has_steps(x: Tensor, cu_seqlens: Tensor | None, seq_idx: Tensor | None) -> Tensor:
    """Bool ``[rows]``: the row or sequence has a step."""
    if cu_seqlens is not None:
        return cu_seqlens[1:] > cu_seqlens[:-1]
    if seq_idx is not None and x.shape[1]:
        return (seq_idx >= 0).any(1)
    return torch.full((x.shape[0],), x.shape[1] > 0, device=x.device)


def reference_mamba3_scan(
    x: Tensor,
    dt: Tensor,
    log_decay: Tensor,
    weight: Tensor,
    B: Tensor,
    C: Tensor,
    turn: Tensor,
    B_bias: Tensor | None = None,
    C_bias: Tensor | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    return_last_state: bool = False,
    *,
    initial_state: Mamba3State | None = None,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
    halves: bool = False,
    reverse: bool = False,
) -> Tensor | tuple[Tensor, Mamba3State]:
    """`mamba3_scan` in plain PyTorch, one step of the recurrence at a time, any real float dtype and device.

    Works in float64 if any input is float64, else in float32. Arguments, returns and errors are those of `mamba3_scan`.
    """
    _check(x, dt, log_decay, weight, B, C, turn, B_bias, C_bias, D, z, initial_state, cu_seqlens, seq_idx)
    batch, length, heads, rank, dim = x.shape
    groups, states, angles = B.shape[3], B.shape[4], turn.shape[3]
    given = [x, dt, log_decay, weight, B, C, turn, B_bias, C_bias, D, z, *(initial_state or ())]
    work = torch.float64 if any(t is not None and t.dtype == torch.float64 for t in given) else torch.float32

    def of_heads(m: Tensor, bias: Tensor | None) -> Tensor:  # [B, L, H, R, N]
        m = m.to(work).repeat_interleave(heads // groups, dim=3).transpose(2, 3)
        return m if bias is None else m + bias.to(work)

    inputs, b, c = x.to(work), of_heads(B, B_bias), of_heads(C, C_bias)
    step, log, share, angle_steps = (t.to(work) for t in (dt, log_decay, weight, turn))
    rows = batch if cu_seqlens is None else len(cu_seqlens) - 1
    sizes = ((heads, dim, states), (heads, angles), (heads, rank, states), (heads, rank, dim))
    outs: dict[tuple[Any, int], Tensor] = {}
    lasts: dict[Any, tuple[Tensor, ...]] = {}
    for row, steps, state_row in _sequences(batch, length, cu_seqlens, seq_idx, reverse):
        of_all = (batch,) if isinstance(row, slice) else ()
        if state_row is None or initial_state is None:
            h, angle, b0, x0 = (x.new_zeros(*of_all, *size, dtype=work) for size in sizes)
        else:
            h, angle, b0, x0 = (t[state_row].to(work) for t in initial_state)
        for t in steps:
            angle = (angle + angle_steps[row, t]).remainder(2 * math.pi)
            b1, c1, x1 = turned(b[row, t], angle, halves), turned(c[row, t], angle, halves), inputs[row, t]
            a, w, s = log[row, t].exp(), share[row, t], step[row, t]
            before, now = (m.transpose(-1, -2) @ n for m, n in ((x0, b0), (x1, b1)))
            h = (
                a[..., None, None] * (h + ((1 - w) * s)[..., None, None] * before)
                + (w * s)[..., None, None] * now
            )
            y = c1 @ h.transpose(-1, -2)
            outs[row if of_all == () else None, t] = y if D is None else y + D.to(work)[:, None, None] * x1
            b0, x0 = b1, x1
        # With ids, a row's last sequence is the one that counts.
        lasts[row if seq_idx is not None else state_row if of_all == () else None] = (h, angle, b0, x0)
    if None in lasts:
        parts = lasts[None]
        whole = [outs[None, t] for t in range(length)]
        out = torch.stack(whole, 1) if whole else inputs
    else:
        parts = tuple(
            torch.stack([lasts[row][i] for row in range(rows)]) if rows else x.new_zeros(0, *size, dtype=work)
            for i, size in enumerate(sizes)
        )
        nothing = torch.zeros_like(inputs[0, 0]) if batch * length else inputs
        whole = [outs.get((row, t), nothing) for row in range(batch) for t in range(length)]
        out = torch.stack(whole) if whole else inputs.flatten(0, 1)
    out = out.view(x.shape)
    if z is not None:
        out = out * F.silu(z.to(work))
    if seq_idx is not None:  # a gate of padding may hold anything
        out = torch.where((seq_idx >= 0)[..., None, None, None], out, 0.0)
    if not return_last_state:
        return out.to(x.dtype)
    return out.to(x.dtype), Mamba3State(parts[0], parts[1], parts[2], parts[3].to(x.dtype))


def _sequences(
    batch: int, length: int, cu_seqlens: Tensor | None, seq_idx: Tensor | None, reverse: bool
) -> list[tuple[Any, list[int], Any]]:
    """Row, steps in the order of the scan, and row of the initial state (None: zero) of each sequence.

    Whole rows are one sequence, of all of them at once.
    """
    found: list[tuple[Any, list[int], Any]]
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        found = [(0, list(range(*bounds[i : i + 2])), i) for i in range(len(bounds) - 1)]
        found = [(row, steps[::-1], i) for row, steps, i in found[::-1]] if reverse else found
    elif seq_idx is None:
        whole = list(range(length))
        found = [(slice(None), whole[::-1] if reverse else whole, slice(None))]
    else:
        found = []
        for b, ids in enumerate(seq_idx.tolist()):
            runs: list[list[int]] = [[]]
            order = range(length - 1, -1, -1) if reverse else range(length)
            for t in order:
                if ids[t] >= 0:
                    if runs[-1] and ids[runs[-1][-1]] != ids[t]:
                        runs.append([])
                    runs[-1].append(t)
            found += [(b, run, b if i == 0 else None) for i, run in enumerate(runs)]
    return found


def mamba3_update(
    state: Mamba3State,
    x: Tensor,
    dt: Tensor,
    log_decay: Tensor,
    weight: Tensor,
    B: Tensor,
    C: Tensor,
    turn: Tensor,
    B_bias: Tensor | None = None,
    C_bias: Tensor | None = None,
    D: Tensor | None = None,
    *,
    halves: bool = False,
) -> Tensor:
    """One token of `mamba3_scan` per row; the tensors of the state are changed in place. Has no gradient.

    Args:
        state: as `mamba3_scan` returns it; float32, bfloat16 or float16, any strides but that states (the last
            dimension of ``state.state``) lie one after the other.
        x: ``[B, H, R, P]``.
        dt: ``[B, H]``; log_decay and weight likewise.
        log_decay: see `mamba3_scan`.
        weight: see `mamba3_scan`.
        B: ``[B, R, G, N]``.
        C: B's shape.
        turn: ``[B, H, S]``.
        B_bias: ``[H, R, N]``.
        C_bias: ``[H, R, N]``.
        D: ``[H]``.
        halves: see `mamba3_scan`.

    Returns:
        ``[B, H, R, P]``, x's dtype.

    Raises:
        TypeError: an argument is not a tensor, or has an unsupported dtype.
        ValueError: shapes or devices do not fit.
        RuntimeError: a gradient would be expected.
        NotImplementedError: the tensors are not on a CPU.
    """
    named = dict(zip(_FLOATS, (x, dt, log_decay, weight, B, C, turn, B_bias, C_bias, D, None), strict=True))
    _check_kinds(UPDATE, named, state, needed=True)
    _check_step(x, dt, log_decay, weight, B, C, turn, B_bias, C_bias, D, state)
    for name, tensor in (named | _parts(state, "state")).items():
        if tensor is not None and tensor.dtype not in SUPPORTED_DTYPES:
            raise TypeError(
                f"{UPDATE}: expected {name} of dtype float32, bfloat16 or float16 but got {_name(tensor.dtype)}; "
                "for float64 call reference_mamba3_scan with one step"
            )
    if x.device.type not in ("cpu", "meta"):
        raise NotImplementedError(
            f"{UPDATE}: expected tensors on a CPU but got {x.device}. Call mamba3_scan with one step, or move the "
            "arguments to the CPU"
        )
    refuse_derivatives("mamba3_update", *state, *named.values())
    step = dt.float()
    now = weight.float() * step
    arguments = (*state, x, log_decay, step - now, now, B, C, turn, B_bias, C_bias, D, halves)
    out: Tensor = checked_call(
        "mamba3_update", call_in_place, torch.ops.arcore.mamba3_update.default, *arguments
    )
    mark_written(*state)
    return out


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _parts(state: Mamba3State | None, called: str = "initial_state") -> dict[str, Tensor]:
    if state is None:
        return {}
    return {f"{called}.{name}": t for name, t in zip(Mamba3State._fields, state, strict=True)}


def _check_kinds(
    op: str,
    named: dict[str, Tensor | None],
    state: Mamba3State | None,
    needed: bool = False,
    **others: Tensor | None,
) -> None:
    for name, tensor in {**named, **others}.items():
        optional = name in _OPTIONAL or name in others
        if not isinstance(tensor, Tensor) and not (optional and tensor is None):
            wanted = "a tensor or None" if optional else "a tensor"
            raise TypeError(f"{op}: expected {name} to be {wanted} but got {type(tensor).__name__}")
    if (needed or state is not None) and (
        not isinstance(state, tuple) or len(state) != 4 or not all(isinstance(t, Tensor) for t in state)
    ):
        raise TypeError(
            f"{op}: expected a Mamba3State of four tensors as state but got {type(state).__name__}"
        )
    same_device(op, **named, **_parts(state, "state" if needed else "initial_state"), **others)


def _check_shapes(
    op: str, B: Tensor, turn: Tensor, lead: tuple[int, ...], heads: int, rank: int
) -> tuple[int, int, int]:
    words = ", ".join(f"{n}={s}" for n, s in zip(("batch", "length"), lead, strict=False))
    dims = len(lead)
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(f"{op}: expected x with 1 to {MAX_RANK} inputs per head but got {rank}")
    if (
        B.dim() != dims + 3
        or B.shape[: dims + 1] != (*lead, rank)
        or B.shape[-1] % 2
        or not 2 <= B.shape[-1] <= MAX_STATES
    ):
        raise ValueError(
            f"{op}: expected B of shape ({words}, rank={rank}, groups, d_state) with an even d_state of 2 to "
            f"{MAX_STATES} but got {tuple(B.shape)}"
        )
    groups, states = B.shape[-2:]
    if groups == 0 or heads % groups:
        raise ValueError(f"{op}: expected B with groups that divide the {heads} heads but got {groups}")
    if turn.dim() != dims + 2 or turn.shape[:-1] != (*lead, heads) or turn.shape[-1] > states // 2:
        raise ValueError(
            f"{op}: expected turn of shape ({words}, heads={heads}, angles) with at most {states // 2} angles but got "
            f"{tuple(turn.shape)}"
        )
    return groups, states, turn.shape[-1]


def _check(
    x: Tensor,
    dt: Tensor,
    log_decay: Tensor,
    weight: Tensor,
    B: Tensor,
    C: Tensor,
    turn: Tensor,
    B_bias: Tensor | None,
    C_bias: Tensor | None,
    D: Tensor | None,
    z: Tensor | None,
    initial_state: Mamba3State | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
) -> None:
    named = dict(zip(_FLOATS, (x, dt, log_decay, weight, B, C, turn, B_bias, C_bias, D, z), strict=True))
    _check_kinds(OP, named, initial_state, cu_seqlens=cu_seqlens, seq_idx=seq_idx)
    if x.dim() != 5:
        raise ValueError(
            f"{OP}: expected x of shape (batch, length, heads, rank, dim) but got {tuple(x.shape)}"
        )
    batch, length, heads, rank, dim = x.shape
    _, states, angles = _check_shapes(OP, B, turn, (batch, length), heads, rank)
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
    wanted: dict[str, Any] = {name: (batch, length, heads) for name in ("dt", "log_decay", "weight")}
    wanted |= {"C": B.shape, "B_bias": (heads, rank, states), "C_bias": (heads, rank, states), "D": (heads,)}
    wanted |= {"z": x.shape}
    named |= _parts(initial_state)
    wanted |= _state_shapes(rows, heads, rank, dim, states, angles)
    _check_wanted(OP, named, wanted)


def _check_step(
    x: Tensor,
    dt: Tensor,
    log_decay: Tensor,
    weight: Tensor,
    B: Tensor,
    C: Tensor,
    turn: Tensor,
    B_bias: Tensor | None,
    C_bias: Tensor | None,
    D: Tensor | None,
    state: Mamba3State,
) -> None:
    if x.dim() != 4:
        raise ValueError(f"{UPDATE}: expected x of shape (batch, heads, rank, dim) but got {tuple(x.shape)}")
    batch, heads, rank, dim = x.shape
    _, states, angles = _check_shapes(UPDATE, B, turn, (batch,), heads, rank)
    named: dict[str, Tensor | None] = {"dt": dt, "log_decay": log_decay, "weight": weight, "C": C}
    named |= {"B_bias": B_bias, "C_bias": C_bias, "D": D, **_parts(state, "state")}
    wanted: dict[str, Any] = {name: (batch, heads) for name in ("dt", "log_decay", "weight")}
    wanted |= {"C": B.shape, "B_bias": (heads, rank, states), "C_bias": (heads, rank, states), "D": (heads,)}
    _check_wanted(UPDATE, named, wanted | _state_shapes(batch, heads, rank, dim, states, angles, "state"))


def _state_shapes(
    rows: int, heads: int, rank: int, dim: int, states: int, angles: int, called: str = "initial_state"
) -> dict[str, Any]:
    return {
        f"{called}.state": (rows, heads, dim, states),
        f"{called}.angle": (rows, heads, angles),
        f"{called}.B": (rows, heads, rank, states),
        f"{called}.x": (rows, heads, rank, dim),
    }


def _check_wanted(op: str, named: dict[str, Tensor | None], wanted: dict[str, Any]) -> None:
    for name, shape in wanted.items():
        tensor = named.get(name)
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{op}: expected {name} of shape {tuple(shape)} but got {tuple(tensor.shape)}")


@torch.library.register_fake("arcore::mamba3_scan")
def _fake(
    x: Tensor,
    log_decay: Tensor,
    kept: Tensor,
    own: Tensor,
    B: Tensor,
    C: Tensor,
    turn: Tensor,
    B_bias: Tensor | None,
    C_bias: Tensor | None,
    D: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
    initial_angle: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    halves: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    v = Arguments(x, log_decay, kept, own, B, C, turn, B_bias, C_bias, D, z, initial_state, initial_angle)
    same_device(OP, **v._asdict(), cu_seqlens=cu_seqlens, seq_idx=seq_idx)
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = x.new_empty((rows, x.shape[2], x.shape[4], B.shape[4]), dtype=torch.float32)
    return torch.empty_like(x), state, x.new_empty((rows, x.shape[2], turn.shape[3]), dtype=torch.float32)


@torch.library.register_fake("arcore::mamba3_scan_backward")
def _fake_backward(
    grad_out: Tensor | None,
    grad_last_state: Tensor | None,
    grad_last_angle: Tensor | None,
    x: Tensor,
    log_decay: Tensor,
    kept: Tensor,
    own: Tensor,
    B: Tensor,
    C: Tensor,
    turn: Tensor,
    B_bias: Tensor | None,
    C_bias: Tensor | None,
    D: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
    initial_angle: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    halves: bool,
    reverse: bool,
) -> tuple[Tensor, ...]:
    v = Arguments(x, log_decay, kept, own, B, C, turn, B_bias, C_bias, D, z, initial_state, initial_angle)
    same_device(
        "arcore.mamba3_scan_backward",
        **v._asdict(),
        grad_out=grad_out,
        grad_last_state=grad_last_state,
        grad_last_angle=grad_last_angle,
        cu_seqlens=cu_seqlens,
        seq_idx=seq_idx,
    )
    dense = ("B_bias", "C_bias", "D", "initial_state", "initial_angle")

    def like(name: str, t: Tensor | None) -> Tensor:
        if t is None:
            return x.new_empty((0,), dtype=torch.float32)
        return t.new_empty(t.shape) if name in dense else torch.empty_like(t)

    return tuple(like(name, t) for name, t in v._asdict().items())


@torch.library.register_fake("arcore::mamba3_update")
def _fake_update(
    state: Tensor,
    angle: Tensor,
    last_B: Tensor,
    last_x: Tensor,
    x: Tensor,
    log_decay: Tensor,
    before: Tensor,
    now: Tensor,
    B: Tensor,
    C: Tensor,
    turn: Tensor,
    B_bias: Tensor | None,
    C_bias: Tensor | None,
    D: Tensor | None,
    halves: bool,
) -> Tensor:
    return torch.empty_like(x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, halves, reverse = inputs
    ctx.save_for_backward(*tensors)
    ctx.settings = (halves, reverse)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    floats, sequences = tensors[:13], tensors[13:]
    none: tuple[Tensor | None, ...] = (None,) * 4
    if all(g is None for g in grads):
        return (None,) * 13 + none
    if torch.is_grad_enabled():  # to be differentiated again
        places = [i for i, t in enumerate(floats) if t is not None]

        def again(*given: Tensor) -> tuple[Tensor, ...]:
            values = list(floats)
            for i, t in zip(places, given, strict=True):
                values[i] = t
            return by_ssd(Arguments(*values), *sequences, *ctx.settings)

        # Inside a region of autocast the products would run in 16 bits.
        with torch.autocast(tensors[0].device.type, enabled=False):
            pulled: Any = torch.func.vjp(again, *(floats[i] for i in places))
            outputs, pull = pulled
            filled = tuple(
                torch.zeros_like(o) if g is None else g for g, o in zip(grads, outputs, strict=True)
            )
            found = dict(zip(places, pull(filled), strict=True))
        return *(found.get(i) for i in range(13)), *none
    results = torch.ops.arcore.mamba3_scan_backward(*grads, *tensors, *ctx.settings)
    return *(None if t is None else g for t, g in zip(floats, results, strict=True)), *none


register_derivatives("mamba3_scan", _backward, _setup_context)
forbid_further_derivatives("mamba3_scan", "backward")
register_vmap("mamba3_scan")
register_vmap("mamba3_scan_backward")
register_in_place("mamba3_update")
