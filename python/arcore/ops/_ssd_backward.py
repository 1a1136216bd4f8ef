"""Gradients of `arcore.ops.ssd` in plain PyTorch, for those that want a derivative of them; others take the kernel's.

By chunks: products of matrices, no loop over steps.

Per chunk and head, with c the sum of dt A from the chunk's start, u = dt x, H the state before the chunk, H' after it:

    Y = M u + diag(f) C H^T         M = (C B^T) * exp(c_t - c_s) for s <= t        f = exp(c)
    H' = through H + sum_s e_s u_s B_s^T        e_s = exp(c_last - c_s)            through = exp(c_last)

Where a row holds several sequences, M, f, e and through are 0 between different ones.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, sigmoid, silu, softplus

CHUNK = 64


class Inputs(NamedTuple):
    """The float arguments of the op, in its order; D is ``[heads, dim]``."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    initial_state: Tensor | None


ALONG_TIME = ("x", "dt", "B", "C", "z")
Gradients = dict[str, Tensor]


def segments(ids: Tensor) -> Tensor:
    """Number of the sequence of every step, from 0; padding belongs to the sequence before it. ``[B, L]``."""
    at = torch.arange(ids.shape[1], device=ids.device)
    newest = torch.where(ids >= 0, at, -1).cummax(dim=1).values  # last real step up to here
    before = pad(newest[:, :-1], (1, 0), value=-1)
    previous = ids.gather(1, before.clamp(min=0))
    return ((ids >= 0) & (before >= 0) & (ids != previous)).cumsum(dim=1)


