"""Objective of next-scale prediction (VAR, arXiv:2404.02905, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from arcore.nn.kinds import check_kinds
from arcore.ops import token_logprobs


@check_kinds
def next_scale_loss(
    logits: Tensor,
    indices: Sequence[Tensor],
    *,
    label_smoothing: float = 0.0,
    scale_weights: Sequence[float] | None = None,
) -> Tensor:
    """Mean cross entropy over the tokens of all scales.

    Args:
        logits: `[B, L, V]`.
        indices: codes of each scale, int64 `[B, p_k^2]`, which add up to L tokens.
        label_smoothing: share of the target that is spread evenly over all codes.
        scale_weights: weight of a token of each scale. Weights are relative: the result is a weighted mean, and equal
            weights change nothing. For scales that count alike whatever their size take `1 / p_k^2`.

    Returns:
        Scalar, float32, in nats per token.

    Raises:
        ValueError: lengths or weights do not fit.
    """
    targets = torch.cat(list(indices), dim=1)
    if logits.dim() != 3 or logits.shape[:2] != targets.shape:
        raise ValueError(
            f"expected logits of shape [B, L, V] with (B, L) = {tuple(targets.shape)}, the codes given, "
            f"but got {tuple(logits.shape)}"
        )
    if logits.dtype == torch.float64:
        logits = logits.float()
    logp, logsumexp, _ = token_logprobs(logits, targets)
    losses = -logp
    if label_smoothing:
        # The cross entropy with the even share is the mean over codes of logsumexp - logit.
        even = logsumexp - logits.mean(dim=-1, dtype=torch.float32)
        losses = (1 - label_smoothing) * losses + label_smoothing * even
    if scale_weights is None:
        return losses.mean()
    if len(scale_weights) != len(indices) or min(scale_weights) < 0 or max(scale_weights) <= 0:
        raise ValueError(
            f"expected {len(indices)} scale_weights, none negative and one positive, but got {list(scale_weights)}"
        )
    weights = torch.cat(
        [
            losses.new_full((codes.shape[1],), float(w))
            for codes, w in zip(indices, scale_weights, strict=True)
        ]
    )
    return (losses * weights).mean() / weights.mean()
