"""`mamba3_scan` as a call of `ssd`: on GPUs, and where gradients are differentiated again."""

from __future__ import annotations

from math import pi
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from arcore.ops.ssd import ssd


class Arguments(NamedTuple):
    """The float arguments of ``torch.ops.arcore.mamba3_scan``.

    `own` and `kept` ``[B, L, H]`` weigh what a step adds to its own output and to later ones.
    """

    x: Tensor
    log_decay: Tensor
    kept: Tensor
    own: Tensor
    B: Tensor
    C: Tensor
    turn: Tensor
    B_bias: Tensor | None
    C_bias: Tensor | None
    D: Tensor | None
    z: Tensor | None
    initial_state: Tensor | None
    initial_angle: Tensor | None


def turned(m: Tensor, angle: Tensor, halves: bool) -> Tensor:
    """`m` ``[..., H, R, N]`` with pairs of states turned by `angle` ``[..., H, S]``; pairs beyond the first S stay."""
    pairs = m.shape[-1] // 2
    first, second = m.unflatten(-1, (2, pairs) if halves else (pairs, 2)).unbind(-2 if halves else -1)
    cos, sin = (
        F.pad(f(angle).unsqueeze(-2), (0, pairs - angle.shape[-1]), value=rest)
        for f, rest in ((torch.cos, 1.0), (torch.sin, 0.0))
    )
    pair = (first * cos - second * sin, first * sin + second * cos)
    return torch.stack(pair, dim=-2 if halves else -1).flatten(-2)


def by_ssd(
    v: Arguments, cu_seqlens: Tensor | None, seq_idx: Tensor | None, halves: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, last state and last angle; arguments as those of ``torch.ops.arcore.mamba3_scan``.

    Every output of a head reads every input: heads, outputs and inputs become heads of the scan. Its step sizes are the
    decays, so inputs are divided by them, and the gradient of a small decay is a difference of large numbers: it keeps
    fewer digits than the op's own.
    """
    x, log_decay, kept, own, b, c, turn = (t.float() for t in v[:7])
    if reverse:
        ids = None if seq_idx is None else seq_idx.flip(1)
        bounds = None if cu_seqlens is None else x.shape[1] - cu_seqlens.flip(0)
        along = {name: t.flip(1) for name, t in v._asdict().items() if name in _ALONG_TIME and t is not None}
        if bounds is not None:
            along |= {n: t.flip(0) for n, t in zip(_STATES, v[11:], strict=True) if t is not None}
        out, state, angle = by_ssd(v._replace(**along), bounds, ids, halves, False)
        out = out.flip(1)
        return (out, state, angle) if bounds is None else (out, state.flip(0), angle.flip(0))
    batch, length, heads, r, _ = x.shape
    z = v.z
    if seq_idx is not None:
        real = (seq_idx >= 0)[..., None]
        log_decay, kept, own = (torch.where(real, t, 0.0) for t in (log_decay, kept, own))
        turn = torch.where(real[..., None], turn, 0.0)
        x, b, c = (torch.where(real[..., None, None], t, 0.0) for t in (x, b, c))
        z = None if z is None else torch.where(real[..., None, None], z, 0.0)
    angle, last_angle = _angles(turn, v.initial_angle, cu_seqlens, seq_idx)
    b, c = (_of_heads(m, heads, bias) for m, bias in ((b, v.B_bias), (c, v.C_bias)))
    b, c = turned(b, angle, halves), turned(c, angle, halves)
    step = (-log_decay).clamp(min=1e-20)
    driven = x * (kept / step)[..., None, None]

    def spread(m: Tensor, dim: int) -> Tensor:
        m = m.unsqueeze(dim)
        shape = list(m.shape)
        shape[dim] = r
        return m.expand(shape).reshape(batch, length, heads * r * r, m.shape[-1])

    first = None
    if v.initial_state is not None:
        # The state before counts once for each output: with its first input.
        first = F.pad(v.initial_state.float().unsqueeze(2), (0, 0, 0, 0, 0, r - 1))
        first = first.unsqueeze(2).expand(-1, -1, r, -1, -1, -1).flatten(1, 3)
    y, state = ssd(
        spread(driven, 3),
        step.repeat_interleave(r * r, dim=-1),
        -torch.ones(heads * r * r, device=x.device),
        spread(b, 3),
        spread(c, 4),
        return_last_state=True,
        initial_state=first,
        cu_seqlens=cu_seqlens,
        seq_idx=seq_idx,
    )
    y = y.unflatten(2, (heads, r, r)).sum(4)
    within = torch.einsum("blhqn,blhrn->blhqr", c, b) * (own - kept)[..., None, None]
    y = y + within @ x
    if v.D is not None:
        y = y + v.D.float()[:, None, None] * x
    if z is not None:
        y = y * F.silu(z.float())
    if seq_idx is not None:
        y = torch.where((seq_idx >= 0)[..., None, None, None], y, 0.0)
    state = state.unflatten(1, (heads, r, r))[:, :, 0].sum(2)
    return y.to(v.x.dtype), state, last_angle


_ALONG_TIME = ("x", "log_decay", "kept", "own", "B", "C", "turn", "z")
_STATES = ("initial_state", "initial_angle")


def _of_heads(m: Tensor, heads: int, bias: Tensor | None) -> Tensor:
    """``[B, L, R, G, N]`` to ``[B, L, H, R, N]``."""
    m = m.repeat_interleave(heads // m.shape[3], dim=3).transpose(2, 3)
    return m if bias is None else m + bias.float()


def _angles(
    turn: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None, seq_idx: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The sums of the turns ``[B, L, H, S]`` within each sequence, and the last ones ``[rows, H, S]``, below 2 pi."""
    length = turn.shape[1]
    wide = turn.double()  # differences of long sums
    total = F.pad(wide.cumsum(1), (0, 0, 0, 0, 1, 0))  # before each step, and after the last
    start = torch.zeros_like(total[:, :1]) if initial is None else initial.double().unsqueeze(1)
    if cu_seqlens is not None:
        bounds = cu_seqlens.long()
        rows = start.new_zeros(len(bounds) - 1, *turn.shape[2:]) if initial is None else initial.double()
        offset = rows - total[0, bounds[:-1]]
        of = torch.searchsorted(bounds[1:].contiguous(), torch.arange(length, device=turn.device), right=True)
        angle = total[:, 1:] + (offset[of][None] if len(bounds) > 1 else 0.0)
        last = offset + total[0, bounds[1:]]
    elif seq_idx is not None and length:
        places = torch.arange(length, device=turn.device)
        real = seq_idx >= 0
        nearest = torch.where(real, places, -1).cummax(1).values  # the last step that counts, up to here
        before = F.pad(nearest[:, :-1], (1, 0), value=-1)
        changed = real & (before >= 0) & (seq_idx.gather(1, before.clamp(min=0)) != seq_idx)
        begin = torch.where(changed, places, 0).cummax(1).values  # of its sequence, 0 for the first
        offset = total.gather(1, begin[..., None, None].expand_as(turn))
        angle = total[:, 1:] - offset + torch.where((begin == 0)[..., None, None], start, 0.0)
        last = angle[:, -1]
    else:
        angle = total[:, 1:] + start
        last = (total[:, -1:] + start)[:, 0]
    return angle.remainder(2 * pi).float(), last.remainder(2 * pi).float()
