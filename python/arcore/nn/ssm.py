"""Selective state spaces (arXiv:2312.00752): the mixer of Mamba and its core, for mixers of several directions.

The mixer runs in three ways: over whole sequences, over sequences that continue from a `StateCache` and leave their
last state there, and one token at a time. All three give the same numbers up to rounding.

Legend: B rows, L tokens, C width, D inner channels, N states per channel, R rank of the step sizes, W taps of the
convolution.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore.nn.state import StateCache
from arcore.ops import selective_scan


class CausalConv1d(nn.Module):
    """Depthwise causal convolution and SiLU.

    Args:
        channels: D.
        taps: W.
        bias: add one number per channel.
    """

    def __init__(self, channels: int, taps: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, taps))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        for parameter in self.parameters():
            if not parameter.is_meta:
                nn.init.uniform_(parameter, -(taps**-0.5), taps**-0.5)

    def forward(
        self, x: Tensor, *, seq_idx: Tensor | None = None, reverse: bool = False, state: Tensor | None = None
    ) -> Tensor:
        """Convolve sequences.

        Args:
            x: `[B, D, L]`, any strides.
            seq_idx: see `MambaMixer.forward`.
            reverse: look at later tokens instead of earlier ones.
            state: `[B, D, W - 1]`, the inputs before x; receives the last ones of x.

        Returns:
            `[B, D, L]`.
        """
        taps = self.weight.shape[2]
        before = x.new_zeros(*x.shape[:2], taps - 1) if state is None else state.to(x.dtype)
        ids = seq_idx
        if reverse:
            x, ids = x.flip(2), None if ids is None else ids.flip(1)
        if ids is None and x.shape[2] > 0:
            padded = torch.cat([before, x], dim=2)
            out = F.silu(F.conv1d(padded, self.weight.to(x.dtype), self.bias, groups=x.shape[1]))
        elif ids is None:
            out = x.clone()
        else:
            out = self._packed(x, before, ids)
        if reverse:
            return out.flip(2)
        if state is not None:
            kept = min(x.shape[2], state.shape[2])
            last = x[:, :, x.shape[2] - kept :]
            if seq_idx is not None:
                last = last.masked_fill(seq_idx[:, None, x.shape[2] - kept :] < 0, 0.0)
            state.copy_(last if kept == state.shape[2] else torch.cat([state[:, :, kept:], last], dim=2))
        return out

    def step(self, x: Tensor, state: Tensor) -> Tensor:
        """One token: `[B, D]` to `[B, D]`; `state` `[B, D, W - 1]` moves on in place."""
        inputs = torch.cat([state, x.unsqueeze(2)], dim=2)
        state.copy_(inputs[:, :, 1:])
        out = (inputs * self.weight.squeeze(1)).sum(dim=2)
        return F.silu(out if self.bias is None else out + self.bias)

    def _packed(self, x: Tensor, before: Tensor, ids: Tensor) -> Tensor:
        """Taps that reach into another sequence, or into padding, count as zero."""
        width, length = before.shape[2], x.shape[2]
        padded, real = torch.cat([before, x], dim=2), ids >= 0
        owners = torch.cat([ids[:, :1].expand(-1, width), ids], dim=1)
        out = torch.zeros_like(x)
        for tap in range(width + 1):
            same = (owners[:, tap : tap + length] == ids) & real
            shifted = padded[:, :, tap : tap + length].masked_fill(~same.unsqueeze(1), 0.0)
            out = out + shifted * self.weight[:, :, tap]
        out = F.silu(out if self.bias is None else out + self.bias.unsqueeze(1))
        return out.masked_fill(~real.unsqueeze(1), 0.0)


class SelectiveSSM(nn.Module):
    """Convolution and selective scan of D channels (arXiv:2312.00752, section 3.2), without projections in and out.

    The scan's step sizes and its input and output matrices depend on the token (`select`).

    The parameters have the names and shapes of the published code.

    Args:
        inner: channels D.
        dt_rank: rank R of the step sizes.
        d_state: states N per channel.
        d_conv: taps W of the convolution.
        conv_bias: of the convolution.
        dt_min, dt_max: range of the initial step sizes, log-uniform.
        dt_floor: least initial step size.

    Raises:
        ValueError: a size is out of range.
    """

    # Optimisers leave these without weight decay: pulling A_log to 0 would pull all time constants to 1.
    no_weight_decay = ("A_log", "D")

    def __init__(
        self,
        inner: int,
        *,
        dt_rank: int,
        d_state: int = 16,
        d_conv: int = 4,
        conv_bias: bool = True,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_floor: float = 1e-4,
    ) -> None:
        super().__init__()
        self.dt_rank = dt_rank
        self.d_state = d_state
        if min(inner, dt_rank, d_state) < 1 or d_state > 256 or d_conv < 2:
            raise ValueError(
                f"arcore.nn.{type(self).__name__}: expected positive sizes, d_state <= 256 and d_conv >= 2 but got "
                f"{inner} inner channels, dt_rank={dt_rank}, d_state={d_state}, d_conv={d_conv}"
            )
        self.conv_shape = (inner, d_conv - 1)
        self.state_shape = (inner, d_state)
        self.conv1d = CausalConv1d(inner, d_conv, bias=conv_bias)
        self.x_proj = nn.Linear(inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, inner)
        self.A_log = nn.Parameter(torch.empty(inner, d_state))
        self.D = nn.Parameter(torch.ones(inner))
        # On the meta device only shapes matter, and random numbers take long.
        if not self.A_log.is_meta:
            with torch.no_grad():
                self.A_log.copy_(torch.arange(1.0, d_state + 1).log())
                nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
                self.dt_proj.bias.copy_(_initial_dt_bias(inner, dt_min, dt_max, dt_floor))

    def decay(self) -> Tensor:
        """The matrix A of the continuous system, float32 `[D, N]`, negative."""
        return -self.A_log.float().exp()

    def select(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the scan does with each token; the selection of the paper's section 3.2.

        Args:
            u: `[..., D]`, after the convolution.

        Returns:
            Step sizes `[..., D]`, before their bias and softplus; input and output matrix, each `[..., N]`.
        """
        low_rank, b, c = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        return F.linear(low_rank, self.dt_proj.weight), b, c

    def scan(
        self,
        u: Tensor,
        z: Tensor,
        *,
        seq_idx: Tensor | None = None,
        reverse: bool = False,
        states: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Convolve and scan whole sequences, and gate the result.

        Args:
            u: `[B, L, D]`.
            z: `[B, L, D]`, the gate before its SiLU.
            seq_idx, reverse: see `MambaMixer.forward`.
            states: of the convolution and of the scan, to start from; receive those after u.

        Returns:
            `[B, L, D]`.
        """
        conv_state, state = (None, None) if states is None else states
        # Channel-last views all the way: the ops read any strides, so nothing is copied or transposed.
        u = self.conv1d(u.transpose(1, 2), seq_idx=seq_idx, reverse=reverse, state=conv_state)  # [B, D, L]
        delta, b, c = self.select(u.transpose(1, 2))
        y, last_state = selective_scan(
            u,
            delta.transpose(1, 2),
            self.decay(),
            b.transpose(1, 2),
            c.transpose(1, 2),
            self.D.float(),
            z.transpose(1, 2),
            self.dt_proj.bias.float(),
            delta_softplus=True,
            return_last_state=True,
            initial_state=state,
            seq_idx=seq_idx,
            reverse=reverse,
        )
        if state is not None:
            state.copy_(last_state)
        return y.transpose(1, 2)


class MambaMixer(SelectiveSSM):
    """The mixer of Mamba (arXiv:2312.00752, section 3.4).

    Two branches of D = expand * C channels. One is convolved and scanned; the other gates the result.

    Args:
        dim: width C.
        expand: D / C.
        dt_rank: rank R of the step sizes; ceil(C / 16) when None.
        bias: of the projections in and out.
        others: those of `SelectiveSSM`.

    Raises:
        ValueError: a size is out of range.
    """

    def __init__(
        self, dim: int, *, expand: int = 2, dt_rank: int | None = None, bias: bool = False, **others: Any
    ) -> None:
        inner = expand * dim
        super().__init__(inner, dt_rank=math.ceil(dim / 16) if dt_rank is None else dt_rank, **others)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=bias)
        self.out_proj = nn.Linear(inner, dim, bias=bias)

    def forward(
        self,
        x: Tensor,
        *,
        seq_idx: Tensor | None = None,
        reverse: bool = False,
        cache: StateCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """Mix whole sequences.

        Args:
            x: `[B, L, C]`.
            seq_idx: int32 `[B, L]`, which of the sequences packed into a row each token belongs to; state and
                convolution start anew where it changes. Negative means padding, which is passed over. None: each row
                is one sequence.
            reverse: from the last token to the first.
            cache: the state to start from; receives the state after x. Only without gradients.
            layer: which layer of the cache is ours.

        Returns:
            `[B, L, C]`.
        """
        u, z = self.in_proj(x).chunk(2, dim=-1)  # [B, L, D]
        states = None if cache is None else cache.layer(layer)
        out: Tensor = self.out_proj(self.scan(u, z, seq_idx=seq_idx, reverse=reverse, states=states))
        return out

    def step(self, x: Tensor, cache: StateCache, layer: int = 0) -> Tensor:
        """Mix one token per row, `[B, C]` to `[B, C]`; the layer's state moves on in place."""
        conv_state, state = cache.layer(layer)
        if layer not in cache.derived:
            cache.derived[layer] = self.decay()
        u, z = self.in_proj(x).chunk(2, dim=-1)  # [B, D]
        u = self.conv1d.step(u, conv_state)
        delta, b, c = self.select(u)
        y, last_state = selective_scan(
            u.unsqueeze(2),
            delta.unsqueeze(2),
            cache.derived[layer],
            b.unsqueeze(2),
            c.unsqueeze(2),
            self.D.float(),
            z.unsqueeze(2),
            self.dt_proj.bias.float(),
            delta_softplus=True,
            return_last_state=True,
            initial_state=state,
        )
        state.copy_(last_state)
        out: Tensor = self.out_proj(y.squeeze(2))
        return out


def _initial_dt_bias(count: int, low: float, high: float, floor: float) -> Tensor:
    """Biases whose softplus is log-uniform in [low, high], at least `floor`."""
    dt = torch.empty(count).uniform_(math.log(low), math.log(high)).exp().clamp(min=floor)
    return dt + (-torch.expm1(-dt)).log()
