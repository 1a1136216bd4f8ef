"""Selective state spaces (arXiv:2312.00752): the mixer of Mamba and its core, for mixers of several directions.

The mixer runs in three ways: over whole sequences, over sequences that continue from a `StateCache` and leave their
last state there, and one token at a time. All three give the same numbers up to rounding.

Legend: B rows, L tokens, C width, D inner channels, N states per channel, R rank of the step sizes, W taps of the
convolution.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore.nn.block_weight import stored
from arcore.nn.kinds import Positive, Size, Tokens, check_kinds, explain_kinds
from arcore.nn.linear import Linear, linear
from arcore.nn.norm import GatedRMSNorm
from arcore.nn.state import StateCache
from arcore.ops import causal_conv1d, causal_conv1d_update, selective_scan, selective_state_update, ssd
from arcore.ops.mamba_step import DTYPES as STEP_DTYPES
from arcore.ops.mamba_step import MAX_TAPS


@check_kinds
class CausalConv1d(nn.Module):
    """Depthwise causal convolution, and SiLU or nothing.

    Args:
        channels: D.
        taps: W.
        bias: add one number per channel.
        activation: behind the convolution, or None.
    """

    def __init__(
        self, channels: Size, taps: Size, *, bias: bool = True, activation: Literal["silu"] | None = "silu"
    ) -> None:
        super().__init__()
        self.activation: Any = activation
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
            state: `[B, W - 1, D]`, the inputs before x; receives the last ones of x.

        Returns:
            `[B, D, L]`.
        """
        if state is None:
            return causal_conv1d(
                x, self.weight.squeeze(1), self.bias, seq_idx, activation=self.activation, reverse=reverse
            )
        carried = state.transpose(1, 2)
        out, _ = causal_conv1d(
            x,
            self.weight.squeeze(1),
            self.bias,
            seq_idx,
            carried,
            return_final_states=True,
            final_states_out=carried,
            activation=self.activation,
            reverse=reverse,
        )
        return out

    @explain_kinds
    def step(self, x: Tensor, state: Tensor, trail: Tensor | None = None) -> Tensor:
        """One token or a few; `state` `[B, W - 1, D]` moves on in place.

        Args:
            x: `[B, D]` or `[B, S, D]`.
            state: see above.
            trail: `[B, S + 1, W - 1, D]`, receives the states before and after each of S tokens.

        Returns:
            x's shape.
        """
        several = x.dim() == 3
        y = causal_conv1d_update(
            x.transpose(1, 2) if several else x,
            state.transpose(1, 2),
            self.weight.squeeze(1),
            self.bias,
            self.activation,
            snapshots=None if trail is None else trail.transpose(2, 3),
        )
        return y.transpose(1, 2) if several else y


