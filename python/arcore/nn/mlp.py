"""Feed-forward networks."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from arcore.nn.kinds import Features, Size, check_kinds


@check_kinds
class MLP(nn.Module):
    """Two linear layers with GELU between them.

    Args:
        dim: width C.
        hidden_dim: width of the hidden layer.
        approximate: `"tanh"`, or `"none"` for the exact GELU.
    """

    def __init__(self, dim: Size, hidden_dim: Size, *, approximate: Literal["tanh", "none"] = "tanh") -> None:
        super().__init__()
        self.approximate = approximate
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Features) -> Tensor:
        """`[..., C]` to `[..., C]`."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))
        return out


@check_kinds
class SwiGLU(nn.Module):
    """Gated feed-forward network `w3(silu(w1 x) * w2 x)` with biases (arXiv:2002.05202).

    Args:
        dim: width C.
        hidden_dim: width of the hidden layer.
    """

    def __init__(self, dim: Size, hidden_dim: Size) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim)
        self.w2 = nn.Linear(dim, hidden_dim)
        self.w3 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Features) -> Tensor:
        """`[..., C]` to `[..., C]`."""
        out: Tensor = self.w3(F.silu(self.w1(x)) * self.w2(x))
        return out
