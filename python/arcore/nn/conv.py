"""Convolutional encoder and decoder of image tokenizers (the VQGAN autoencoder, arXiv:2012.09841, appendix A).

Names of modules are those of the published checkpoints of this family. Maps are `[B, C, H, W]`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from arcore.nn.kinds import Planes, Size, check_kinds

EPS = 1e-6


@check_kinds
class ResnetBlock(nn.Module):
    """Two 3x3 convolutions, each after a group norm and SiLU, and a residual connection.

    Args:
        in_channels, out_channels: a 1x1 convolution on the residual path joins them where they differ.
        norm_groups: groups of the norms.
    """

    def __init__(self, in_channels: Size, out_channels: int, norm_groups: Size) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_groups, in_channels, eps=EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(norm_groups, out_channels, eps=EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = (
            nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)
        )

    def forward(self, x: Planes) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        out: Tensor = self.nin_shortcut(x) + h
        return out


@check_kinds
class AttnBlock(nn.Module):
    """Single-head attention over all positions, with a residual connection."""

    def __init__(self, channels: Size, norm_groups: Size) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups, channels, eps=EPS)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Planes) -> Tensor:
        qkv = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).unsqueeze(1)  # [B, 1, H*W, 3C]
        h = F.scaled_dot_product_attention(*qkv.chunk(3, dim=-1))
        h = h.squeeze(1).transpose(1, 2).reshape(x.shape)
        out: Tensor = x + self.proj_out(h)
        return out


@check_kinds
class Downsample(nn.Module):
    """Halves the map; pads right and bottom only, as the published weights expect."""

    def __init__(self, channels: Size) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Planes) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


@check_kinds
class Upsample(nn.Module):
    """Doubles the map by repetition, then a 3x3 convolution."""

    def __init__(self, channels: Size) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Planes) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
        return out


@check_kinds
class MidBlock(nn.Module):
    """Residual block, attention unless it is left out, residual block at the lowest resolution."""

    def __init__(self, channels: Size, norm_groups: Size, *, attention: bool = True) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, norm_groups)
        self.attn_1 = AttnBlock(channels, norm_groups) if attention else nn.Identity()
        self.block_2 = ResnetBlock(channels, channels, norm_groups)

    def forward(self, x: Planes) -> Tensor:
        out: Tensor = self.block_2(self.attn_1(self.block_1(x)))
        return out


@check_kinds
class Level(nn.Module):
    """Blocks of one resolution, and the change of resolution after them.

    Args:
        in_channels, out_channels: of the first and of all later blocks.
        num_blocks: residual blocks.
        norm_groups: groups of the norms.
        attention: an `AttnBlock` after each residual block.
        resample: name and module of the change of resolution, or None.
    """

    def __init__(
        self,
        in_channels: Size,
        out_channels: int,
        num_blocks: int,
        norm_groups: Size,
        *,
        attention: bool,
        resample: tuple[str, nn.Module] | None,
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.block = nn.ModuleList(
            ResnetBlock(before, out_channels, norm_groups) for before in widths[:num_blocks]
        )
        self.attn = nn.ModuleList(
            AttnBlock(out_channels, norm_groups) for _ in range(num_blocks if attention else 0)
        )
        self._resample = None if resample is None else resample[0]
        if resample is not None:
            self.add_module(*resample)

    def forward(self, x: Planes) -> Tensor:
        for j, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[j](x)
        return x if self._resample is None else getattr(self, self._resample)(x)


@check_kinds
class ConvEncoder(nn.Module):
    """Image to latent map. Each level but the last halves the resolution.

    Args:
        in_channels: of the image.
        channels: width of the first level.
        channel_mult: width of each level as a multiple of `channels`.
        num_res_blocks: residual blocks per level.
        z_channels: width of the latent.
        norm_groups: groups of the group norms; divides all widths.
        attention: an `AttnBlock` after each residual block of the coarsest level, besides that in the middle.
        mid_attention: one in the middle.
    """

    def __init__(
        self,
        in_channels: Size,
        channels: Size,
        channel_mult: Sequence[int],
        num_res_blocks: int,
        z_channels: Size,
        norm_groups: Size = 32,
        *,
        attention: bool = True,
        mid_attention: bool = True,
    ) -> None:
        super().__init__()
        widths = [channels * mult for mult in channel_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.down = nn.ModuleList(
            Level(
                before,
                width,
                num_res_blocks,
                norm_groups,
                attention=attention and level == last,
                resample=None if level == last else ("downsample", Downsample(width)),
            )
            for level, (before, width) in enumerate(zip([channels, *widths], widths, strict=False))
        )
        self.mid = MidBlock(widths[-1], norm_groups, attention=mid_attention)
        self.norm_out = nn.GroupNorm(norm_groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 3, padding=1)

    def forward(self, x: Planes) -> Tensor:
        """`[B, in_channels, H, W]` to `[B, z_channels, H / 2**(levels - 1), W / 2**(levels - 1)]`."""
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        out: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(h))))
        return out


@check_kinds
class ConvDecoder(nn.Module):
    """Latent map to image; the mirror of `ConvEncoder` with one more residual block per level.

    Args: those of `ConvEncoder`; `in_channels` are the image's.
    """

    def __init__(
        self,
        in_channels: Size,
        channels: Size,
        channel_mult: Sequence[int],
        num_res_blocks: int,
        z_channels: Size,
        norm_groups: Size = 32,
        *,
        attention: bool = True,
        mid_attention: bool = True,
    ) -> None:
        super().__init__()
        widths = [channels * mult for mult in channel_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = MidBlock(widths[-1], norm_groups, attention=mid_attention)
        # Listed by resolution, fine to coarse, and applied in reverse.
        self.up = nn.ModuleList(
            Level(
                widths[min(level + 1, last)],
                width,
                num_res_blocks + 1,
                norm_groups,
                attention=attention and level == last,
                resample=None if level == 0 else ("upsample", Upsample(width)),
            )
            for level, width in enumerate(widths)
        )
        self.norm_out = nn.GroupNorm(norm_groups, widths[0], eps=EPS)
        self.conv_out = nn.Conv2d(widths[0], in_channels, 3, padding=1)

    def forward(self, z: Planes) -> Tensor:
        """`[B, z_channels, h, w]` to `[B, in_channels, h * 2**(levels - 1), w * 2**(levels - 1)]`."""
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        out: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return out
