"""Linear layers for inference on a CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# oneDNN's product with a weight as it lies in memory. On processors that MKL does not favour it takes less time than
# MKL, which torch uses for float32: about half for some rows and a vocabulary, a fifth less for many rows.
_onednn: Any = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
)
# Below this many multiplications, what oneDNN spends on a call counts.
MIN_PRODUCTS = 2**23


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, through oneDNN where that is faster: float32 on a CPU, without gradients.

    Args:
        x: `[..., K]`.
        weight: `[M, K]`.
        bias: `[M]`.

    Returns:
        `[..., M]`.
    """
    if (
        _onednn is None
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
        or not x.is_cpu
        or not x.dtype == weight.dtype == torch.float32
        or x.numel() * weight.shape[0] < MIN_PRODUCTS
    ):
        return F.linear(x, weight, bias)
    out: Tensor = _onednn(x, weight, bias, "none", [], "")
    return out


class Linear(nn.Linear):
    """`torch.nn.Linear` on `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """`[..., K]` to `[..., M]`."""
        return linear(input, self.weight, self.bias)
