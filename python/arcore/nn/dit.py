"""Parts of diffusion transformers: blocks whose layer norms are modulated per group of tokens (DiT, arXiv:2212.09748).

Tokens come in groups of one size, each with its own condition: an image is one group, in a video each frame may have
its own time. Leading tokens may be *passive*: context that passes the same weights without shift, scale or gate.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore.masks import IntervalMask
from arcore.nn.adaln import EPS, Modulation
from arcore.nn.attention import check_heads
from arcore.nn.cache import KVCache
from arcore.nn.kinds import Axes, Features, Size, Tokens, check_kinds, explain_kinds
from arcore.nn.mlp import MLP
from arcore.nn.norm import RMSNorm
from arcore.nn.rope import Rope
from arcore.ops import block_sparse_attention


@check_kinds
class TimestepEmbedding(nn.Module):
    """Times as sines and cosines, then two linear layers.

    Args:
        dim: width C.
        frequencies: width of the sine-cosine code, cosines first, even.
        max_period: longest wavelength over 2 pi.
    """

    def __init__(self, dim: Size, *, frequencies: Size = 256, max_period: float = 10000.0) -> None:
        super().__init__()
        self.frequencies, self.max_period = frequencies, max_period
        self.fc1 = nn.Linear(frequencies, dim)
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, t: Tensor) -> Tensor:
        """Times `[...]`, integer or float, to `[..., C]`; the waves are computed in float32."""
        half = self.frequencies // 2
        rates = torch.exp(
            torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(self.max_period) / half)
        )
        angles = t.float().unsqueeze(-1) * rates
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.fc1.weight.dtype)
        out: Tensor = self.fc2(F.silu(self.fc1(waves)))
        return out


@explain_kinds
def modulate(x: Tokens, shift: Tokens, scale: Tokens, skip: int = 0) -> Tensor:
    """`x * (1 + scale) + shift`, group by group.

    Args:
        x: `[B, skip + G * n, C]`.
        shift, scale: `[B, G, 1, C]`.
        skip: leading tokens that stay as they are.
    """
    if skip:
        return torch.cat([x[:, :skip], modulate(x[:, skip:], shift, scale)], dim=1)
    groups = x.unflatten(1, (shift.shape[1], -1))
    return torch.addcmul(shift.to(x.dtype), groups, 1 + scale.to(x.dtype)).flatten(1, 2)


@explain_kinds
def gated(x: Tokens, gate: Tokens, branch: Tokens, skip: int = 0) -> Tensor:
    """`x + gate * branch`, group by group, with gate 1 for leading tokens; shapes as for `modulate`."""
    if skip:
        first = x[:, :skip] + branch[:, :skip]
        return torch.cat([first, gated(x[:, skip:], gate, branch[:, skip:])], dim=1)
    shape = (gate.shape[1], -1)
    return torch.addcmul(x.unflatten(1, shape), gate.to(x.dtype), branch.unflatten(1, shape)).flatten(1, 2)


@check_kinds
class DiTAttention(nn.Module):
    """Self-attention with biases, optional norms of queries and keys, rotary positions and a cache.

    Args:
        dim: width C.
        num_heads: heads H, a divisor of C.
        qk_norm: root-mean-square norm of each head's queries and keys.

    Raises:
        ValueError: `dim` does not split into such heads.
    """

    def __init__(self, dim: Size, num_heads: int, *, qk_norm: bool = False) -> None:
        super().__init__()
        check_heads("DiTAttention", dim, num_heads)
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = RMSNorm(dim // num_heads, eps=EPS) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(dim // num_heads, eps=EPS) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: Tokens,
        mask: IntervalMask,
        rope: Rope | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
        commit: bool = False,
    ) -> Tensor:
        """Attend.

        Args:
            x: `[B, N, C]`.
            mask: N queries; N keys, or with a cache `cache.length + N`.
            rope: angles of the N tokens.
            cache: earlier keys and values.
            layer: which layer of the cache is ours.
            commit: add the tokens to the cache; else it is only read.

        Returns:
            `[B, N, C]`.
        """
        batch, length, dim = x.shape
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).transpose(1, 3).unbind(2)  # [B, H, N, D]
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rope.apply(q), rope.apply(k)
        if cache is not None:
            k, v = cache.append(layer, k, v) if commit else cache.stage(layer, k, v)
            q = q.to(k.dtype)
        out = block_sparse_attention(q, k, v, mask)  # [B, H, N, D]
        mixed: Tensor = self.proj(out.transpose(1, 2).reshape(batch, length, dim).to(x.dtype))
        return mixed


@check_kinds
class DiTBlock(nn.Module):
    """Pre-norm transformer block, modulated and gated by a condition per group (adaLN-Zero).

    `x += gate1 * Attn(norm1(x) (1 + scale1) + shift1)`, then `x += gate2 * MLP(norm2(x) (1 + scale2) + shift2)`. One
    linear map of the condition gives shift1, scale1, gate1, shift2, scale2, gate2.

    Args:
        dim: width C, of tokens and conditions.
        num_heads: heads H.
        hidden_dim: width of the MLP's hidden layer.
        norm: `"layer"` without weights, or `"rms"` with a learned scale.
        qk_norm: see `DiTAttention`.
        residual_from_normed: add each branch to the normed tokens instead of to the tokens,
            `x = norm1(x) + gate1 * Attn(norm1(x) (1 + scale1) + shift1)`, and so for the MLP. The released code of
            AR-Diffusion does; the residual stream then starts anew in every branch.
    """

    def __init__(
        self,
        dim: Size,
        num_heads: int,
        hidden_dim: Size,
        *,
        norm: Literal["layer", "rms"] = "layer",
        qk_norm: bool = False,
        residual_from_normed: bool = False,
    ) -> None:
        super().__init__()
        self.residual_from_normed = residual_from_normed
        self.norm1, self.norm2 = _norm(norm, dim), _norm(norm, dim)
        self.attn = DiTAttention(dim, num_heads, qk_norm=qk_norm)
        self.mlp = MLP(dim, hidden_dim)
        self.modulation = Modulation(dim, dim, parts=6)

    def forward(
        self,
        x: Tokens,
        cond: Annotated[Tensor, Axes("B G C", floating=True)] | None,
        mask: IntervalMask,
        *,
        passive: int = 0,
        rope: Rope | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
        commit: bool = False,
    ) -> Tensor:
        """Apply the block.

        Args:
            x: `[B, passive + G * n, C]`, in groups of n tokens.
            cond: `[B, G, C]`; None when all tokens are passive.
            mask, rope, cache, layer, commit: see `DiTAttention.forward`.
            passive: leading tokens without modulation.

        Returns:
            Like x.
        """
        if cond is None:
            normed = self.norm1(x)
            attended = self.attn(normed, mask, rope, cache, layer, commit)
            x = (normed if self.residual_from_normed else x) + attended
            normed = self.norm2(x)
            out: Tensor = (normed if self.residual_from_normed else x) + self.mlp(normed)
            return out
        vectors = self.modulation(cond)  # each [B, G, 1, C]
        groups, rest = divmod(passive, (x.shape[1] - passive) // cond.shape[1])
        if rest == 0:
            # Whole groups of passive tokens get vectors that do nothing, shift and scale 0 and gate 1: no token is
            # copied to be left out.
            vectors = tuple(
                F.pad(part, (0, 0, 0, 0, groups, 0), value=float(place % 3 == 2)) if groups else part
                for place, part in enumerate(vectors)
            )
        skip = passive if rest else 0
        shift1, scale1, gate1, shift2, scale2, gate2 = vectors
        normed = self.norm1(x)
        attended = self.attn(modulate(normed, shift1, scale1, skip), mask, rope, cache, layer, commit)
        x = gated(normed if self.residual_from_normed else x, gate1, attended, skip)
        normed = self.norm2(x)
        fed = self.mlp(modulate(normed, shift2, scale2, skip))
        return gated(normed if self.residual_from_normed else x, gate2, fed, skip)


@check_kinds
class DiTHead(nn.Module):
    """Modulated norm and the last linear layer, in float32 also under autocast.

    Args:
        dim: width C.
        out_dim: outputs per token.
        norm: see `DiTBlock`.
    """

    def __init__(self, dim: Size, out_dim: Size, *, norm: Literal["layer", "rms"] = "layer") -> None:
        super().__init__()
        self.norm = _norm(norm, dim)
        self.modulation = Modulation(dim, dim, parts=2)
        self.linear = nn.Linear(dim, out_dim)

    def forward(self, x: Features, cond: Features) -> Tensor:
        """`[B, G * n, C]` and `[B, G, C]` to float32 `[B, G * n, out_dim]`."""
        with torch.autocast(x.device.type, enabled=False):
            dtype = self.linear.weight.dtype
            shift, scale = self.modulation(cond.to(dtype))
            out: Tensor = self.linear(modulate(self.norm(x.to(dtype)), shift, scale))
        return out.float()


@torch.no_grad()
@check_kinds
def init_dit(module: nn.Module) -> None:
    """Initial weights of a diffusion transformer: every block is the identity and the output is zero.

    Linear layers are Xavier-uniform without bias, time and class embeddings are normal with deviation 0.02, and
    modulations and the last layer are zero.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                part.bias.zero_()
    for part in module.modules():
        if isinstance(part, TimestepEmbedding):
            nn.init.normal_(part.fc1.weight, std=0.02)
            nn.init.normal_(part.fc2.weight, std=0.02)
        elif isinstance(part, DiTHead | Modulation):
            part.linear.weight.zero_()


def _norm(kind: Literal["layer", "rms"], dim: Size) -> nn.Module:
    if kind == "rms":
        return RMSNorm(dim, eps=EPS)
    return nn.LayerNorm(dim, eps=EPS, elementwise_affine=False)


OFFICIAL_NAMES = (
    (r"^x_embedder\.", "embed."),
    (r"^t_embedder\.mlp\.0\.", "time_embed.fc1."),
    (r"^t_embedder\.mlp\.2\.", "time_embed.fc2."),
    (r"^y_embedder\.embedding_table\.", "class_embed."),
    (r"^final_layer\.norm_final\.", "head.norm."),
    (r"^final_layer\.", "head."),
    (r"\.adaLN_modulation\.1\.", ".modulation.linear."),
)


@check_kinds
def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published names of DiT and of models that follow it, in ours."""
    ours = {}
    for key, value in state.items():
        for pattern, name in OFFICIAL_NAMES:
            key = re.sub(pattern, name, key)
        ours[key] = value
    return ours
