"""GenARM: a language model is aligned while it writes, by the token probabilities of a reward model (arXiv:2410.08193).

The reward model is a language model too: it is trained so that the log-probability of a whole preferred answer is above
that of a rejected one, and so gives every next token a reward. Decoding multiplies the two models' distributions,
log p = log base + sum of alpha_k log reward_k + const, with one weight for each of several objectives.

The mix is `arcore.decoding.MixedModel`, which every loop decodes; here are the training loss and the check of the
claim. Normalising token by token is not the exact optimum of reward minus KL over whole texts; the check states by how
much it differs.

Left out: prompts with a template of their own for each model.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from arcore.catalog import System
from arcore.catalog.claims import Claim, at_least, at_most, equals, steps
from arcore.decoding import MixedModel, Sampling, generate
from arcore.decoding.laws import small_model, text_law

SYSTEM = System(
    name="genarm",
    title="GenARM",
    paper="arXiv:2410.08193",
    topic="alignment",
    kind="decoder",
    ops=("sample",),
    summary="Test-time alignment: a frozen language model times an autoregressive reward model, token by token.",
    claim="Weight 0 changes nothing; reward rises with the weight, near the optimum; held-out pairs are ranked.",
    checked_on="synthetic data",
)


def guided_by(base: Any, rewards: list[Any], alphas: list[float]) -> MixedModel:
    """The base model times reward models to the powers `alphas`; see `arcore.decoding.MixedModel`."""
    return MixedModel([base, *rewards], [1.0, *alphas])


def answer_logprobs(model: Any, ids: Tensor, answer: Tensor) -> Tensor:
    """Sum of the log-probabilities of answers.

    Args:
        model: gives logits `[B, L, V]` of ids.
        ids: int64 `[B, L]`, prompt and answer, padded at the end.
        answer: bool `[B, L]`, True at the answer's tokens.

    Returns:
        float32 `[B]`.
    """
    logprobs = model(ids[:, :-1])[..., : model.vocab_size].log_softmax(-1)
    chosen = logprobs.gather(2, ids[:, 1:].unsqueeze(2)).squeeze(2)
    return (chosen * answer[:, 1:]).sum(1)


def arm_loss(
    model: Any,
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


def _pairs(count: int, prompt: int, length: int, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random texts in pairs; of two answers the one with more even tokens is preferred, ties are drawn again."""
    better: list[Tensor] = []
    worse: list[Tensor] = []
    while len(better) < count:
        prefix = torch.randint(vocab, (prompt,))
        one, two = (torch.cat([prefix, torch.randint(vocab, (length,))]) for _ in range(2))
        score = [int((text[prompt:] % 2 == 0).sum()) for text in (one, two)]
        if score[0] != score[1]:
            better.append(one if score[0] > score[1] else two)
            worse.append(two if score[0] > score[1] else one)
    answer = torch.arange(prompt + length) >= prompt
    return torch.stack(better), torch.stack(worse), answer


def claim(*, quick: bool) -> Claim:
    """Text at weight 0; expected reward and distance from the optimum of an enumerated law; ranks of held-out pairs."""
    vocab, length, prompt, sampling = 3, 4, [1, 2], Sampling()
    base, reward = (small_model(vocab, seed=seed, scale=0.15) for seed in (1, 2))
    prompts = [[1, 2], [0], [2, 2, 1]]
    plain = generate(base, prompts, max_new_tokens=30, seed=1).ids
    none = generate(guided_by(base, [reward], [0.0]), prompts, max_new_tokens=30, seed=1).ids
    # Rewards of whole texts are the reward model's log-probabilities, so the optimum is known.
    of_base, of_reward = (text_law(model, prompt, length, sampling).log() for model in (base, reward))
    expected, distance = [], 0.0
    for alpha in (0.0, 0.5, 1.0, 2.0, 4.0):
        law = mixed_law(guided_by(base, [reward], [alpha]), prompt, length)
        expected.append(float((law * of_reward).sum()))
        best = (of_base + alpha * of_reward).log_softmax(0)
        distance = max(distance, float((law * (law.log() - best)).sum()))
    vocab_pairs = 8
    model = small_model(vocab_pairs, seed=3)
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in steps(35 if quick else 300, "training the reward model"):
        better, worse, answer = _pairs(16, 3, 8, vocab_pairs)
        mask = answer.expand(len(better), -1)
        loss, _ = arm_loss(model, (better, mask), (worse, mask), beta=0.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    better, worse, answer = _pairs(300, 3, 8, vocab_pairs)
    mask = answer.expand(len(better), -1)
    with torch.no_grad():
        _, ranked = arm_loss(model, (better, mask), (worse, mask))
    rises = min(b - a for a, b in pairwise(expected))
    return Claim(
        (
            equals("tokens that weight 0 changes", int((plain != none).sum()), 0),
            at_least("least rise of the expected reward over weights 0, 0.5, 1, 2, 4", rises, 0.0),
            at_most("largest KL divergence from the optimum over whole texts", distance, 0.2),
            at_least("the same, which is not zero", distance, 1e-6),
            at_least("held-out pairs ranked rightly", float(ranked), 0.9),
        )
    )


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
