"""Infinity: what its blocks are made of, and what they read of a text."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore.masks import IntervalMask
from arcore.nn import MLP, DropPath, KVCache, ModulationTable
from arcore.nn.adaln import EPS, modulated_norm
from arcore.nn.attention import SelfAttention
from arcore.nn.checks import check_ids
from arcore.nn.linear import linear
from arcore.ops import block_sparse_attention
from arcore.zoo.next_scale.infinity.config import InfinityConfig


class Angles(NamedTuple):
    """Cosines and sines of N tokens, `[N, D / 2]`: pair i of a head's channels is 2i and 2i + 1."""

    cos: Tensor
    sin: Tensor

    def turn(self, x: Tensor) -> Tensor:
        """Turn queries or keys `[..., N, D]`."""
        one, two = x.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        return torch.stack([one * cos - two * sin, one * sin + two * cos], -1).flatten(-2)


def grid_angles(patch_nums: tuple[int, ...], grid: int, head_dim: int) -> Angles:
    """Angles of the tokens of all scales: the first half of the pairs turns by the row, the second by the column.

    A token of scale k counts as standing at round(i grid / p_k) of the finest grid.
    """
    half = head_dim // 2
    rates = 10000.0 ** -(torch.arange(0, half, 2, device="cpu") / half)
    rows, columns = [], []
    for side in patch_nums:
        places = (torch.arange(side, device="cpu") * (grid / side)).round()
        rows.append(places.repeat_interleave(side))
        columns.append(places.repeat(side))
    angles = torch.cat([torch.cat(axis)[:, None] * rates for axis in (rows, columns)], 1)
    return Angles(angles.cos(), angles.sin())


class CrossAttention(nn.Module):
    """Attention to a text; keys have no bias.

    Args:
        dim: width C of queries and result.
        kv_dim: width of the text's vectors.
        num_heads: heads.
        pool: one learned query in place of given ones.
    """

    def __init__(self, dim: int, kv_dim: int, num_heads: int, *, pool: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.empty(1, num_heads, dim // num_heads)) if pool else None
        self.q = None if pool else nn.Linear(dim, dim)
        self.kv = nn.Linear(kv_dim, 2 * dim, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def keys(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, H, T, D]` of a text `[B, T, kv_dim]`."""
        return keys_of(context, self.kv, self.v_bias, self.num_heads)

    def forward(self, x: Tensor | None, keys: tuple[Tensor, Tensor], mask: IntervalMask) -> Tensor:
        """Attend from x `[B, N, C]`, or from the learned query, under a mask of N queries and T keys."""
        if self.q is None:
            assert self.query is not None
            q = self.query.unsqueeze(2).expand(len(keys[0]), -1, -1, -1).to(keys[0].dtype)
        else:
            q = self.q(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        out = block_sparse_attention(q, *keys, mask)
        mixed: Tensor = self.proj(out.transpose(1, 2).flatten(2))
        return mixed


def keys_of(context: Tensor, layer: nn.Linear, v_bias: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Keys without and values with a bias, `[B, H, T, D]`."""
    kv = linear(context, layer.weight, torch.cat([torch.zeros_like(v_bias), v_bias]))
    k, v = kv.unflatten(2, (2, num_heads, -1)).transpose(1, 3).unbind(2)
    return k, v


class CosineAttention(SelfAttention):
    """Cosine attention whose queries and keys turn with the token's place."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(dim, num_heads, l2_norm=True)

    def project(self, x: Tensor, angles: Angles) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `[B, H, N, D]` of tokens `[B, N, C]`."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = linear(x, self.qkv.weight, bias)
        q, k, v = qkv.unflatten(2, (3, self.num_heads, -1)).transpose(1, 3).unbind(2)
        assert self.log_scale is not None
        q = F.normalize(q, dim=-1) * self.log_scale.clamp(max=self.MAX_LOG_SCALE).exp().to(q.dtype)
        return angles.turn(q), angles.turn(F.normalize(k, dim=-1)), v


class Told(NamedTuple):
    """What a batch of texts is to the blocks; computed once and used at every scale.

    Attributes:
        pooled: `[B, C]`.
        modulation: `[B, 1, 6, C]`, shared by the blocks.
        keys: of each block, keys and values of what cross-attention reads.
        lengths: int64 `[B]`, how many of them count.
        content: of each block, keys and values of a second attention of the image tokens, or None.
        front: a token `[B, 1, C]` before that of the first scale, or None.
    """

    pooled: Tensor
    modulation: Tensor
    keys: list[tuple[Tensor, Tensor]]
    lengths: Tensor
    content: list[tuple[Tensor, Tensor]] | None = None
    front: Tensor | None = None

    def mask(self, queries: int) -> IntervalMask:
        """Each of `queries` rows may read the text up to its end."""
        keys = self.keys[0][0].shape[2]
        check_ids("lengths", self.lengths, keys + 1)
        stop = self.lengths.to(torch.int32).view(-1, 1, 1, 1).expand(-1, 1, queries, 1)
        return IntervalMask.trusted(torch.cat([torch.zeros_like(stop), stop], -1).contiguous(), keys)


class InfinityBlock(nn.Module):
    """Self-attention, attention to the text, feed-forward network; the first and last are modulated and gated.

    Args:
        config: settings.
        drop_path: rate of stochastic depth.
    """

    def __init__(self, config: InfinityConfig, drop_path: float) -> None:
        super().__init__()
        dim = config.embed_dim
        self.attn = CosineAttention(dim, config.num_heads)
        self.cross_norm = nn.LayerNorm(dim, eps=EPS)
        self.cross = CrossAttention(dim, dim, config.num_heads)
        self.ffn = MLP(dim, config.mlp_dim)
        self.modulation = ModulationTable(dim, parts=6)
        self.drop_path = DropPath(drop_path)

    def attend(
        self,
        x: Tensor,
        angles: Angles,
        mask: IntervalMask,
        cache: KVCache | None,
        layer: int,
        told: Told,
    ) -> Tensor:
        """Self-attention of modulated tokens `[B, N, C]`."""
        q, k, v = self.attn.project(x, angles)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        out = block_sparse_attention(q, k, v, mask, scale=1.0).transpose(1, 2).flatten(2)
        mixed: Tensor = self.attn.proj(self.joined(out, q, told, layer))
        return mixed

    def joined(self, out: Tensor, q: Tensor, told: Told, layer: int) -> Tensor:
        """What self-attention found, `[B, N, C]`, and what a model that reads more adds, given the queries."""
        return out

    def forward(
        self,
        x: Tensor,
        told: Told,
        angles: Angles,
        mask: IntervalMask,
        cache: KVCache | None,
        layer: int,
    ) -> Tensor:
        """`[B, N, C]` to `[B, N, C]`."""
        gate1, gate2, scale1, scale2, shift1, shift2 = self.modulation(told.modulation)
        attended = self.attend(modulated_norm(x, scale1, shift1), angles, mask, cache, layer, told)
        x = x + self.drop_path(gate1 * attended)
        x = x + self.cross(self.cross_norm(x), told.keys[layer], told.mask(x.shape[1]))
        out: Tensor = x + self.drop_path(gate2 * self.ffn(modulated_norm(x, scale2, shift2)))
        return out
