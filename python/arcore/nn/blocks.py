"""Residual blocks around a token mixer and a feed-forward network."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from arcore.nn.adaln import DropPath
from arcore.nn.kinds import Features, Size, check_kinds
from arcore.nn.patches import PatchEmbed


@check_kinds
class PreNormBlock(nn.Module):
    """`x += mixer(norm1(x)); x += mlp(norm2(x))`.

    Args:
        dim: width C.
        mixer: mixes tokens, `[B, N, C]` to `[B, N, C]`; named arguments of `forward` go to it.
        mlp: acts on each token.
        drop_path: rate of stochastic depth.
    """

    def __init__(self, dim: Size, *, mixer: nn.Module, mlp: nn.Module, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Features, **kwargs: Any) -> Tensor:
        """`[B, N, C]` to `[B, N, C]`."""
        x = x + self.drop_path(self.mixer(self.norm1(x), **kwargs))
        out: Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return out


@check_kinds
class PostNormBlock(nn.Module):
    """`x = norm1(x + mixer(x)); x = norm2(x + mlp(x))`, the first transformer's order (arXiv:1706.03762).

    Args:
        dim: width C.
        mixer: mixes tokens, `[B, N, C]` to `[B, N, C]`; named arguments of `forward` go to it.
        mlp: acts on each token.
    """

    def __init__(self, dim: Size, *, mixer: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer
        self.norm1 = nn.LayerNorm(dim)
        self.mlp = mlp
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, x: Features, **kwargs: Any) -> Tensor:
        """`[B, N, C]` to `[B, N, C]`."""
        x = self.norm1(x + self.mixer(x, **kwargs))
        out: Tensor = self.norm2(x + self.mlp(x))
        return out


@torch.no_grad()
@check_kinds
def init_mamba_encoder(patch_embed: PatchEmbed, layers: Iterable[Any]) -> None:
    """Initial weights of an image encoder (ARM, arXiv:2406.07537): projections out of mixers shrink with the depth.

    Args:
        patch_embed: gets weights of variance 1 / inputs.
        layers: `PreNormBlock`s with a `SwiGLU` and a mixer that has `out_proj`; otherwise they stay as they are made.
    """
    linear: Any = patch_embed.proj
    # On the meta device only shapes matter, and random numbers take long.
    if linear.weight.is_meta:
        return
    nn.init.trunc_normal_(linear.weight, std=linear.weight[0].numel() ** -0.5)
    nn.init.zeros_(linear.bias)
    blocks = list(layers)
    for layer in blocks:
        for linear in (layer.mlp.w1, layer.mlp.w2, layer.mlp.w3):
            nn.init.zeros_(linear.bias)
        layer.mixer.out_proj.weight.div_(len(blocks) ** 0.5)
