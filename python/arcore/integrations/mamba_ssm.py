"""The functions of the packages mamba_ssm and causal_conv1d, with their names and order of arguments, on our ops.

    from arcore.integrations.mamba_ssm import causal_conv1d_fn, mamba_chunk_scan_combined, selective_scan_fn

Code that imports them from those packages runs on a CPU after a change of its imports. The ops behind them
(`arcore.ops.selective_scan`, `causal_conv1d` and others) take any strides and have more options. Names that end in
`_ref` are the same functions in plain PyTorch, one step at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from arcore.ops import (
    causal_conv1d,
    causal_conv1d_update,
    reference_causal_conv1d,
    reference_causal_conv1d_update,
    reference_selective_scan,
    reference_selective_state_update,
    reference_ssd,
    selective_scan,
    selective_state_update,
    ssd,
)

__all__ = [
    "causal_conv1d_fn",
    "causal_conv1d_ref",
    "causal_conv1d_update",
    "causal_conv1d_update_ref",
    "causal_conv1d_varlen_states",
    "causal_conv1d_varlen_states_ref",
    "mamba_chunk_scan",
    "mamba_chunk_scan_combined",
    "mamba_inner_fn",
    "mamba_inner_ref",
    "mamba_split_conv1d_scan_combined",
    "mamba_split_conv1d_scan_ref",
    "selective_scan_fn",
    "selective_scan_ref",
    "selective_state_update",
    "selective_state_update_ref",
    "ssd_chunk_scan_combined_ref",
]

_MODULE = "arcore.integrations.mamba_ssm"


def selective_scan_fn(
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
) -> Tensor | tuple[Tensor, Tensor]:
    """`arcore.ops.selective_scan`."""
    return selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`arcore.ops.causal_conv1d`."""
    return causal_conv1d(
        x, weight, bias, seq_idx, initial_states, return_final_states, final_states_out, activation
    )


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """Convolution, scan and projection out of a Mamba layer.

    Args:
        xz: `[batch, 2 * D, L]`: scan input and gate.
        conv1d_weight: `[D, 1, W]`.
        conv1d_bias: `[D]`.
        x_proj_weight: `[R + 2 * N, D]`: step sizes, B and C; without the rows of those that are given.
        delta_proj_weight: `[D, R]`.
        out_proj_weight: `[M, D]`.
        out_proj_bias: `[M]`.
        A: `[D, N]`, real.
        B, C: as in `selective_scan_fn`; made from the input when None.
        D, delta_bias: `[D]`.
        B_proj_bias, C_proj_bias: `[N]`, added to what is made from the input.
        delta_softplus: as in `selective_scan_fn`.
        checkpoint_lvl: accepted and ignored: nothing needs recomputation that the scan's backward does not do itself.
        b_rms_weight, c_rms_weight: `[N]`: RMS norms of B and C, where they are made from the input.
        dt_rms_weight: `[D]`: RMS norm of the step sizes after their projection.
        b_c_dt_rms_eps: of these norms.

    Returns:
        `[batch, L, M]`.
    """
    given = (conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias)
    norms = (b_rms_weight, c_rms_weight, dt_rms_weight, b_c_dt_rms_eps)
    matrices = (A, B, C, D, delta_bias, B_proj_bias, C_proj_bias)
    return _inner(causal_conv1d, selective_scan, xz, given, matrices, delta_softplus, norms)


