"""Transformer layers of T5's second version: no biases, RMS norms, a gated network, and a bias by relative position
(arXiv:1910.10683, arXiv:2002.05202)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore.masks import IntervalMask
from arcore.nn.kinds import check_kinds
from arcore.nn.norm import RMSNorm


@check_kinds
def relative_buckets(
    distance: Tensor, *, buckets: int = 32, farthest: int = 128, both: bool = True
) -> Tensor:
    """Numbers of buckets for distances key minus query, int64 of any shape.

    Half of a side's buckets are for one distance each; the others grow with the logarithm up to `farthest`, and
    everything beyond is in the last one.

    Args:
        distance: int64.
        buckets: in all.
        farthest: from which on distances are not told apart.
        both: keys behind the query have buckets of their own; else they count as distance 0.
    """
    found = torch.zeros_like(distance)
    if both:
        buckets //= 2
        found += (distance > 0) * buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = buckets // 2
    grown = torch.log(distance.clamp(min=1).float() / exact) / math.log(farthest / exact) * (buckets - exact)
    far = (exact + grown.long()).clamp(max=buckets - 1)
    return found + torch.where(distance < exact, distance, far)


@check_kinds
class RelativeBias(nn.Module):
    """A learned number per head and bucket of distance, added to attention logits.

    Args:
        num_heads: heads H.
        buckets, farthest, both: see `relative_buckets`.
    """

    def __init__(self, num_heads: int, *, buckets: int = 32, farthest: int = 128, both: bool = True) -> None:
        super().__init__()
        self.buckets, self.farthest, self.both = buckets, farthest, both
        self.weight = nn.Parameter(torch.zeros(buckets, num_heads))

    def forward(self, queries: int, keys: int) -> Tensor:
        """`[1, H, queries, keys]`, for queries and keys that both begin at position 0."""
        device = self.weight.device
        distance = torch.arange(keys, device=device) - torch.arange(queries, device=device).unsqueeze(1)
        number = relative_buckets(distance, buckets=self.buckets, farthest=self.farthest, both=self.both)
        return self.weight[number].permute(2, 0, 1).unsqueeze(0)


@check_kinds
class T5Attention(nn.Module):
    """Attention without biases, whose logits are not scaled.

    Args:
        dim: width C.
        num_heads: heads H, a divisor of C.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"expected dim to be a multiple of num_heads but got {dim} and {num_heads}")
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        nn.init.normal_(self.q.weight, std=(dim * dim // num_heads) ** -0.5)
        for part in (self.k, self.v, self.o):
            nn.init.normal_(part.weight, std=dim**-0.5)

    def forward(self, x: Tensor, memory: Tensor, allowed: Tensor, bias: Tensor | None) -> Tensor:
        """Attend from x `[B, N, C]` to memory `[B, M, C]`.

        Args:
            x: asks.
            memory: is read.
            allowed: bool, broadcast to `[B, H, N, M]`.
            bias: like it, added to the logits, or None.
        """
        q, k, v = (
            part(source).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for part, source in ((self.q, x), (self.k, memory), (self.v, memory))
        )
        added = torch.zeros((), device=x.device) if bias is None else bias
        added = torch.where(allowed, added, -torch.inf)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=added.to(q.dtype), scale=1.0)
        mixed: Tensor = self.o(out.transpose(1, 2).flatten(2))
        return mixed


@check_kinds
class T5Layer(nn.Module):
    """Self-attention, attention to an encoder where there is one, and a network gated by GELU.

    Args:
        dim: width C.
        num_heads: heads.
        hidden_dim: width of the gated network.
        cross: there is an encoder to read.
    """

    def __init__(self, dim: int, num_heads: int, hidden_dim: int, *, cross: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(dim, eps=1e-6), RMSNorm(dim, eps=1e-6)
        self.attention = T5Attention(dim, num_heads)
        self.cross = T5Attention(dim, num_heads) if cross else None
        self.cross_norm = RMSNorm(dim, eps=1e-6) if cross else None
        self.gate, self.up = (nn.Linear(dim, hidden_dim, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden_dim, dim, bias=False)
        for part in (self.gate, self.up):
            nn.init.normal_(part.weight, std=dim**-0.5)
        nn.init.normal_(self.down.weight, std=hidden_dim**-0.5)

    def forward(self, x: Tensor, allowed: Tensor, bias: Tensor, memory: Tensor | None = None) -> Tensor:
        """`[B, N, C]` to `[B, N, C]`; memory `[B, M, C]` comes from the encoder."""
        h = self.norm1(x)
        x = x + self.attention(h, h, allowed, bias)
        if self.cross is not None and self.cross_norm is not None:
            if memory is None:
                raise ValueError("this layer reads an encoder: give memory")
            every = torch.ones(x.shape[1], memory.shape[1], dtype=torch.bool, device=x.device)
            x = x + self.cross(self.cross_norm(x), memory, every, None)
        h = self.norm2(x)
        out: Tensor = x + self.down(F.gelu(self.gate(h), approximate="tanh") * self.up(h))
        return out


@check_kinds
class T5Stack(nn.Module):
    """Layers with one table of relative biases, and a norm behind them.

    Args:
        dim: width C.
        num_layers: layers.
        num_heads: heads.
        hidden_dim: width of the gated networks.
        cross: the layers read an encoder.
        both: keys behind the query have biases of their own.
    """

    def __init__(
        self,
        dim: int,
        num_layers: int,
        num_heads: int,
        hidden_dim: int,
        *,
        cross: bool = False,
        both: bool = True,
    ) -> None:
        super().__init__()
        self.bias = RelativeBias(num_heads, both=both)
        self.layers = nn.ModuleList(
            T5Layer(dim, num_heads, hidden_dim, cross=cross) for _ in range(num_layers)
        )
        self.norm = RMSNorm(dim, eps=1e-6)

    def forward(self, x: Tensor, mask: IntervalMask, memory: Tensor | None = None) -> Tensor:
        """`[B, N, C]` under a mask of N queries and N keys to `[B, N, C]`."""
        allowed, bias = mask.to_bool().to(x.device), self.bias(x.shape[1], x.shape[1])
        for layer in self.layers:
            x = layer(x, allowed, bias, memory)
        out: Tensor = self.norm(x)
        return out
