"""Images as sequences of patches, and the order in which clusters of patches follow each other.

A square image of G x G patches is a sequence in raster order. Cluster order goes through squares of s x s patches in
raster order, and through the patches of each square in raster order, so s*s consecutive tokens are one square.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from arcore.nn.kinds import Planes, Size, check_kinds


@check_kinds
class PatchEmbed(nn.Module):
    """One linear map of each patch.

    Args:
        in_channels: of the image.
        dim: width C of a token.
        patch_size: side length of a patch in pixels.
    """

    def __init__(self, in_channels: Size, dim: Size, patch_size: Size) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)

    def forward(self, images: Planes) -> Tensor:
        """`[B, in_channels, H, W]` to `[B, N, C]`, N patches in raster order."""
        out: Tensor = self.proj(images)
        return out.flatten(2).transpose(1, 2)


@check_kinds
def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Pixels of each patch, patches in raster order.

    Args:
        images: `[B, C, H, W]`; H and W are multiples of `patch_size`.
        patch_size: side length p in pixels.

    Returns:
        `[B, N, p * p * C]`; within a patch rows, then columns, then channels.

    Raises:
        ValueError: the sides are no multiples of `patch_size`.
    """
    if images.dim() != 4 or images.shape[2] % patch_size or images.shape[3] % patch_size:
        raise ValueError(
            f"expected images [B, C, H, W] with sides in multiples of {patch_size} but got {tuple(images.shape)}"
        )
    batch, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    x = images.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, patch_size * patch_size * channels)


@check_kinds
def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """The square images `[B, C, H, H]` whose `patchify` is `[B, N, p * p * C]`."""
    batch, count, pixels = patches.shape
    side = math.isqrt(count)
    x = patches.reshape(batch, side, side, patch_size, patch_size, pixels // patch_size**2)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, side * patch_size, side * patch_size)


@check_kinds
def standardized(patches: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """Patches with mean 0 and variance 1, the targets of masked and autoregressive image models (arXiv:2111.06377).

    Args:
        patches: `[..., P]`, the pixels of a patch last.
        eps: added to the variance, which divides by P - 1.

    Returns:
        The standardized patches, and the mean and the standard deviation `[..., 1]` that were taken out.

    Raises:
        ValueError: there are none.
    """
    if not patches.numel():
        raise ValueError(f"expected at least one patch of one pixel but got {tuple(patches.shape)}")
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    std = (variance + eps).sqrt()
    return (patches - mean) / std, mean, std


@check_kinds
def cluster_order(side: int, cluster: int, device: torch.device | None = None) -> Tensor:
    """Raster positions in cluster order: `x[:, cluster_order(G, s)]` puts G * G patches into cluster order.

    Args:
        side: patches per side G, a multiple of `cluster`.
        cluster: patches per side s of a cluster.
        device: of the result.

    Returns:
        int64 `[G * G]`, a permutation; `inverse_order` of it leads back.

    Raises:
        ValueError: the clusters do not tile the image.
    """
    if cluster < 1 or side < 1 or side % cluster:
        raise ValueError(f"expected clusters that tile {side} x {side} patches but got {cluster} x {cluster}")
    raster = torch.arange(side * side, device=device)
    blocks = raster.view(side // cluster, cluster, side // cluster, cluster)
    return blocks.transpose(1, 2).reshape(-1)


@check_kinds
def inverse_order(order: Tensor) -> Tensor:
    """The permutation that undoes `order`."""
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return inverse
