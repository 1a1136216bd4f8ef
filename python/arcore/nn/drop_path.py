"""Stochastic depth (arXiv:1603.09382): during training a residual branch is skipped for whole samples."""

from __future__ import annotations

from torch import Tensor, nn


class DropPath(nn.Module):
    """Zeroes a sample's branch with probability `rate` and scales the others by ``1 / (1 - rate)``.

    Args:
        rate: probability in [0, 1).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"DropPath: expected rate in [0, 1) but got {rate}")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """``[B, ...]`` to ``[B, ...]``."""
        if self.rate == 0 or not self.training:
            return x
        keep = x.new_empty((x.shape[0], *(1,) * (x.dim() - 1))).bernoulli_(1 - self.rate)
        return x * keep / (1 - self.rate)
