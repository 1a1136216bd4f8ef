"""Objective of next-cluster prediction of image patches (RoMA, arXiv:2503.10392, section 3.3)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from arcore.nn.kinds import check_kinds
from arcore.nn.patches import cluster_order, inverse_order, patchify, standardized


class NextClusterLoss(NamedTuple):
    """Scalars, float32.

    Attributes:
        loss: what training minimises, `patches + block_weight * blocks`.
        patches: mean squared error over all predicted patches; 1 is about what predicting zero costs.
        blocks: mean squared error over the larger blocks.
    """

    loss: Tensor
    patches: Tensor
    blocks: Tensor


@check_kinds
def next_cluster_targets(images: Tensor, *, patch_size: int, cluster: int = 4) -> Tensor:
    """Standardized patches of all clusters but the first, in cluster order.

    Args:
        images: `[B, C, H, H]`, before any augmentation that only the input sees.
        patch_size: side length p in pixels.
        cluster: patches per side s of a cluster.

    Returns:
        float32 `[B, N - s * s, p * p * C]`.
    """
    patches, _, _ = standardized(patchify(images.float(), patch_size))
    order = cluster_order(math.isqrt(patches.shape[1]), cluster, images.device)
    return patches[:, order[cluster * cluster :]]


@check_kinds
def next_cluster_loss(
    predictions: Tensor,
    images: Tensor,
    *,
    patch_size: int,
    cluster: int = 4,
    block: int = 6,
    block_weight: float = 0.1,
    official_quirks: bool = False,
) -> NextClusterLoss:
    """Squared error of predicted patches, and of larger blocks of patches.

    The image's blocks of `block` x `block` patches are compared as a whole, without the first one, part of which
    nothing predicts. With predictions and targets in the same order the squared error of a block is the mean of its
    patches' errors; the term then weighs patches outside the first block higher.

    Args:
        predictions: `[B, N - s * s, p * p * C]`, standardized patches of clusters 1, 2, ... in cluster order.
        images: the images to predict, `[B, C, H, H]`.
        patch_size: side length p in pixels.
        cluster: patches per side s of a cluster.
        block: patches per side of a block; at least `cluster`, and blocks tile the image.
        block_weight: weight of the second term.
        official_quirks: compute the second term as the released training code does. It takes the predictions for
            raster-ordered, and lays out a block of predictions channel by channel but a block of targets patch by
            patch, so that a perfect prediction costs about 2 per value of that term. Only for comparing with it.

    Raises:
        ValueError: shapes do not fit.
    """
    targets, _, _ = standardized(patchify(images.float(), patch_size))  # [B, N, P], raster order
    batch, count, pixels = targets.shape
    side, first = math.isqrt(count), cluster * cluster
    if side * side != count or block < cluster or side % block:
        raise ValueError(
            f"expected square images that blocks of {block} x {block} patches, at least {cluster} x {cluster}, tile, "
            f"but got images of shape {tuple(images.shape)} with patches of {patch_size} pixels"
        )
    if predictions.shape != (batch, count - first, pixels):
        raise ValueError(
            f"expected predictions of shape {(batch, count - first, pixels)} for images of shape "
            f"{tuple(images.shape)} but got {tuple(predictions.shape)}"
        )
    predictions = predictions.float()
    order = cluster_order(side, cluster, images.device)
    patches = (predictions - targets[:, order[first:]]).square().mean()
    padded = torch.cat([predictions.new_zeros(batch, first, pixels), predictions], dim=1)
    by_block = cluster_order(side, block, images.device)[block * block :]
    target_blocks = targets[:, by_block].reshape(batch, -1, block * block, pixels)
    if official_quirks:
        predicted_blocks = padded[:, by_block].reshape(target_blocks.shape).transpose(2, 3)
        difference = predicted_blocks.flatten(2) - target_blocks.flatten(2)
    else:
        raster = padded[:, inverse_order(order)]
        difference = raster[:, by_block].reshape(target_blocks.shape) - target_blocks
    blocks = difference.square().mean()
    return NextClusterLoss(patches + block_weight * blocks, patches, blocks)
