"""The mix of models, the reward model's loss, and the mix's law written out."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from arcore.decoding import MixedModel
from arcore.nn.kinds import check_kinds
from arcore.nn.protocols import TokenModel


@check_kinds
def guided_by(base: Any, rewards: list[Any], alphas: list[float]) -> MixedModel:
    """The base model times reward models to the powers `alphas`; see `arcore.decoding.MixedModel`."""
    return MixedModel([base, *rewards], [1.0, *alphas])


@check_kinds
def answer_logprobs(model: TokenModel, ids: Tensor, answer: Tensor) -> Tensor:
    """Sum of the log-probabilities of answers.

    Args:
        model: gives logits `[B, L, V]` of ids.
        ids: int64 `[B, L]`, prompt and answer, padded at the end.
        answer: bool `[B, L]`, True at the answer's tokens.

    Returns:
        float32 `[B]`.
    """
    network: Any = model
    logprobs = network(ids[:, :-1])[..., : model.vocab_size].log_softmax(-1)
    chosen = logprobs.gather(2, ids[:, 1:].unsqueeze(2)).squeeze(2)
    return (chosen * answer[:, 1:]).sum(1)


@check_kinds
def arm_loss(
    model: TokenModel,
    preferred: tuple[Tensor, Tensor],
    rejected: tuple[Tensor, Tensor],
    *,
    beta: float = 0.05,
    gamma: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The reward model's loss, Bradley-Terry on the log-probabilities of answers; no reference model.

    Args:
        model: the reward model.
        preferred: ids and mask of the answers, as `answer_logprobs` takes them.
        rejected: likewise.
        beta: factor on the difference.
        gamma: margin.

    Returns:
        The scalar loss, and the share of pairs that are ranked rightly.
    """
    difference = answer_logprobs(model, *preferred) - answer_logprobs(model, *rejected)
    return -F.logsigmoid(beta * difference - gamma).mean(), (difference > 0).float().mean()


@torch.no_grad()
def mixed_law(mixed: MixedModel, prompt: list[int], length: int) -> Tensor:
    """Float64 `[V ** length]`: the law of continuations, by the models' own distributions, written out."""
    size = mixed.vocab_size
    count = size**length
    place = torch.arange(count)
    digits = torch.stack([place // size ** (length - 1 - i) % size for i in range(length)], dim=1)
    full = torch.cat([torch.tensor(prompt).expand(count, -1), digits], dim=1)
    total = torch.zeros(count, length, size, dtype=torch.float64)
    for model, weight in zip(mixed.models, mixed.weights, strict=True):
        logits = model(full)[:, len(prompt) - 1 : -1, :size].double()
        total += weight * logits.log_softmax(-1)
    probs = total.softmax(-1).gather(2, digits.unsqueeze(2)).squeeze(2)
    law = probs.prod(1)
    assert math.isclose(float(law.sum()), 1.0, rel_tol=1e-9)
    return law
