"""Multi-head attention on the block-sparse op."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore.masks import IntervalMask, TreeMask
from arcore.nn.cache import KVCache
from arcore.nn.kinds import Tokens, check_kinds
from arcore.nn.linear import linear
from arcore.ops import block_sparse_attention


@check_kinds
class SelfAttention(nn.Module):
    """Self-attention under a mask, with an optional cache.

    Queries and values have a bias and keys have none: a key bias shifts all logits of a row alike and drops out of
    the softmax.

    Args:
        dim: width C.
        num_heads: heads H, a divisor of C.
        l2_norm: scale queries and keys to unit length and learn one temperature per head (cosine attention). Without
            it logits are scaled by `scale`.
        scale: factor on the logits without `l2_norm`; 1 / sqrt(head_dim) when None.

    Raises:
        ValueError: `dim` does not split into such heads.
    """

    # exp(4.6) = 100: keeps a head from turning into an argmax, whose gradient vanishes.
    MAX_LOG_SCALE = math.log(100.0)

    def __init__(
        self, dim: int, num_heads: int, *, l2_norm: bool = False, scale: float | None = None
    ) -> None:
        super().__init__()
        check_heads("SelfAttention", dim, num_heads)
        self.num_heads = num_heads
        self.scale = scale
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.log_scale = nn.Parameter(torch.full((1, num_heads, 1, 1), math.log(4.0))) if l2_norm else None
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x: Tokens, mask: IntervalMask | TreeMask, cache: KVCache | None = None, layer: int = 0
    ) -> Tensor:
        """Attend.

        Args:
            x: `[B, N, C]`.
            mask: N queries; N keys, or with a cache `cache.length + N`.
            cache: earlier keys and values; receives those of x.
            layer: which layer of the cache is ours.

        Returns:
            `[B, N, C]`.
        """
        batch, length, dim = x.shape
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = linear(x, self.qkv.weight, bias)
        # A transposed view: the op takes any strides, so no copy is made here or of its output.
        q, k, v = (
            qkv.unflatten(2, (3, self.num_heads, dim // self.num_heads)).transpose(1, 3).unbind(2)
        )  # [B, H, N, D]
        scale = self.scale
        if self.log_scale is not None:
            temperature = self.log_scale.clamp(max=self.MAX_LOG_SCALE).exp()
            q = F.normalize(q, dim=-1) * temperature.to(q.dtype)
            k = F.normalize(k, dim=-1)
            scale = 1.0
        if cache is not None:
            k, v = cache.append(layer, k, v)
        out = block_sparse_attention(q, k, v, mask, scale=scale)  # [B, H, N, D]
        mixed: Tensor = self.proj(out.transpose(1, 2).reshape(batch, length, dim))
        return mixed


@check_kinds
class CrossAttention(nn.Module):
    """Attention of queries to a context under an `IntervalMask`; all projections have a bias.

    Args:
        dim: width C of queries and context.
        num_heads: heads H, a divisor of C.

    Raises:
        ValueError: `dim` does not split into such heads.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        check_heads("CrossAttention", dim, num_heads)
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tokens, context: Tokens, mask: IntervalMask) -> Tensor:
        """Attend.

        Args:
            x: `[B, Nq, C]`.
            context: `[B, Nk, C]`.
            mask: for Nq queries and Nk keys.

        Returns:
            `[B, Nq, C]`.
        """
        batch, length, dim = x.shape
        head_dim = dim // self.num_heads
        q = self.q(x).unflatten(2, (self.num_heads, head_dim)).transpose(1, 2)  # [B, H, Nq, D]
        kv = self.kv(context).unflatten(2, (2, self.num_heads, head_dim))
        k, v = kv.transpose(1, 3).unbind(2)  # [B, H, Nk, D]
        out = block_sparse_attention(q, k, v, mask)
        mixed: Tensor = self.proj(out.transpose(1, 2).reshape(batch, length, dim))
        return mixed


@check_kinds
def check_heads(module: str, dim: int, num_heads: int) -> None:
    """Raise ValueError unless `dim` splits into heads."""
    if num_heads < 1 or dim < 1 or dim % num_heads:
        raise ValueError(
            f"arcore.nn.{module}: expected dim to be a multiple of num_heads but got dim={dim} and "
            f"num_heads={num_heads}"
        )
