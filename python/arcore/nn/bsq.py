"""Binary spherical quantisation: a unit vector becomes one bit per channel (Zhao et al., arXiv:2406.07548)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore.nn.checks import check_ids
from arcore.nn.kinds import check_kinds, explain_kinds


class Quantised(NamedTuple):
    """What `BinarySphericalQuantizer` returns.

    Attributes:
        codes: `[..., n]`, +-1 / sqrt(n), with the gradient of the normalised input (straight through).
        loss: scalar.
    """

    codes: Tensor
    loss: Tensor


@check_kinds
class BinarySphericalQuantizer(nn.Module):
    """Signs of the channels of a normalised vector, with the losses that keep them certain and all codes in use.

    `loss = beta * |codes - z|^2 + zeta * (gamma0 * H(bits of a sample) - gamma * H(codes over the batch))`, where the
    second entropy is summed over groups of channels.

    Args:
        bits: channels n.
        group: channels of a group, a divisor of n.
        beta: weight of the commitment.
        gamma0: weight of the entropy per sample, which is to fall.
        gamma: weight of the entropy over the batch, which is to rise.
        zeta: weight of both entropies.
        sharpness: factor on the channels where entropies are taken (an inverse temperature).

    Raises:
        ValueError: `group` does not divide `bits`.
    """

    def __init__(
        self,
        bits: int,
        *,
        group: int = 4,
        beta: float = 0.05,
        gamma0: float = 1.0,
        gamma: float = 1.1,
        zeta: float = 0.05,
        sharpness: float = 1.0,
    ) -> None:
        super().__init__()
        if bits < 1 or group < 1 or bits % group:
            raise ValueError(
                f"arcore.nn.BinarySphericalQuantizer: expected group to divide bits={bits} but got {group}"
            )
        self.bits, self.group = bits, group
        self.beta, self.gamma0, self.gamma, self.zeta = beta, gamma0, gamma, zeta
        self.sharpness = sharpness

    @explain_kinds
    def codes(self, z: Tensor) -> Tensor:
        """Codes `[..., n]` of vectors `[..., n]`, without gradient; 0 counts as negative."""
        signs: Tensor = torch.where(z > 0, 1.0, -1.0).to(z.dtype)
        return signs / math.sqrt(self.bits)

    def forward(self, z: Tensor) -> Quantised:
        """Quantise vectors `[..., n]` of any length."""
        z = F.normalize(z, dim=-1)
        codes = self.codes(z.detach())
        commit = self.beta * (codes - z).square().sum(-1).mean()
        p = torch.sigmoid(4 * self.sharpness * z / self.bits**0.5)
        certain = (_entropy(p) + _entropy(1 - p)).sum(-1).mean()
        corners = bits_of(torch.arange(2**self.group, device=z.device), self.group).to(z.dtype) * 2 - 1
        parts = z.unflatten(-1, (-1, self.group))
        shares = (2 * self.sharpness * parts @ corners.T / self.bits**0.5).softmax(-1).flatten(0, -3).mean(0)
        spread = _entropy(shares).sum()
        loss = commit + self.zeta * (self.gamma0 * certain - self.gamma * spread)
        return Quantised(z + (codes - z).detach(), loss)


@check_kinds
def bits_of(index: Tensor, bits: int) -> Tensor:
    """Bits of whole numbers, the lowest first: int64 `[...]` to bool `[..., bits]`."""
    check_ids("index", index, 2**bits)
    return (index.unsqueeze(-1) >> torch.arange(bits, device=index.device)) % 2 == 1


@check_kinds
def index_of(bits: Tensor) -> Tensor:
    """Whole numbers of bits, the lowest first: bool `[..., n]` to int64 `[...]`."""
    return (bits.long() << torch.arange(bits.shape[-1], device=bits.device)).sum(-1)


def _entropy(p: Tensor) -> Tensor:
    return -p * (p + 1e-8).log()
