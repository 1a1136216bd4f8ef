"""Adaptive rotation (RoMA, arXiv:2503.10392, section 3.2): the window of an image that scores highest is rotated.

Patches are scored by local binary patterns (Ojala et al. 2002). The best window around the best patch is turned by a
random angle and pasted back; a model that is told where the window is learns features that follow orientation.

The released transform differs where it goes wrong: it swaps rows and columns between scoring and cutting, mixes
colour channels into the grey patch, and its 64- and 32-pixel windows fail on their shape and skip the image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from arcore.nn.checks import check_number, check_tensor, check_whole
from arcore.nn.kinds import Axes, Planes, Size, check_kinds

# The ring around a pixel, clockwise from the upper left; neighbour k sets bit k of the code.
_RING = ((-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1))


class RotatedImages(NamedTuple):
    """Attributes:
    images: `[B, C, H, H]`, with one window of each image rotated.
    windows: int64 `[B, 3]`: top, left and side length of that window, in patches.
    """

    images: Tensor
    windows: Tensor


@check_kinds
def local_binary_patterns(grey: Tensor) -> Tensor:
    """Codes of 8 neighbours at distance 1.

    Args:
        grey: `[..., H, W]`; the border is repeated outwards.

    Returns:
        int64 `[..., H, W]`, 0 to 255: bit k is set when neighbour k (clockwise from the upper left) is at least as
        bright as the pixel.
    """
    height, width = grey.shape[-2:]
    flat = grey.reshape(-1, 1, height, width)
    padded = F.pad(flat, (1, 1, 1, 1), mode="replicate")
    codes = torch.zeros(flat.shape, dtype=torch.int64, device=grey.device)
    for bit, (dy, dx) in enumerate(_RING):
        neighbour = padded[..., 1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width]
        codes += (neighbour >= flat).long() << bit
    return codes.reshape(grey.shape)


@check_kinds
def pattern_scores(images: Tensor, patch_size: int) -> Tensor:
    """Euclidean norm of the histogram of local binary patterns of each patch.

    Args:
        images: `[B, C, H, W]` with sides in multiples of `patch_size`; channels are averaged.
        patch_size: side length p in pixels.

    Returns:
        float32 `[B, H / p, W / p]` in (0, 1]; 1 means that all pixels of the patch have the same pattern.
    """
    codes = local_binary_patterns(images.float().mean(dim=1))
    batch, height, width = codes.shape
    rows, columns = height // patch_size, width // patch_size
    codes = codes.view(batch, rows, patch_size, columns, patch_size).transpose(2, 3)
    codes = codes.reshape(batch * rows * columns, patch_size * patch_size)
    counts = torch.zeros(len(codes), 256, device=images.device)
    counts.scatter_add_(1, codes, torch.ones_like(codes, dtype=counts.dtype))
    return (counts.norm(dim=1) / patch_size**2).view(batch, rows, columns)


@check_kinds
def best_windows(scores: Tensor, sizes: Sequence[int]) -> Tensor:
    """The window to rotate in each image.

    For each size in turn, the window of highest mean score that contains the best patch is a candidate. The first
    whose mean is at least the image's mean is taken; the last size is taken in any case. The first of equals wins.

    Args:
        scores: `[B, R, C]`.
        sizes: side lengths of windows in patches, large to small, none above R or C.

    Returns:
        int64 `[B, 3]`: top, left, side length.
    """
    batch, columns = len(scores), scores.shape[2]
    best = scores.flatten(1).argmax(dim=1)
    row, column = best // columns, best % columns
    mean = scores.mean(dim=(1, 2))
    chosen = torch.zeros(batch, 3, dtype=torch.int64, device=scores.device)
    open_ = torch.ones(batch, dtype=torch.bool, device=scores.device)
    for size in sizes:
        means = F.avg_pool2d(scores.unsqueeze(1), size, stride=1).squeeze(
            1
        )  # [B, R - size + 1, C - size + 1]
        tops = torch.arange(means.shape[1], device=scores.device)
        lefts = torch.arange(means.shape[2], device=scores.device)
        inside_rows = (tops <= row[:, None]) & (row[:, None] < tops + size)
        inside_columns = (lefts <= column[:, None]) & (column[:, None] < lefts + size)
        means = means.where(inside_rows[:, :, None] & inside_columns[:, None, :], -math.inf)
        value, index = means.flatten(1).max(dim=1)
        window = torch.stack([index // len(lefts), index % len(lefts), torch.full_like(index, size)], dim=1)
        take = open_ & ((value >= mean) | (size == sizes[-1]))
        chosen = torch.where(take[:, None], window, chosen)
        open_ = open_ & ~take
    return chosen


@check_kinds
def rotate_windows(
    images: Planes,
    windows: Annotated[Tensor, Axes("B 3", whole=True)],
    angles: Annotated[Tensor, Axes("B", floating=True)],
    patch_size: Size,
) -> Tensor:
    """Rotate a square window of each image about its centre, in place of the old content.

    Args:
        images: `[B, C, H, W]`.
        windows: int64 `[B, 3]`: top, left and side length in patches.
        angles: `[B]`, degrees, counter-clockwise.
        patch_size: side length of a patch in pixels.

    Returns:
        `[B, C, H, W]`. Pixels outside the window are those of `images`; inside, values are interpolated linearly, and
        corners that the turned content does not reach are 0.
    """
    if windows.shape != (len(images), 3) or len(angles) != len(images):
        raise ValueError(
            f"expected windows and angles of {len(images)} images but got {tuple(windows.shape)} and "
            f"{tuple(angles.shape)}"
        )
    _, _, height, width = images.shape
    top, left, size = (windows * patch_size).to(torch.float32)[:, :, None, None].unbind(1)  # [B, 1, 1]
    y = torch.arange(height, dtype=torch.float32, device=images.device)[:, None]
    x = torch.arange(width, dtype=torch.float32, device=images.device)
    centre_y, centre_x = top + (size - 1) / 2, left + (size - 1) / 2
    radians = torch.deg2rad(angles.to(torch.float32))[:, None, None]
    cos, sin = radians.cos(), radians.sin()
    # Where the content of pixel (y, x) comes from: the rotation undone. y points down.
    source_x = centre_x + cos * (x - centre_x) - sin * (y - centre_y)
    source_y = centre_y + sin * (x - centre_x) + cos * (y - centre_y)
    grid = torch.stack([(2 * source_x + 1) / width - 1, (2 * source_y + 1) / height - 1], dim=-1)
    turned = F.grid_sample(images, grid.to(images.dtype), padding_mode="border", align_corners=False)
    half = size / 2
    reached = ((source_x - centre_x).abs() <= half) & ((source_y - centre_y).abs() <= half)
    inside = (y >= top) & (y < top + size) & (x >= left) & (x < left + size)
    turned = turned * reached.unsqueeze(1)
    return torch.where(inside.unsqueeze(1), turned, images)


@check_kinds
def adaptive_rotation(
    images: Tensor,
    patch_size: int,
    *,
    sizes: Sequence[int] = (6, 4, 2),
    max_angle: float = 45.0,
    angles: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> RotatedImages:
    """Rotate the best window of each image by a random angle.

    Args:
        images: `[B, C, H, W]` with sides in multiples of `patch_size`.
        patch_size: side length p of a patch in pixels.
        sizes: side lengths of windows in patches, large to small.
        max_angle: angles are uniform in [-max_angle, max_angle] degrees.
        angles: `[B]`, degrees, instead of random ones.
        generator: source of random numbers on the images' device; the global one when None.

    Returns:
        The images and their windows. An image's result depends on its pixels and its angle only.

    Raises:
        ValueError: shapes or sizes do not fit.
    """
    check_tensor("images", images)
    patch_size = check_whole("patch_size", patch_size, 1, "pixel")
    max_angle = check_number("max_angle", max_angle)
    if images.dim() != 4 or images.shape[2] % patch_size or images.shape[3] % patch_size:
        raise ValueError(
            f"expected images [B, C, H, W] with sides in multiples of {patch_size} but got {tuple(images.shape)}"
        )
    largest = min(images.shape[2:]) // patch_size
    if not sizes or min(sizes) < 1 or max(sizes) > largest or sorted(sizes, reverse=True) != list(sizes):
        raise ValueError(
            f"expected sizes from {largest} patches, the image's side, down to 1, large to small, "
            f"but got {tuple(sizes)}"
        )
    if angles is None:
        draws = torch.rand(len(images), generator=generator, device=images.device)
        angles = (2 * draws - 1) * max_angle
    elif angles.shape != images.shape[:1]:
        raise ValueError(f"expected one angle for each of {len(images)} images but got {tuple(angles.shape)}")
    windows = best_windows(pattern_scores(images, patch_size), sizes)
    return RotatedImages(rotate_windows(images, windows, angles, patch_size), windows)