def by_chunks(t: Tensor) -> Tensor:
    """``[B, L, ...]`` as ``[B, chunks, CHUNK, ...]``, filled up at the end."""
    missing = -t.shape[1] % CHUNK
    filled: Tensor = pad(t, (0, 0) * (t.dim() - 2) + (0, missing))
    return filled.reshape(t.shape[0], filled.shape[1] // CHUNK, CHUNK, *t.shape[2:])


def backward(
    v: Inputs,
    grad_out: Tensor | None,
    grad_last: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
    dt_low: float,
    dt_high: float,
    reverse: bool,
) -> Gradients:
    """Gradients of the inputs that are given, by name, in float32."""
    grad_out = torch.zeros_like(v.x) if grad_out is None else grad_out
    settings = (dt_softplus, dt_low, dt_high)
    v = Inputs(*(None if t is None else t.float() for t in v))  # type: ignore[arg-type]
    grad_out = grad_out.float()
    if reverse:
        v = v._replace(**{n: t.flip(1) for n in ALONG_TIME if (t := getattr(v, n)) is not None})
        grad_out = grad_out.flip(1)
        seq_idx = None if seq_idx is None else seq_idx.flip(1)
    if cu_seqlens is None:
        grads = _rows(v, grad_out, grad_last, seq_idx, *settings)
    else:
        bounds = cu_seqlens.tolist()
        if reverse:
            bounds = [bounds[-1] - b for b in bounds]
        grads = _packed(v, grad_out, grad_last, bounds, *settings)
    if reverse:
        grads.update({n: grads[n].flip(1) for n in ALONG_TIME if n in grads})
    return grads


def _packed(
    v: Inputs, grad_out: Tensor, grad_last: Tensor | None, bounds: list[int], *settings: float
) -> Gradients:
    """One sequence after the other; sums for what they share."""
    totals: Gradients = {n: torch.zeros_like(t) for n, t in v._asdict().items() if t is not None}
    for i in range(len(bounds) - 1):
        begin, end = sorted((bounds[i], bounds[i + 1]))
        row = slice(i, i + 1)
        cut = {n: t[:, begin:end] for n in ALONG_TIME if (t := getattr(v, n)) is not None}
        first = None if v.initial_state is None else v.initial_state[row]
        part = v._replace(initial_state=first, **cut)
        last = None if grad_last is None else grad_last[row]
        for name, grad in _rows(part, grad_out[:, begin:end], last, None, *settings).items():
            if name in ALONG_TIME:
                totals[name][:, begin:end] = grad
            elif name == "initial_state":
                totals[name][row] = grad
            else:
                totals[name] += grad
    return totals


def _rows(
    v: Inputs,
    grad_out: Tensor,
    grad_last: Tensor | None,
    seq_idx: Tensor | None,
    dt_softplus: float,
    dt_low: float,
    dt_high: float,
) -> Gradients:
    batch, length, heads, dim = v.x.shape
    groups, states = v.B.shape[2:]
    per_group = heads // max(groups, 1)
    grads: Gradients = {}
    if length == 0:
        grads.update({n: torch.zeros_like(t) for n, t in v._asdict().items() if t is not None})
        if v.initial_state is not None and grad_last is not None:
            grads["initial_state"] = grad_last.float()
        return grads

    # Step sizes, and how they follow from dt.
    shifted = v.dt if v.dt_bias is None else v.dt + v.dt_bias
    step = softplus(shifted) if dt_softplus else shifted
    slope = ((step >= dt_low) & (step <= dt_high)).to(step.dtype)
    slope = slope * sigmoid(shifted) if dt_softplus else slope
    step = step.clamp(dt_low, dt_high)
    x, b, c, z = v.x, v.B, v.C, v.z
    if seq_idx is not None:  # padding neither reads nor writes, whatever it holds
        real = (seq_idx >= 0)[..., None]
        step, slope = torch.where(real, step, 0.0), torch.where(real, slope, 0.0)
        x, b, c, grad_out = (torch.where(real[..., None], t, 0.0) for t in (x, b, c, grad_out))
        z = None if z is None else torch.where(real[..., None], z, 0.0)

    # Decays within chunks. float64: differences of long sums.
    dt, xs = by_chunks(step), by_chunks(x)
    bs, cs = (by_chunks(t).repeat_interleave(per_group, dim=3) for t in (b, c))
    total = (dt.double() * v.A.double()).cumsum(dim=2)  # [B, K, Q, H]
    segment = segments(seq_idx) if seq_idx is not None else torch.zeros_like(step[..., 0], dtype=torch.int64)
    # Steps that fill up the last chunk go with the last sequence.
    filled = torch.cat([segment, segment[:, -1:].expand(-1, -length % CHUNK)], dim=1)
    seg = filled.unflatten(1, (-1, CHUNK))
    carried = torch.cat([seg[:, :1, 0], seg[:, :-1, -1]], dim=1)  # sequence of the state before each chunk
    causal = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=x.device).tril()
    seen = (causal & (seg[..., :, None] == seg[..., None, :]))[:, :, None]
    per_head = total.transpose(2, 3)  # [B, K, H, Q]
    decay = torch.where(seen, per_head[..., :, None] - per_head[..., None, :], -torch.inf).exp().float()
    from_start = torch.where((seg == carried[..., None])[..., None], total.exp(), 0.0).float()
    to_end = torch.where((seg == seg[..., -1:])[..., None], (total[:, :, -1:] - total).exp(), 0.0).float()
    through = torch.where(
        (seg[..., -1] == carried)[..., None], total[:, :, -1].exp(), 0.0
    ).float()  # [B, K, H]

    # The states before each chunk.
    u = dt[..., None] * xs
    local = torch.einsum("bkshp,bkshn->bkhpn", u * to_end[..., None], bs)
    state = x.new_zeros(batch, heads, dim, states) if v.initial_state is None else v.initial_state
    before = []
    for k in range(dt.shape[1]):
        before.append(state)
        state = through[:, k, :, None, None] * state + local[:, k]
    states_before = torch.stack(before, dim=1)  # [B, K, H, P, N]

    product = torch.einsum("bkthn,bkshn->bkhts", cs, bs)
    m = product * decay
    grad_y = grad_out
    if z is not None:
        y = torch.einsum("bkhts,bkshp->bkthp", m, u)
        y = y + torch.einsum("bkthn,bkhpn->bkthp", cs, states_before) * from_start[..., None]
        y = y.flatten(1, 2)[:, :length]
        y = y if v.D is None else y + v.D * x
        s = sigmoid(z)
        grads["z"] = grad_out * y * s * (1 + z * (1 - s))
        grad_y = grad_out * silu(z)
    if v.D is not None:
        grads["D"] = (grad_y * x).sum((0, 1))
    g = by_chunks(grad_y)

    # Gradients of the states after each chunk, from the last to the first.
    into = torch.einsum("bkthp,bkthn->bkhpn", g * from_start[..., None], cs)
    grad_state = torch.zeros_like(state) if grad_last is None else grad_last.float()
    after = []
    for k in reversed(range(dt.shape[1])):
        after.append(grad_state)
        grad_state = through[:, k, :, None, None] * grad_state + into[:, k]
    grad_after = torch.stack(after[::-1], dim=1)
    if v.initial_state is not None:
        grads["initial_state"] = grad_state

    grad_m = torch.einsum("bkthp,bkshp->bkhts", g, u)
    grad_product = grad_m * decay
    from_m = grad_m * m
    grad_b_state = torch.einsum("bkhpn,bkshp->bkshn", grad_after, u) * to_end[..., None]
    grad_c_state = torch.einsum("bkthp,bkhpn->bkthn", g, states_before) * from_start[..., None]
    grad_b = torch.einsum("bkhts,bkthn->bkshn", grad_product, cs) + grad_b_state
    grad_c = torch.einsum("bkhts,bkshn->bkthn", grad_product, bs) + grad_c_state
    grad_u = torch.einsum("bkhts,bkthp->bkshp", m, g)
    grad_u = grad_u + torch.einsum("bkhpn,bkshn->bkshp", grad_after, bs) * to_end[..., None]

    # dt A of step j decays whatever goes from a step before j to j or later. Sums of such parts, never differences.
    read = (cs * grad_c_state).sum(-1)
    written = pad((bs * grad_b_state).sum(-1).cumsum(2)[:, :, :-1], (0, 0, 1, 0))  # by steps before j
    kept = through * (grad_after * states_before).sum((-1, -2))
    across = pad(from_m.cumsum(-1)[..., :-1], (1, 0)).tril().sum(-2).transpose(2, 3)
    grad_log = across + read.flip(2).cumsum(2).flip(2) + written + kept[:, :, None]

    grad_step = (grad_log * v.A + (grad_u * xs).sum(-1)).flatten(1, 2)[:, :length]
    grads["dt"] = grad_step * slope
    if v.dt_bias is not None:
        grads["dt_bias"] = grads["dt"].sum((0, 1))
    grads["A"] = (grad_log.double() * dt).sum((0, 1, 2)).float()
    grad_x = (grad_u * dt[..., None]).flatten(1, 2)[:, :length]
    if v.D is not None:
        grad_x = grad_x + grad_y * v.D
    grads["x"] = grad_x
    for name, grad in (("B", grad_b), ("C", grad_c)):
        grads[name] = grad.flatten(1, 2)[:, :length].unflatten(2, (groups, per_group)).sum(3)
    if seq_idx is not None:
        real = (seq_idx >= 0)[..., None]
        for name in ALONG_TIME:
            if name in grads:
                mask = real if grads[name].dim() == 3 else real[..., None]
                grads[name] = torch.where(mask, grads[name], 0.0)
    return grads
