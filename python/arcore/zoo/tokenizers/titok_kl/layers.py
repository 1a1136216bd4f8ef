"""Transformers from patches to tokens and back, and the convolutions to pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore.zoo.tokenizers.titok_kl.config import TiTokKLConfig


class _Block(nn.Module):
    """Pre-norm transformer block with torch's own attention, whose names the published weights have."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(dim, 4 * dim))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        heads = self.attn.num_heads
        qkv = F.linear(self.ln_1(x), self.attn.in_proj_weight, self.attn.in_proj_bias)
        q, k, v = qkv.view(batch, length, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, dim)
        x = x + self.attn.out_proj(mixed)
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class _Trunk(nn.Module):
    """What encoder and decoder have in common: positions, blocks and norms."""

    def __init__(self, config: TiTokKLConfig) -> None:
        super().__init__()
        dim, scale = config.embed_dim, config.embed_dim**-0.5
        self.class_embedding = nn.Parameter(scale * torch.randn(1, dim))
        self.positional_embedding = nn.Parameter(scale * torch.randn(config.side**2 + 1, dim))
        self.latent_token_positional_embedding = nn.Parameter(scale * torch.randn(config.num_tokens, dim))
        self.ln_pre, self.ln_post = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.transformer = nn.ModuleList(_Block(dim, config.num_heads) for _ in range(config.depth))

    def trunk(self, patches: Tensor, tokens: Tensor) -> Tensor:
        """`[B, G * G, D]` and `[B, K, D]` through the blocks, the class token in front."""
        first = self.class_embedding.expand(len(patches), 1, -1)
        image = torch.cat([first, patches], dim=1) + self.positional_embedding
        x = self.ln_pre(torch.cat([image, tokens + self.latent_token_positional_embedding], dim=1))
        for block in self.transformer:
            x = block(x)
        return x


class TiTokEncoder(_Trunk):
    """Images to two numbers per value of a token."""

    def __init__(self, config: TiTokKLConfig) -> None:
        super().__init__(config)
        dim, patch = config.embed_dim, config.patch_size
        self.patch_embed = nn.Conv2d(config.in_channels, dim, patch, stride=patch)
        self.conv_out = nn.Conv2d(dim, 2 * config.token_dim, 1)

    def forward(self, images: Tensor, queries: Tensor) -> Tensor:
        """`[B, C, H, H]` and `[K, D]` to `[B, 2 c, 1, K]`."""
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        count = len(queries)
        read = self.ln_post(self.trunk(patches, queries.expand(len(images), -1, -1))[:, -count:])
        # Without a transposition, as the released weights were trained.
        out: Tensor = self.conv_out(read.reshape(len(images), -1, count, 1))
        return out.reshape(len(images), -1, 1, count)


class TiTokDecoder(_Trunk):
    """Tokens to logits of soft codes at every patch."""

    def __init__(self, config: TiTokKLConfig) -> None:
        super().__init__(config)
        dim = config.embed_dim
        self.decoder_embed = nn.Linear(config.token_dim, dim)
        self.mask_token = nn.Parameter(dim**-0.5 * torch.randn(1, 1, dim))
        self.ffn = nn.Sequential(
            nn.Conv2d(dim, 2 * dim, 1), nn.Tanh(), nn.Conv2d(2 * dim, config.code_dim, 1)
        )
        self.side = config.side

    def forward(self, latents: Tensor) -> Tensor:
        """`[B, c, 1, K]` to `[B, code_dim, G, G]`."""
        tokens = self.decoder_embed(latents.flatten(2).transpose(1, 2))
        masked = self.mask_token.expand(len(latents), self.side**2, -1)
        x = self.ln_post(self.trunk(masked, tokens)[:, 1 : 1 + self.side**2])
        out: Tensor = self.ffn(x.transpose(1, 2).unflatten(2, (self.side, self.side)))
        return out


class _ResBlock(nn.Module):
    def __init__(self, before: int, after: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, before, eps=1e-6)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, after, eps=1e-6)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.nin_shortcut = None if before == after else nn.Conv2d(after, after, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        out: Tensor = h + (x if self.nin_shortcut is None else self.nin_shortcut(h))
        return out


class _Level(nn.Module):
    def __init__(self, before: int, after: int, blocks: int, groups: int, *, up: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            _ResBlock(before if place == 0 else after, after, groups) for place in range(blocks)
        )
        self.upsample_conv = nn.Conv2d(after, after, 3, padding=1) if up else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        if self.upsample_conv is None:
            return x
        out: Tensor = self.upsample_conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class PixelDecoder(nn.Module):
    """Convolutions from patches to pixels, without attention."""

    def __init__(self, config: TiTokKLConfig) -> None:
        super().__init__()
        widths, groups = [config.channels * mult for mult in config.channel_mult], config.norm_groups
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.latent_dim, widths[-1], 3, padding=1)
        self.mid = nn.ModuleList(
            _ResBlock(widths[-1], widths[-1], groups) for _ in range(config.num_res_blocks)
        )
        self.up = nn.ModuleList(
            _Level(widths[min(level + 1, last)], width, config.num_res_blocks, groups, up=level > 0)
            for level, width in enumerate(widths)
        )
        self.norm_out = nn.GroupNorm(groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], config.in_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, latent_dim, G, G]` to `[B, in_channels, G p, G p]`."""
        x = self.conv_in(x)
        for block in self.mid:
            x = block(x)
        for level in reversed(self.up):
            x = level(x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return out
