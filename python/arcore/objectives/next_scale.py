"""Cross-entropy over all scales of a token pyramid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def next_scale_loss(
    logits: Tensor,
    indices: Sequence[Tensor],
    *,
    label_smoothing: float = 0.0,
    scale_weights: Sequence[float] | None = None,
) -> Tensor:
    """Mean cross-entropy over tokens (VAR, arXiv:2404.02905), or a weighted sum of the means of the scales.

    Args:
        logits: ``[B, L, V]``, all scales one after another.
        indices: int64 ``[B, p²]`` per scale, L tokens in total.
        label_smoothing: mass spread evenly over all codes, in [0, 1).
        scale_weights: one weight per scale (HMAR, arXiv:2506.04421, weights the scales' means); None counts every
            token alike.

    Returns:
        float32 scalar.

    Raises:
        ValueError: the numbers of tokens or of weights do not fit.
    """
    target = torch.cat(list(indices), dim=1)
    if logits.shape[:2] != target.shape:
        raise ValueError(
            f"next_scale_loss: expected logits [B, L, V] for indices of {tuple(target.shape)} but got {tuple(logits.shape)}"
        )
    loss = cross_entropy(
        logits.float().transpose(1, 2), target, label_smoothing=label_smoothing, reduction="none"
    )  # [B, L]
    if scale_weights is None:
        return loss.mean()
    if len(scale_weights) != len(indices):
        raise ValueError(f"next_scale_loss: expected {len(indices)} scale_weights but got {len(scale_weights)}")
    parts = loss.split([index.shape[1] for index in indices], dim=1)
    return torch.stack([w * part.mean() for w, part in zip(scale_weights, parts, strict=True)]).sum()
