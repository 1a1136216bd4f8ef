"""The occupancy-matching objective."""

from __future__ import annotations

import torch
from torch import Tensor

from arcore.nn.kinds import check_kinds


def phi(x: Tensor) -> Tensor:
    """Of the chi-square mixture divergence."""
    return x - x.square() / 4


@check_kinds
def sequencematch_loss(
    logits: Tensor,
    actions: Tensor,
    sampled: Tensor,
    *,
    mask: Tensor,
    sampled_mask: Tensor,
    alpha: float = 0.01,
    gamma: float = 0.998,
) -> Tensor:
    """Minus the objective, averaged over steps:
    E_data[phi(alpha r) / alpha] - E_data[V(s) - gamma V(s')] / 2 - E_model[V(s) - gamma V(s')] / 2.

    Args:
        logits: floating `[B, N + 1, V]`, of actions in the states s_0 .. s_N of texts.
        actions: int64 `[B, N]`, which led from each to the next.
        sampled: `[B', M + 1, V]`, likewise in states of the model's own texts.
        mask: bool `[B, N]`, steps that count; False at padding.
        sampled_mask: bool `[B', M]`.
        alpha: of the mixture; 0 is the limit, in which phi(alpha r) / alpha is r.
        gamma: discount.

    Returns:
        Scalar.

    Raises:
        ValueError: shapes do not fit, no step counts, or a setting is out of range.

    Reference: section 4 of arXiv:2306.05426.
    """
    if (
        logits.dim() != 3
        or actions.shape != (logits.shape[0], logits.shape[1] - 1)
        or mask.shape != actions.shape
    ):
        raise ValueError(
            "expected logits [B, N + 1, V] with actions and mask [B, N] but got "
            f"{list(logits.shape)}, {list(actions.shape)} and {list(mask.shape)}"
        )
    if sampled.dim() != 3 or sampled_mask.shape != (sampled.shape[0], sampled.shape[1] - 1):
        raise ValueError(
            "expected sampled [B', M + 1, V] with sampled_mask [B', M] but got "
            f"{list(sampled.shape)} and {list(sampled_mask.shape)}"
        )
    if alpha < 0 or not 0 < gamma <= 1:
        raise ValueError(f"expected alpha >= 0 and 0 < gamma <= 1 but got {alpha} and {gamma}")
    if not bool(mask.any()) or not bool(sampled_mask.any()):
        raise ValueError("expected at least one step of texts and one of samples that count")
    values = logits.logsumexp(-1)
    taken = logits[:, :-1].gather(2, actions.unsqueeze(2)).squeeze(2)
    reward = taken - gamma * values[:, 1:]
    gained = reward if alpha == 0 else phi(alpha * reward) / alpha
    own = sampled.logsumexp(-1)
    data = mean(gained, mask) - mean(values[:, :-1] - gamma * values[:, 1:], mask) / 2
    return mean(own[:, :-1] - gamma * own[:, 1:], sampled_mask) / 2 - data


def mean(values: Tensor, mask: Tensor) -> Tensor:
    """Over the places where the mask holds."""
    return torch.where(mask, values, 0.0).sum() / mask.sum()