@check_kinds
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
        dt_min: Positive = 1e-3,
        dt_max: Positive = 0.1,
        dt_floor: Positive = 1e-4,
    ) -> None:
        super().__init__()
        self.dt_rank = dt_rank
        self.d_state = d_state
        if min(inner, dt_rank, d_state) < 1 or d_state > 256 or d_conv < 2:
            raise ValueError(
                f"arcore.nn.{type(self).__name__}: expected positive sizes, d_state <= 256 and d_conv >= 2 but got "
                f"{inner} inner channels, dt_rank={dt_rank}, d_state={d_state}, d_conv={d_conv}"
            )
        self.conv_shape = (d_conv - 1, inner)
        self.state_shape = (inner, d_state)
        self.conv1d = CausalConv1d(inner, d_conv, bias=conv_bias)
        self.x_proj = Linear(inner, self.dt_rank + 2 * d_state, bias=False)
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

    @explain_kinds
    def select(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the scan does with each token; the selection of the paper's section 3.2.

        Args:
            u: `[..., D]`, after the convolution.

        Returns:
            Step sizes `[..., D]`, before their bias and softplus; input and output matrix, each `[..., N]`.
        """
        low_rank, b, c = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        return linear(low_rank, self.dt_proj.weight), b, c

    @explain_kinds
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


@check_kinds
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
        self.in_proj = Linear(dim, 2 * inner, bias=bias)
        self.out_proj = Linear(inner, dim, bias=bias)

    def forward(
        self,
        x: Tokens,
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

    @explain_kinds
    def branches(self, prompt: Tensor, continuations: Tensor) -> tuple[Tensor, Tensor]:
        """Mix a prompt once and several continuations of it, each as if it stood behind the prompt alone.

        The continuations start from the prompt's state, so its gradient is the sum of theirs.

        Args:
            prompt: `[1, P, C]`.
            continuations: `[G, L, C]`.

        Returns:
            `[1, P, C]` and `[G, L, C]`.
        """
        taps, count = self.conv1d.weight.shape[-1], len(continuations)
        u, z = self.in_proj(prompt).chunk(2, dim=-1)
        v, w = self.in_proj(continuations).chunk(2, dim=-1)
        tail = u[:, max(0, u.shape[1] - taps + 1) :].expand(count, -1, -1)
        mixed = self.conv1d(u.transpose(1, 2))
        behind = self.conv1d(torch.cat([tail, v], 1).transpose(1, 2))[..., tail.shape[1] :]
        first, state = self._scanned(mixed, z, None)
        second, _ = self._scanned(behind, w, state.expand(count, -1, -1))
        return self.out_proj(first), self.out_proj(second)

    def _scanned(self, u: Tensor, z: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scan what comes from the convolution, `[B, D, L]`, gated by z `[B, L, D]`; also the last state."""
        delta, b, c = (x.transpose(1, 2) for x in self.select(u.transpose(1, 2)))
        out, last = selective_scan(
            *(u, delta, self.decay(), b, c, self.D.float(), z.transpose(1, 2), self.dt_proj.bias.float()),
            delta_softplus=True,
            return_last_state=True,
            initial_state=state,
        )
        return out.transpose(1, 2), last

    @explain_kinds
    def step(self, x: Tensor, cache: StateCache, layer: int = 0) -> Tensor:
        """Mix one token per row, `[B, C]` to `[B, C]`, or S, `[B, S, C]`; the layer's state moves on in place."""
        conv_state, state = cache.layer(layer)
        conv_trail, trail = cache.trail(layer) if x.dim() == 3 else (None, None)
        if layer not in cache.derived:
            cache.derived[layer] = self.decay()
        u, z = self.in_proj(x).chunk(2, dim=-1)  # [B, D]
        u = self.conv1d.step(u, conv_state, conv_trail)
        delta, b, c = self.select(u)
        y = selective_state_update(
            *(state, u, delta, cache.derived[layer], b, c, self.D, z, self.dt_proj.bias),
            dt_softplus=True,
            snapshots=trail,
        )
        out: Tensor = self.out_proj(y)
        return out

    def fits_step(self) -> bool:
        """Whether `arcore.ops.mamba_step` can take this mixer: float32 or bfloat16 on a CPU, plain parts, no hooks."""
        products: Any = (self.in_proj, self.x_proj, self.dt_proj, self.out_proj)
        kinds, conv = (Linear, Linear, nn.Linear, Linear), self.conv1d
        return (
            type(self) is MambaMixer
            and type(conv) is CausalConv1d
            and conv.activation == "silu"
            and conv.weight.shape[-1] <= MAX_TAPS
            and products[1].bias is None
            and all(type(part) is kind for part, kind in zip(products, kinds, strict=True))
            and not any(m._forward_hooks or m._forward_pre_hooks for m in self.modules())
            and all(p.is_cpu and p.dtype in STEP_DTYPES for p in self.parameters())
            and all(
                type(weight) in (Tensor, nn.Parameter) and weight.is_contiguous()
                for weight in (stored(part.weight) for part in products)
            )
        )

    def step_weights(self) -> dict[str, Any]:
        """What `arcore.ops.mamba_step` asks of the mixer, by the names of its arguments.

        Matrices are those of the mixer, blocks as blocks; what is small comes as the floats that the op reads fastest.
        """

        def floats(vector: Tensor | None) -> Tensor | None:
            return None if vector is None else vector.detach().float()

        taps = self.conv1d.weight.detach().squeeze(1).float()
        return {
            "in_proj": stored(self.in_proj.weight),
            "conv_weight": taps.t().contiguous().t(),
            "x_proj": stored(self.x_proj.weight),
            "dt_proj": stored(self.dt_proj.weight),
            "A": self.decay().detach(),
            "D": floats(self.D),
            "out_proj": stored(self.out_proj.weight),
            "in_bias": floats(self.in_proj.bias),
            "conv_bias": floats(self.conv1d.bias),
            "dt_bias": floats(self.dt_proj.bias),
            "out_bias": floats(self.out_proj.bias),
        }


@check_kinds
class Mamba2Mixer(nn.Module):
    """The mixer of Mamba-2 (arXiv:2405.21060, section 7).

    One projection makes gate, scan input, input and output matrices and step sizes; heads of P channels share a scalar
    decay, and groups of heads share the matrices. The gated result is normalised before the projection out.

    The parameters have the names and shapes of the published code.

    Args:
        dim: width C.
        d_state: states N per channel.
        d_conv: taps W of the convolution.
        expand: D / C.
        head_dim: channels P of a head.
        num_groups: groups G of heads.
        bias: of the projections in and out.
        conv_bias: of the convolution.
        dt_limit: step sizes are clamped to this range.
        norm_eps: of the norm.
        d_ssm: channels that are scanned, a multiple of `head_dim`; the others pass a gate alone. None: all.
        d_per_channel: a skip weight for every channel instead of one per head.
        gated_norm: False leaves the norm out; the gate stays.
        norm_before_gate: norm first, gate after it.
        dt_min, dt_max: range of the initial step sizes, log-uniform.
        dt_floor: least initial step size.

    Raises:
        ValueError: a size is out of range, or they do not divide.
    """

    no_weight_decay = ("A_log", "D", "dt_bias")

    def __init__(
        self,
        dim: int,
        *,
        d_state: int = 128,
        d_conv: int = 4,
        expand: int = 2,
        head_dim: int = 64,
        num_groups: int = 1,
        bias: bool = False,
        conv_bias: bool = True,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        norm_eps: float = 1e-5,
        d_ssm: int | None = None,
        d_per_channel: bool = False,
        gated_norm: bool = True,
        norm_before_gate: bool = False,
        dt_min: Positive = 1e-3,
        dt_max: Positive = 0.1,
        dt_floor: Positive = 1e-4,
    ) -> None:
        super().__init__()
        whole = expand * dim
        inner = whole if d_ssm is None else d_ssm
        heads = inner // max(head_dim, 1)
        if d_ssm is not None and not 1 <= d_ssm <= whole:
            raise ValueError(
                f"arcore.nn.Mamba2Mixer: expected d_ssm from 1 to expand * dim = {whole} but got {d_ssm}"
            )
        if min(dim, expand, d_state, head_dim, num_groups) < 1 or d_conv < 2 or heads * head_dim != inner:
            raise ValueError(
                "arcore.nn.Mamba2Mixer: expected positive sizes, d_conv >= 2 and head_dim to divide expand * dim, or "
                f"d_ssm, but got dim={dim}, expand={expand}, head_dim={head_dim}, d_state={d_state}, d_conv={d_conv}"
            )
        if heads % num_groups:
            raise ValueError(
                f"arcore.nn.Mamba2Mixer: expected num_groups to divide the {heads} heads but got {num_groups}"
            )
        self.inner, self.heads, self.head_dim, self.groups = inner, heads, head_dim, num_groups
        self.d_state, self.dt_limit = d_state, dt_limit
        channels = inner + 2 * num_groups * d_state
        self.conv_shape = (d_conv - 1, channels)
        self.state_shape = (heads, head_dim, d_state)
        # Channels that are not scanned, twice: their values and their gates.
        self.passed = whole - inner
        self.in_proj = Linear(dim, 2 * self.passed + inner + channels + heads, bias=bias)
        self.conv1d = CausalConv1d(channels, d_conv, bias=conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.d_per_channel = d_per_channel
        self.D = nn.Parameter(torch.ones(inner if d_per_channel else heads))
        self.norm = (
            GatedRMSNorm(inner, groups=num_groups, eps=norm_eps, before_gate=norm_before_gate)
            if gated_norm
            else None
        )
        self.out_proj = Linear(whole, dim, bias=bias)
        if not self.A_log.is_meta:
            with torch.no_grad():
                self.dt_bias.copy_(_initial_dt_bias(heads, dt_min, dt_max, dt_floor))
                self.A_log.uniform_(1.0, 16.0).log_()

    def decay(self) -> Tensor:
        """The scalar A of each head, float32 `[H]`, negative."""
        return -self.A_log.float().exp()

    def _split_input(self, x: Tensor) -> tuple[Tensor, ...]:
        """Gate `[..., D]`, convolution's channels `[..., D + 2 G N]`, step sizes `[..., H]`, what is passed."""
        gates, values, gate, xbc, dt = self.in_proj(x).split(
            [self.passed, self.passed, self.inner, self.conv_shape[1], self.heads], dim=-1
        )
        return gate, xbc, dt, F.silu(gates) * values

    def _skip(self) -> Tensor:
        """Skip weights `[H]`, or `[H, P]`."""
        return self.D.view(self.heads, -1) if self.d_per_channel else self.D

    def _mixed(self, y: Tensor, gate: Tensor, passed: Tensor) -> Tensor:
        """What was scanned `[..., D]`, gated and projected, `[..., C]`."""
        y = y * F.silu(gate).to(y.dtype) if self.norm is None else self.norm(y, gate)
        if self.passed:
            y = torch.cat([passed.to(y.dtype), y], dim=-1)
        out: Tensor = self.out_proj(y)
        return out

    def _split_scan(self, xbc: Tensor) -> tuple[Tensor, ...]:
        """Scan input `[..., D]`, input and output matrices `[..., G N]`, from what left the convolution."""
        parts: tuple[Tensor, ...] = xbc.split([self.inner, *[self.groups * self.d_state] * 2], dim=-1)
        return parts

    def forward(
        self,
        x: Tokens,
        *,
        seq_idx: Tensor | None = None,
        cache: StateCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """Mix whole sequences; arguments and result are those of `MambaMixer.forward`."""
        conv_state, state = (None, None) if cache is None else cache.layer(layer)
        gate, xbc, dt, passed = self._split_input(x)
        xbc = self.conv1d(xbc.transpose(1, 2), seq_idx=seq_idx, state=conv_state).transpose(1, 2)
        u, b, c = self._split_scan(xbc)
        y, last_state = ssd(
            u.unflatten(-1, (self.heads, self.head_dim)),
            dt,
            self.decay(),
            b.unflatten(-1, (self.groups, self.d_state)),
            c.unflatten(-1, (self.groups, self.d_state)),
            self._skip(),
            dt_bias=self.dt_bias,
            dt_softplus=True,
            return_last_state=True,
            dt_limit=self.dt_limit,
            initial_state=state,
            seq_idx=seq_idx,
        )
        if state is not None:
            state.copy_(last_state)
        return self._mixed(y.flatten(2), gate, passed)

    @explain_kinds
    def step(self, x: Tensor, cache: StateCache, layer: int = 0) -> Tensor:
        """Mix one token per row, `[B, C]` to `[B, C]`, or S, `[B, S, C]`; the layer's state moves on in place."""
        conv_state, state = cache.layer(layer)
        conv_trail, trail = cache.trail(layer) if x.dim() == 3 else (None, None)
        gate, xbc, dt, passed = self._split_input(x)
        xbc = self.conv1d.step(xbc, conv_state, conv_trail)
        if layer not in cache.derived:
            cache.derived[layer] = self.decay()
        u, b, c = self._split_scan(xbc)
        heads = state.shape[1:]
        # The op's softplus knows no limits.
        dt = F.softplus(dt.float() + self.dt_bias.float()).clamp(*self.dt_limit)
        y = selective_state_update(
            state,
            u.unflatten(-1, heads[:2]),
            dt.unsqueeze(-1).expand(*dt.shape, heads[1]),
            cache.derived[layer][:, None, None].expand(heads),
            b.unflatten(-1, (self.groups, self.d_state)),
            c.unflatten(-1, (self.groups, self.d_state)),
            self._skip().view(heads[0], -1).expand(heads[:2]),
            snapshots=trail,
        )
        return self._mixed(y.flatten(-2), gate, passed)


def _initial_dt_bias(count: int, low: float, high: float, floor: float) -> Tensor:
    """Biases whose softplus is log-uniform in [low, high], at least `floor`."""
    dt = torch.empty(count).uniform_(math.log(low), math.log(high)).exp().clamp(min=floor)
    return dt + (-torch.expm1(-dt)).log()
