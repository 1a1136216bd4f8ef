"""Root-mean-square norms."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore.nn.kinds import Features, Size, check_kinds


@check_kinds
class RMSNorm(nn.Module):
    """Divides by the root mean square of the last axis and scales (arXiv:1910.07467).

    Computed in float32 whatever comes in; the result has the dtype of the weight, so that a residual stream kept in
    float32 can feed layers of lower precision.

    Args:
        dim: width C.
        eps: added to the mean square.
    """

    def __init__(self, dim: Size, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Features) -> Tensor:
        """`[..., C]` to `[..., C]`."""
        if x.dtype == self.weight.dtype == torch.float32:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.rms_norm(x.float(), self.weight.shape, None, self.eps).to(self.weight.dtype) * self.weight


@check_kinds
class GatedRMSNorm(RMSNorm):
    """`RMSNorm` of `x * silu(gate)`, separately in groups of channels (Mamba-2, arXiv:2405.21060, section 7.1).

    Args:
        dim: width C.
        groups: C / groups consecutive channels share one mean square.
        eps: added to the mean square.
        before_gate: the norm of `x` alone, times `silu(gate)`.

    Raises:
        ValueError: `groups` does not divide `dim`.
    """

    def __init__(self, dim: Size, *, groups: int = 1, eps: float = 1e-5, before_gate: bool = False) -> None:
        super().__init__(dim, eps=eps)
        self.before_gate = before_gate
        if groups < 1 or dim % groups:
            raise ValueError(
                f"arcore.nn.GatedRMSNorm: expected groups to divide dim={dim} but got groups={groups}"
            )
        self.groups = groups

    def forward(self, x: Features, gate: Tensor | None = None) -> Tensor:
        """`x` and `gate` `[..., C]` to `[..., C]`."""
        x = x.float()
        if gate is not None and not self.before_gate:
            x = x * F.silu(gate.float())
        split = x.unflatten(-1, (self.groups, -1))
        normed = F.rms_norm(split, split.shape[-1:], None, self.eps).flatten(-2)
        if gate is not None and self.before_gate:
            normed = normed * F.silu(gate.float())
        return normed.to(self.weight.dtype) * self.weight
