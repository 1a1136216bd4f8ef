"""Losses of preference pairs on sequence log-probabilities: DPO and its kin.

Nothing is sampled or generated here; `arcore.objectives.sequence_logprob` makes the sums over tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from arcore.nn.kinds import check_kinds

PreferenceKind = Literal["dpo", "ipo", "hinge"]


@check_kinds
def preference_loss(
    policy: Tensor,
    reference: Tensor,
    preference: Tensor,
    *,
    beta: float = 0.1,
    kind: PreferenceKind = "dpo",
) -> Tensor:
    """Mean loss of pairs of responses, 0 for none; scalar. With `h` the gap of the two log-ratios to the reference::

        dpo    -log sigmoid(beta h)              (Rafailov et al., arXiv:2305.18290, equation 7)
        ipo    (h - 1 / (2 beta))^2              (Azar et al., arXiv:2310.12036, equation 17)
        hinge  max(0, 1 - beta h)                (SLiC as in arXiv:2305.10425, on log-ratios)

    An undecided pair counts with both orders, weighted by its preference.

    Args:
        policy: `[P, 2]` sums over tokens of both responses, with gradient.
        reference: `[P, 2]` under the frozen model.
        preference: `[P]` probability that the first is preferred; 1.0 for a decided winner.
        beta: above 0.
        kind: of the loss.

    Raises:
        ValueError: shapes differ, or a value is out of range.
    """
    if policy.dim() != 2 or policy.shape[1] != 2 or reference.shape != policy.shape:
        raise ValueError(
            "arcore.preference_loss: expected policy and reference of one shape (P, 2) but got "
            f"{tuple(policy.shape)} and {tuple(reference.shape)}; give sums over tokens"
        )
    if preference.shape != policy.shape[:1] or not ((preference >= 0) & (preference <= 1)).all():
        raise ValueError(
            f"arcore.preference_loss: expected preference ({len(policy)},) in [0, 1] but got shape "
            f"{tuple(preference.shape)} with values {preference.flatten()[:4].tolist()}; it is the probability that "
            "the first is preferred"
        )
    _check_beta("preference_loss", beta)
    gap = policy - reference.detach()
    h = gap[:, 0] - gap[:, 1]
    if kind == "dpo":
        first, second = -logsigmoid(beta * h), -logsigmoid(-beta * h)
    elif kind == "ipo":
        first, second = (h - 0.5 / beta) ** 2, (h + 0.5 / beta) ** 2
    elif kind == "hinge":
        first, second = (1 - beta * h).clamp(min=0), (1 + beta * h).clamp(min=0)
    else:
        raise ValueError(
            f"arcore.preference_loss: expected kind to be 'dpo', 'ipo' or 'hinge' but got {kind!r}; INPO and SRPO are "
            "systems of the zoo"
        )
    losses = preference * first + (1 - preference) * second
    # Where no pair was decided there is nothing to learn from; the mean of nothing would be NaN.
    return losses.mean() if len(losses) else losses.sum()


@check_kinds
def kto_loss(
    policy: Tensor,
    reference: Tensor,
    desirable: Tensor,
    *,
    beta: float = 0.1,
    weights: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    """KTO (Ethayarajh et al., arXiv:2402.01306, equation 8): responses judged one by one; scalar.

    With r the log-ratio to the reference and z its mean over the batch, at least 0 and without a gradient (an estimate
    of the KL divergence), a desirable response costs `1 - sigmoid(beta (r - z))`, another `1 - sigmoid(beta (z - r))`.

    Args:
        policy: `[B]` sums over tokens, with gradient.
        reference: `[B]` under the frozen model.
        desirable: `[B]` bool.
        beta: above 0.
        weights: of desirable and of other responses.

    Raises:
        ValueError: shapes differ, desirable is not bool, or a value is out of range.
    """
    if policy.dim() != 1 or reference.shape != policy.shape or desirable.shape != policy.shape:
        raise ValueError(
            "arcore.kto_loss: expected policy, reference and desirable of one shape (B,) but got "
            f"{tuple(policy.shape)}, {tuple(reference.shape)} and {tuple(desirable.shape)}; give one sum per response"
        )
    if desirable.dtype != torch.bool:
        raise ValueError(
            f"arcore.kto_loss: expected a bool desirable but got {desirable.dtype}; use x.bool()"
        )
    _check_beta("kto_loss", beta)
    ratio = policy - reference.detach()
    if not len(ratio):
        return ratio.sum()
    base = ratio.detach().mean().clamp(min=0)
    signed = torch.where(desirable, ratio - base, base - ratio)
    weight = torch.where(desirable, weights[0], weights[1])
    return (weight * (1 - torch.sigmoid(beta * signed))).mean()


def _check_beta(name: str, beta: float) -> None:
    if not 0 < beta < float("inf"):
        raise ValueError(f"arcore.{name}: expected beta > 0 but got {beta}; 0.1 is common")
