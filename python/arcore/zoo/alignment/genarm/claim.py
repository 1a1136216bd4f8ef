"""The check of the claim."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from arcore.catalog.claims import Claim, at_least, at_most, equals, steps
from arcore.decoding import Sampling, generate
from arcore.decoding.laws import small_model, text_law
from arcore.zoo.alignment.genarm.loss import arm_loss, guided_by, mixed_law


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