def mamba_inner_ref(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """`mamba_inner_fn` in plain PyTorch."""
    given = (conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias)
    matrices = (A, B, C, D, delta_bias, B_proj_bias, C_proj_bias)
    norms = (None, None, None, 0.0)
    return _inner(
        reference_causal_conv1d, reference_selective_scan, xz, given, matrices, delta_softplus, norms
    )


def _inner(
    convolve: Callable[..., Any],
    scan: Callable[..., Any],
    xz: Tensor,
    given: tuple[Any, ...],
    matrices: tuple[Any, ...],
    delta_softplus: bool,
    norms: tuple[Any, ...],
) -> Tensor:
    conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias = given
    A, B, C, D, delta_bias, B_proj_bias, C_proj_bias = matrices
    b_rms_weight, c_rms_weight, dt_rms_weight, b_c_dt_rms_eps = norms
    x, z = xz.chunk(2, dim=1)
    rank, d_state = delta_proj_weight.shape[1], A.shape[1]
    u = convolve(x, conv1d_weight.squeeze(1), conv1d_bias, activation="silu")
    made = F.linear(u.transpose(1, 2), x_proj_weight)
    delta = _normed(F.linear(made[..., :rank], delta_proj_weight), dt_rms_weight, b_c_dt_rms_eps)
    if B is None:
        B = _with_bias(made[..., rank : rank + d_state], B_proj_bias)
        B = _normed(B, b_rms_weight, b_c_dt_rms_eps).transpose(1, 2)
    if C is None:
        C = _with_bias(made[..., -d_state:], C_proj_bias)
        C = _normed(C, c_rms_weight, b_c_dt_rms_eps).transpose(1, 2)
    y = scan(u, delta.transpose(1, 2), A, B, C, D, z, delta_bias, delta_softplus)
    return F.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


def _with_bias(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias.to(x.dtype)


def _normed(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return x if weight is None else F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


def selective_scan_ref(
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
) -> Tensor | tuple[Tensor, Tensor]:
    """`arcore.ops.reference_selective_scan`."""
    return reference_selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)


def selective_state_update_ref(
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
) -> Tensor:
    """`arcore.ops.reference_selective_state_update`."""
    return reference_selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)


def causal_conv1d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`arcore.ops.reference_causal_conv1d`; like the peer's, without sequence ids."""
    return reference_causal_conv1d(
        x, weight, bias, None, initial_states, return_final_states, final_states_out, activation
    )


def causal_conv1d_update_ref(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
) -> Tensor:
    """`arcore.ops.reference_causal_conv1d_update`."""
    return reference_causal_conv1d_update(x, conv_state, weight, bias, activation, cache_seqlens)


def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """The last inputs of every sequence of a packed row, which `causal_conv1d_update` starts from.

    Args:
        x: `[total_tokens, dim]`.
        cu_seqlens: integers `[num_sequences + 1]`, boundaries of the sequences.
        state_len: how many inputs.

    Returns:
        `[num_sequences, dim, state_len]`, x's dtype, newest last; 0 where a sequence is shorter.
    """
    if x.dim() != 2 or cu_seqlens.dim() != 1 or state_len < 0:
        raise ValueError(
            f"{_MODULE}.causal_conv1d_varlen_states: expected x of shape (tokens, dim), cu_seqlens of one dimension "
            f"and state_len >= 0 but got {tuple(x.shape)}, {tuple(cu_seqlens.shape)} and {state_len}"
        )
    ends = cu_seqlens[1:].to(torch.int64)
    at = ends[:, None] - torch.arange(state_len, 0, -1, device=x.device)
    inside = at >= cu_seqlens[:-1, None]
    if x.shape[0] == 0:
        return x.new_zeros(ends.shape[0], x.shape[1], state_len)
    states = torch.where(inside[..., None], x[at.clamp(min=0)], 0.0)
    return states.transpose(1, 2).contiguous().to(x.dtype)


def causal_conv1d_varlen_states_ref(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """`causal_conv1d_varlen_states`, one sequence after the other."""
    bounds = cu_seqlens.tolist()
    states = x.new_zeros(len(bounds) - 1, x.shape[1], state_len)
    for i in range(len(bounds) - 1):
        kept = x[max(bounds[i], bounds[i + 1] - state_len) : bounds[i + 1]]
        states[i, :, state_len - kept.shape[0] :] = kept.T
    return states


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """`arcore.ops.ssd`.

    Args:
        x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit: as `arcore.ops.ssd` takes them.
        chunk_size: accepted and ignored; it changes no result.
        initial_states: `[batch, heads, dim, d_state]`.
        seq_idx: integers `[batch, length]`.
        cu_seqlens: integers `[num_sequences + 1]`; with `return_varlen_states` the boundaries of the sequences, which
            `seq_idx` then repeats. Else ignored.
        return_final_states: also return the states after the last step.
        return_varlen_states: also return the state after each sequence of the packed row.
        state_dtype: of the returned states; the scan itself keeps them in float32.

    Returns:
        `[batch, length, heads, dim]`, then the states that are asked for, in the order of their arguments.
    """
    if return_varlen_states:
        if cu_seqlens is None or initial_states is not None:
            raise ValueError(
                f"{_MODULE}.mamba_chunk_scan_combined: expected cu_seqlens, and no initial_states, with "
                f"return_varlen_states but got cu_seqlens={'None' if cu_seqlens is None else 'a tensor'}, "
                f"initial_states={'None' if initial_states is None else 'a tensor'}; arcore.ops.ssd takes initial "
                "states per sequence"
            )
        seq_idx = None
    out, states = ssd(
        *(x, dt, A, B, C, D, z, dt_bias, dt_softplus),
        return_last_state=True,
        dt_limit=dt_limit,
        initial_state=initial_states,
        cu_seqlens=cu_seqlens if return_varlen_states else None,
        seq_idx=None if seq_idx is None else seq_idx.to(torch.int32),
    )
    states = states if state_dtype is None else states.to(state_dtype)
    results: tuple[Tensor, ...] = (out,)
    if return_final_states:
        results = (*results, states[-1:] if return_varlen_states else states)
    if return_varlen_states:
        results = (*results, states)
    return results if len(results) > 1 else out


def mamba_chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """`arcore.ops.ssd`; `chunk_size` is ignored."""
    return ssd(x, dt, A, B, C, D, z, dt_bias, dt_softplus)


def ssd_chunk_scan_combined_ref(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """`arcore.ops.reference_ssd`; `chunk_size` is ignored."""
    out = reference_ssd(x, dt, A, B, C, D, z, dt_bias, dt_softplus)
    assert isinstance(out, Tensor)
    return out


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolution, scan, gated norm and projection out of a Mamba-2 layer.

    Args:
        zxbcdt: `[batch, length, 2 * M + 2 * dim + 2 * groups * d_state + heads]`: M pairs of a gated unit beside the
            scan (M is usually 0), gate, what the convolution reads, step sizes.
        conv1d_weight: `[dim + 2 * groups * d_state, W]`.
        conv1d_bias: `[dim + 2 * groups * d_state]`.
        dt_bias, A: `[heads]`.
        D: `[heads]`, then with `headdim`, or `[heads, headdim]`.
        chunk_size: accepted and ignored; it changes no result.
        initial_states, seq_idx, dt_limit, return_final_states, state_dtype: as in `mamba_chunk_scan_combined`.
        activation: of the convolution: None, "silu" or "swish".
        rmsnorm_weight: `[dim]`: RMS norm over each group of channels, with the gate; the scan gates when None.
        rmsnorm_eps: of the norm.
        outproj_weight, outproj_bias: `[out_dim, M + dim]` and `[out_dim]`.
        headdim: channels of a head, where D does not tell.
        ngroups: of B and C.
        norm_before_gate: norm(x) silu(z), else norm(x silu(z)).

    Returns:
        `[batch, length, M + dim]` or `[batch, length, out_dim]`; with `return_final_states` also the states.
    """
    layer = (conv1d_weight, conv1d_bias, dt_bias, A, D, headdim, ngroups, activation)
    after = (rmsnorm_weight, rmsnorm_eps, norm_before_gate, outproj_weight, outproj_bias)
    start = None if seq_idx is None else seq_idx.to(torch.int32)
    out, states = _split_scan(causal_conv1d, ssd, zxbcdt, layer, after, dt_limit, initial_states, start)
    if not return_final_states:
        return out
    return out, states if state_dtype is None else states.to(state_dtype)


def mamba_split_conv1d_scan_ref(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Tensor:
    """`mamba_split_conv1d_scan_combined` in plain PyTorch."""
    layer = (conv1d_weight, conv1d_bias, dt_bias, A, D, headdim, ngroups, activation)
    after = (rmsnorm_weight, rmsnorm_eps, norm_before_gate, outproj_weight, outproj_bias)
    return _split_scan(reference_causal_conv1d, reference_ssd, zxbcdt, layer, after, dt_limit, None, None)[0]


def _split_scan(
    convolve: Callable[..., Any],
    scan: Callable[..., Any],
    zxbcdt: Tensor,
    layer: tuple[Any, ...],
    after: tuple[Any, ...],
    dt_limit: tuple[float, float],
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    conv1d_weight, conv1d_bias, dt_bias, A, D, headdim, ngroups, activation = layer
    rmsnorm_weight, rmsnorm_eps, norm_before_gate, outproj_weight, outproj_bias = after
    name = f"{_MODULE}.mamba_split_conv1d_scan_combined"
    if D.dim() == 1 and headdim is None:
        raise ValueError(f"{name}: expected headdim where D has one dimension but got None")
    heads, per_head = D.shape[0], headdim if D.dim() == 1 else D.shape[1]
    dim = heads * per_head
    d_state = (conv1d_weight.shape[0] - dim) // (2 * ngroups)
    beside = zxbcdt.shape[-1] - 2 * dim - 2 * ngroups * d_state - heads
    if d_state < 1 or beside < 0 or beside % 2 or conv1d_weight.shape[0] != dim + 2 * ngroups * d_state:
        raise ValueError(
            f"{name}: expected zxbcdt of 2 * M + 2 * dim + 2 * ngroups * d_state + heads numbers and conv1d_weight of "
            f"dim + 2 * ngroups * d_state rows, with dim={dim}, heads={heads}, ngroups={ngroups}, but got "
            f"{zxbcdt.shape[-1]} and {conv1d_weight.shape[0]}"
        )
    pair, z, xbc, dt = zxbcdt.split([beside, dim, conv1d_weight.shape[0], heads], dim=-1)
    xbc = convolve(xbc.transpose(1, 2), conv1d_weight, conv1d_bias, seq_idx, activation=activation)
    x, b, c = xbc.transpose(1, 2).split([dim, ngroups * d_state, ngroups * d_state], dim=-1)
    out, states = scan(
        x.unflatten(-1, (heads, per_head)),
        dt,
        A,
        b.unflatten(-1, (ngroups, d_state)),
        c.unflatten(-1, (ngroups, d_state)),
        D,
        z.unflatten(-1, (heads, per_head)) if rmsnorm_weight is None else None,
        dt_bias,
        True,
        return_last_state=True,
        dt_limit=dt_limit,
        initial_state=initial_states,
        seq_idx=seq_idx,
    )
    out = out.flatten(2)
    if rmsnorm_weight is not None:
        wide, gate = out.float(), F.silu(z.float())
        wide = wide if norm_before_gate else wide * gate
        grouped = wide.unflatten(-1, (ngroups, dim // ngroups))
        wide = F.rms_norm(grouped, grouped.shape[-1:], eps=rmsnorm_eps).flatten(-2) * rmsnorm_weight.float()
        out = (wide * gate if norm_before_gate else wide).to(out.dtype)
    if beside:
        gate, value = pair.chunk(2, dim=-1)
        out = torch.cat([F.silu(gate) * value, out], dim=-1)
    return (out if outproj_weight is None else F.linear(out, outproj_weight, outproj_bias)), states
