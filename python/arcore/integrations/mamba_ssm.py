"""The functions of the packages mamba_ssm and causal_conv1d, with their names and order of arguments, on our ops.

    from arcore.integrations.mamba_ssm import causal_conv1d_fn, mamba_inner_fn, selective_scan_fn

Code that imports them from those packages runs on a CPU after a change of its imports. The ops behind them
(`arcore.ops.selective_scan`, `causal_conv1d` and others) take any strides and have more options.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from arcore.ops import causal_conv1d, causal_conv1d_update, selective_scan, selective_state_update

__all__ = [
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "mamba_inner_fn",
    "selective_scan_fn",
    "selective_state_update",
]


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
    x, z = xz.chunk(2, dim=1)
    rank, d_state = delta_proj_weight.shape[1], A.shape[1]
    u = causal_conv1d(x, conv1d_weight.squeeze(1), conv1d_bias, activation="silu")
    made = F.linear(u.transpose(1, 2), x_proj_weight)
    delta = _normed(F.linear(made[..., :rank], delta_proj_weight), dt_rms_weight, b_c_dt_rms_eps)
    if B is None:
        B = _with_bias(made[..., rank : rank + d_state], B_proj_bias)
        B = _normed(B, b_rms_weight, b_c_dt_rms_eps).transpose(1, 2)
    if C is None:
        C = _with_bias(made[..., -d_state:], C_proj_bias)
        C = _normed(C, c_rms_weight, b_c_dt_rms_eps).transpose(1, 2)
    y = selective_scan(u, delta.transpose(1, 2), A, B, C, D, z, delta_bias, delta_softplus)
    return F.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


def _with_bias(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias.to(x.dtype)


def _normed(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return x if weight is None else F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)
