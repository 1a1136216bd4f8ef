"""DINOv2's vision transformer (arXiv:2304.07193), as far as ControlAR uses it; parameter names are transformers'."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH = 14
# Patches of a side at which positions were learned: 518 pixels.
GRID = 37
EPS = 1e-6


class Attention(nn.Module):
    """Bidirectional self-attention."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention = nn.ModuleDict({name: nn.Linear(dim, dim) for name in ("query", "key", "value")})
        self.output = nn.ModuleDict({"dense": nn.Linear(dim, dim)})

    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, C]` to `[B, N, C]`."""
        q, k, v = (
            self.attention[name](x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.output["dense"](mixed.transpose(1, 2).flatten(2))
        return out


class Scale(nn.Module):
    """A factor per channel, small at first (LayerScale)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.lambda1


class Block(nn.Module):
    """Pre-norm layer with scales."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=EPS), nn.LayerNorm(dim, eps=EPS)
        self.attention = Attention(dim, num_heads)
        self.layer_scale1, self.layer_scale2 = Scale(dim), Scale(dim)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layer_scale1(self.attention(self.norm1(x)))
        out: Tensor = x + self.layer_scale2(self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x)))))
        return out


class Dinov2(nn.Module):
    """Images to a vector per patch of 14 pixels.

    Args:
        dim: width.
        num_layers: layers.
        num_heads: heads.
        grid: patches of a side at which positions were learned.
    """

    def __init__(self, dim: int, num_layers: int, num_heads: int, grid: int = GRID) -> None:
        super().__init__()
        self.grid = grid
        self.embeddings = nn.Module()
        self.embeddings.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        # Stands in the files for training with masked patches.
        self.embeddings.register_buffer("mask_token", torch.zeros(1, dim))
        self.embeddings.position_embeddings = nn.Parameter(torch.zeros(1, 1 + grid**2, dim))
        self.embeddings.patch_embeddings = nn.Module()
        self.embeddings.patch_embeddings.projection = nn.Conv2d(3, dim, PATCH, stride=PATCH)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(Block(dim, num_heads) for _ in range(num_layers))
        self.layernorm = nn.LayerNorm(dim, eps=EPS)
        if not self.embeddings.cls_token.is_meta:
            for parameter in (self.embeddings.cls_token, self.embeddings.position_embeddings):
                nn.init.normal_(parameter, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        """`[B, 3, H, W]`, sides multiples of 14, to `[B, H / 14 * W / 14, C]`."""
        x = self.embeddings.patch_embeddings.projection(images)  # type: ignore[operator, union-attr]
        rows, columns = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)
        first = self.embeddings.cls_token.expand(len(x), -1, -1)  # type: ignore[operator, union-attr]
        x = torch.cat([first, x], dim=1) + self._positions(rows, columns)
        for layer in self.encoder.layer:  # type: ignore[union-attr]
            x = layer(x)
        out: Tensor = self.layernorm(x)[:, 1:]
        return out

    def _positions(self, rows: int, columns: int) -> Tensor:
        table: Tensor = self.embeddings.position_embeddings  # type: ignore[assignment]
        if (rows, columns) == (self.grid, self.grid):
            return table
        square = table[:, 1:].unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        resized = F.interpolate(square.float(), size=(rows, columns), mode="bicubic", align_corners=False).to(
            table.dtype
        )
        return torch.cat([table[:, :1], resized.flatten(2).transpose(1, 2)], dim=1)
