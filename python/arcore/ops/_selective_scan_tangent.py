"""``arcore::selective_scan_tangent`` in PyTorch, where there is no kernel for it (CUDA).

With dt the step sizes, w = dt u, a = exp(dt A) and dots for tangents, the state h_t = a_t h_(t-1) + w_t B_t moves by

    a' = a (dt' A + dt A')      h'_t = a_t h'_(t-1) + a'_t h_(t-1) + w'_t B_t + w_t B'_t

so both are runs of `linear_scan` over the same factors. A sequence that starts within a row has the factor 0 there, and
what enters it is added. Some channels at a time, so that the states of all steps need not be held.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

# Numbers of one tensor of states; a dozen are held at once.
STATES = 1 << 24


def tiled_tangent(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    u_t: Tensor | None,
    delta_t: Tensor | None,
    A_t: Tensor | None,
    B_t: Tensor | None,
    C_t: Tensor | None,
    D_t: Tensor | None,
    z_t: Tensor | None,
    delta_bias_t: Tensor | None,
    initial_state_t: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Tangents of the output ``[B, D, L]`` and of the last state; the arguments are those of the op."""
    batch, dim, length = u.shape
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    out = torch.empty_like(u)
    last = u.new_zeros((rows, dim, A.shape[1]), dtype=torch.float32)
    if u.numel() == 0:
        return out, last if initial_state_t is None else last + initial_state_t
    order = _Order(u, cu_seqlens, seq_idx, reverse)
    step = max(1, STATES // (batch * A.shape[1] * length))
    for begin in range(0, dim, step):
        some = slice(begin, min(begin + step, dim))
        channels = torch.arange(some.start, some.stop, device=u.device)

        def along(t: Tensor | None, some: slice = some) -> Tensor:
            return order.times(u.new_zeros(()) if t is None else t[:, some])

        def per_channel(t: Tensor | None, some: slice = some) -> Tensor:
            return u.new_zeros((), dtype=torch.float32) if t is None else t[some].float()

        def matrix(t: Tensor | None, channels: Tensor = channels) -> Tensor:
            """B or C as ``[1 or B, 1 or channels, N, 1 or L]``."""
            if t is None:
                return u.new_zeros((), dtype=torch.float32)
            if t.dim() == 2:
                return t[channels].float()[None, :, :, None]
            if t.dim() == 4:
                return order.times(t[:, channels // (dim // t.shape[1])])
            return order.times(t[:, None])

        def entering(t: Tensor | None, some: slice = some) -> Tensor:
            return (
                last.new_zeros((rows, some.stop - some.start, A.shape[1]))
                if t is None
                else t[:, some].float()
            )

        x, x_t = along(u), along(u_t)
        raw = along(delta) + per_channel(delta_bias)[..., None]
        raw_t = along(delta_t) + per_channel(delta_bias_t)[..., None]
        dt, dt_t = (softplus(raw), raw_t * torch.sigmoid(raw)) if delta_softplus else (raw, raw_t)
        dt, dt_t = order.real(dt), order.real(dt_t)
        w, w_t = (dt * x)[:, :, None], (dt_t * x + dt * x_t)[:, :, None]
        a = torch.exp(dt[:, :, None] * A[some, :, None].float())
        a_t = a * (dt_t[:, :, None] * A[some, :, None].float() + dt[:, :, None] * per_channel(A_t)[..., None])
        b, b_t, c, c_t = (matrix(t) for t in (B, B_t, C, C_t))
        first, first_t = entering(initial_state), entering(initial_state_t)
        h, before = order.scan(a, w * b, first)
        h_t, _ = order.scan(a, w_t * b + w * b_t + a_t * before, first_t)
        y = (h * c).sum(2) + per_channel(D)[..., None] * x
        y_t = (h_t * c + h * c_t).sum(2) + per_channel(D)[..., None] * x_t + per_channel(D_t)[..., None] * x
        if z is not None:
            gate, moving = along(z), along(z_t)
            share = torch.sigmoid(gate)
            y_t = y_t * silu(gate) + y * (share * (1 + gate * (1 - share))) * moving
        out[:, some] = order.back(order.real(y_t)).to(u.dtype)
        last[:, some] = order.last(h_t, first_t)
    return out, last


class _Order:
    """The steps of all rows in scan order: which are real, where sequences start, and how to scan them."""

    def __init__(self, u: Tensor, cu_seqlens: Tensor | None, seq_idx: Tensor | None, reverse: bool) -> None:
        batch, _, length = u.shape
        self.reverse = reverse
        # Per step: real or padding, whether its sequence starts there, and which one it is of.
        self.exists: Tensor | None = None
        self.fresh: Tensor | None = None
        self.sequence: Tensor | None = None
        self.bounds: Tensor | None = None
        steps = torch.arange(length, device=u.device)
        if cu_seqlens is not None:
            self.bounds = bounds = cu_seqlens.long().clamp(0, length)
            sequence = torch.searchsorted(bounds, steps, right=True).sub(1).clamp(0, len(bounds) - 2)
            starts = bounds[1:][sequence] - 1 if reverse else bounds[:-1][sequence]
            self.fresh = self.times((steps == starts)[None]) != 0
            self.sequence = sequence.flip(0) if reverse else sequence
        elif seq_idx is not None:
            ids = self.times(seq_idx, floats=False)
            self.exists = ids >= 0
            # The last real step before each one; its id is what a change is measured against.
            real = torch.where(self.exists, steps, -1).cummax(1).values
            real = torch.cat([real.new_full((batch, 1), -1), real[:, :-1]], 1)
            known = ids.gather(1, real.clamp(min=0))
            self.fresh = self.exists & (real >= 0) & (ids != known)

    def times(self, t: Tensor, floats: bool = True) -> Tensor:
        """Along the last dimension in scan order, as float32 and without what padding holds."""
        t = t.float() if floats else t
        if t.dim() == 0:
            return t
        t = t.flip(-1) if self.reverse else t
        if self.exists is None or not floats:
            return t
        return torch.where(self.exists.view(len(t), *(1,) * (t.dim() - 2), -1), t, 0.0)

    def real(self, t: Tensor) -> Tensor:
        return t if self.exists is None else torch.where(self.exists[:, None], t, 0.0)

    def back(self, t: Tensor) -> Tensor:
        return t.flip(-1) if self.reverse else t

    def scan(self, a: Tensor, terms: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        """States ``[B, channels, N, L]`` of the recurrence, and the one that each step started from."""
        entering = first if self.bounds is None else first.new_zeros((1, *first.shape[1:]))
        fresh = None if self.fresh is None else self.fresh[:, None, None]
        at_start = first.new_zeros(())
        factors = a
        if fresh is not None:
            factors = torch.where(fresh, 0.0, a)
            if self.sequence is not None:
                at_start = first[self.sequence].permute(1, 2, 0)[None]
                terms = torch.where(fresh, terms + a * at_start, terms)
        flat = [t.expand(a.shape).reshape(-1, a.shape[-1]).contiguous() for t in (factors, terms)]
        h = torch.ops.arcore.linear_scan(*flat, entering.reshape(-1).contiguous(), False).view(a.shape)
        before = torch.cat([entering[..., None], h[..., :-1]], -1)
        return h, before if fresh is None else torch.where(fresh, at_start, before)

    def last(self, h: Tensor, first: Tensor) -> Tensor:
        """The last state of each row, of an empty sequence the one that it began with."""
        if self.bounds is None:
            return h[..., -1]
        ends = (h.shape[-1] - 1 - self.bounds[:-1]) if self.reverse else self.bounds[1:] - 1
        empty = self.bounds[1:] <= self.bounds[:-1]
        states = h[0][..., ends.clamp(0, h.shape[-1] - 1)].permute(2, 0, 1)
        return torch.where(empty[:, None, None], first, states)


torch.library.impl("arcore::selective_scan_tangent", "CUDA", tiled_tangent)
