"""Layers of GLM and of xTrimoPGLM; names are those of the published weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore.masks import IntervalMask
from arcore.nn import Rope, TokenCache, attend


class Attention(nn.Module):
    """Self-attention with biases; names are those of the published weights."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.dense = nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, mask: IntervalMask, rope: Rope | None, cache: TokenCache | None, layer: int
    ) -> Tensor:
        """`[B, N, C]` to `[B, N, C]`."""
        heads = self.query_key_value(x).unflatten(2, (3, self.num_heads, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, N, D]
        if rope is not None:
            q, k = rope.apply(q), rope.apply(k)
        if cache is not None:
            k, v = cache.stage(layer, k, v)
        out: Tensor = self.dense(attend(q, k, v, mask).transpose(1, 2).flatten(2))
        return out


class MLP(nn.Module):
    """Two linear layers with GELU (tanh) between them."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.dense_h_to_4h, self.dense_4h_to_h = nn.Linear(dim, hidden_dim), nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., C]` to `[..., C]`."""
        out: Tensor = self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x), approximate="tanh"))
        return out


class GatedMLP(nn.Module):
    """GEGLU: the first half of the first product, times GELU of the second half."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.dense_h_to_4h, self.dense_4h_to_h = nn.Linear(dim, 2 * hidden_dim), nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., C]` to `[..., C]`."""
        value, gate = self.dense_h_to_4h(x).chunk(2, -1)
        out: Tensor = self.dense_4h_to_h(value * F.gelu(gate))
        return out


class Layer(nn.Module):
    """A pre-norm layer.

    Args:
        attention, mlp: its two parts.
        dim: width C.
    """

    def __init__(self, attention: nn.Module, mlp: nn.Module, dim: int) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention, self.mlp = attention, mlp

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        """`[B, N, C]` to `[B, N, C]`; the other arguments are those of the attention."""
        x = x + self.attention(self.input_layernorm(x), *args)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class DeepNormLayer(Layer):
    """A layer with DeepNorm (Wang et al., arXiv:2203.00555), with the coefficients of GLM-130B, of N layers.

    What comes from the norm goes past each part, `(2 N)^(1/2)` times: a post-norm whose first norm stands in front.
    In the beginning the values, the output of the attention and the MLP are `(2 N)^(-1/2)` times as large.

    Args:
        attention, mlp, dim: see `Layer`.
        layers: N.
    """

    def __init__(self, attention: nn.Module, mlp: nn.Module, dim: int, layers: int) -> None:
        super().__init__(attention, mlp, dim)
        self.alpha, self.beta = (2 * layers) ** 0.5, (2 * layers) ** -0.5

    @torch.no_grad()
    def scale(self) -> None:
        """Scale fresh weights."""
        parts: Any = (self.attention, self.mlp)
        for weight in (
            parts[0].query_key_value.weight[2 * len(parts[0].query_key_value.weight) // 3 :],
            parts[0].dense.weight,
            parts[1].dense_h_to_4h.weight,
            parts[1].dense_4h_to_h.weight,
        ):
            weight.mul_(self.beta)

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        """`[B, N, C]` to `[B, N, C]`; the other arguments are those of the attention."""
        x = self.input_layernorm(x)
        x = self.post_attention_layernorm(self.alpha * x + self.attention(x, *args))
        out: Tensor = self.alpha * x + self.mlp(x)
        return out
