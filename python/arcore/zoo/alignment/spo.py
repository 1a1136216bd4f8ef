"""SPO: self-play preference optimisation, a minimax winner from one policy (Swamy et al., arXiv:2401.04056).

A policy is a minimax winner if no other is preferred to it more often than half of the time; one exists for any
preferences, also where they go round in a circle and a reward of the Bradley-Terry kind misleads. SPO draws B responses
to a prompt, asks which of each two is preferred, and gives each the share of the others that it beats, a tie for one
half, as its reward in any step of reinforcement learning; here the group's step of GRPO. With a learner without regret
the *average* of the policies goes to the minimax winner; the last one need not.

Nearest neighbours here: INPO and SRPO, which regress on pairs. Legend: Q prompts, B responses to each, T tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from arcore.catalog import System
from arcore.catalog.claims import Claim, at_least, at_most, steps
from arcore.nn.kinds import check_kinds
from arcore.objectives import group_advantages, grpo_loss
from arcore.objectives.policy import Deviation, Reduction
from arcore.zoo.alignment._games import Vector, checked, cyclic_game, exploitability, normalised
from arcore.zoo.alignment.inpo import self_play

SYSTEM = System(
    name="spo",
    title="SPO",
    paper="arXiv:2401.04056",
    paper_title="A Minimaximalist Approach to Reinforcement Learning from Human Feedback",
    topic="alignment",
    kind="objective",
    summary="Self-play where a response's reward is the share of the others that it beats.",
    claim=(
        "The average policy of sampled self-play is close to the minimax winner and hard to beat; a policy for a "
        "Bradley-Terry reward of the same cyclic preferences is beaten several times as often as INPO's."
    ),
    checked_on="closed form",
    builds_on=("inpo",),
)


@check_kinds
def win_rate_rewards(wins: Tensor) -> Tensor:
    """The share of the other responses that each beats; in each group they sum to B / 2.

    Args:
        wins: `[..., B, B]` in [0, 1], how sure row is preferred to column, `wins + wins^T = 1` off the diagonal, which
            is not read. B is at least 2.

    Returns:
        `[..., B]`.

    Raises:
        ValueError: another shape, a value out of range, or two values of a pair that do not add up.
    """
    if wins.dim() < 2 or wins.shape[-1] != wins.shape[-2] or wins.shape[-1] < 2:
        raise ValueError(
            f"arcore.win_rate_rewards: expected wins (..., B, B) with B >= 2 but got {tuple(wins.shape)}; a response "
            "needs another one to be compared with"
        )
    itself = torch.eye(wins.shape[-1], dtype=torch.bool, device=wins.device)
    whole = torch.where(itself, 0.5, wins)
    if not ((whole >= 0) & (whole <= 1)).all() or ((whole + whole.mT - 1).abs() > 1e-6).any():
        raise ValueError(
            "arcore.win_rate_rewards: expected wins in [0, 1] with wins[i, j] + wins[j, i] = 1 but they are not; rate "
            "each pair once and fill in both places"
        )
    return torch.where(itself, 0.0, wins).sum(-1) / (wins.shape[-1] - 1)


@check_kinds
def spo_loss(
    logprobs: Tensor,
    old: Tensor,
    wins: Tensor,
    mask: Tensor,
    *,
    deviation: Deviation = "none",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    how: Reduction = "sequence_mean",
    length: int | None = None,
) -> Tensor:
    """GRPO on win rates within each prompt's group; scalar.

    Args:
        logprobs: `[Q, B, T]` log-probabilities of the tokens under the policy, with gradient.
        old: `[Q, B, T]` under the policy that drew them.
        wins: `[Q, B, B]`, see `win_rate_rewards`.
        mask: `[Q, B, T]` bool, the responses' tokens.
        deviation: what the advantages are divided by, see `arcore.objectives.group_advantages`.
        clip_low: see `arcore.objectives.grpo_loss`; so are the others.
        clip_high: how far above 1 a ratio counts.
        how: reduction over tokens and responses.
        length: longest response, for `how="constant"`.

    Raises:
        ValueError: shapes differ or a value is out of range.
    """
    if logprobs.dim() != 3 or wins.shape != (*logprobs.shape[:2], logprobs.shape[1]):
        raise ValueError(
            f"arcore.spo_loss: expected logprobs (Q, B, T) and wins (Q, B, B) but got {tuple(logprobs.shape)} and "
            f"{tuple(wins.shape)}; the responses to one prompt are compared with one another"
        )
    rewards = win_rate_rewards(wins).flatten().to(logprobs.dtype)
    groups = torch.arange(wins.shape[0], device=wins.device).repeat_interleave(wins.shape[1])
    return grpo_loss(
        logprobs.flatten(0, 1),
        old.flatten(0, 1),
        group_advantages(rewards, groups, deviation=deviation),
        mask.flatten(0, 1),
        clip_low=clip_low,
        clip_high=clip_high,
        how=how,
        length=length,
    )


@check_kinds
def minimax_winner(preferences: ArrayLike) -> Vector:
    """A policy that no response beats more often than half of the time, by linear programming.

    Raises:
        ValueError: no preferences.
        ImportError: scipy is missing.
    """
    from arcore._optional import require

    table = checked(preferences)
    count = len(table)
    # Maximise v with every column's P^T pi >= v.
    bounds = np.hstack([-table.T, np.ones((count, 1))])
    found = require("scipy.optimize", extra="train").linprog(
        np.append(np.zeros(count), -1.0),
        A_ub=bounds,
        b_ub=np.zeros(count),
        A_eq=[[1.0] * count + [0.0]],
        b_eq=[1.0],
        bounds=[(0, None)] * count + [(None, None)],
    )
    return np.asarray(np.clip(found.x[:count], 0, None) / np.clip(found.x[:count], 0, None).sum())


@check_kinds
def sampled_self_play(
    preferences: ArrayLike, *, size: int = 16, iterations: int = 4000, step: float = 0.05, seed: int = 0
) -> tuple[Vector, Vector]:
    """SPO on a table of logits: every round draws `size` responses and a decided winner for each pair of them.

    Args:
        preferences: `[N, N]`.
        size: responses per round B.
        iterations: rounds.
        step: of the multiplicative update.
        seed: of everything that is drawn.

    Returns:
        The average and the last policy, `[N]` each.

    Raises:
        ValueError: no preferences.
    """
    table, random = checked(preferences), np.random.default_rng(seed)
    count = len(table)
    total, average = np.zeros(count), np.zeros(count)
    upper = np.triu(np.ones((size, size), dtype=bool), 1)
    for _ in steps(iterations, "self-play"):
        policy = normalised(total)
        average += policy / iterations
        drawn = random.choice(count, size=size, p=policy)
        first = random.random((size, size)) < table[drawn[:, None], drawn[None]]
        wins = np.where(upper, first, ~first.T).astype(np.float64)
        np.fill_diagonal(wins, 0.0)
        reward = wins.sum(1) / (size - 1) - 0.5
        # An importance-weighted estimate of each response's win rate, which is the exponential-weights learner's loss.
        total += step * np.bincount(drawn, reward, count) / (size * np.maximum(policy, 1.0 / (size * count)))
    return average, normalised(total)


def reward_policy(preferences: Vector, reference: Vector, *, tau: float) -> Vector:
    """What RLHF finds: the Bradley-Terry reward of pairs drawn from the reference, then `ref exp(r / tau)`."""
    weight = reference[:, None] * reference[None]
    reward = np.zeros(len(reference))
    for _ in range(200):
        chance = 1 / (1 + np.exp(reward[None] - reward[:, None]))
        slope = (weight * (preferences - chance)).sum(1)
        bend = weight * chance * (1 - chance)
        curve = np.diag(bend.sum(1)) - bend + 1 / len(reward) ** 2
        reward = reward + np.linalg.solve(curve, slope)
        if np.abs(slope).max() < 1e-13:
            break
    return normalised(np.log(reference) + reward / tau)


# Rock, paper and scissors of unequal strength, and a response that all of them beat.
_BIASED = np.array([[0.5, 0.9, 0.3, 0.8], [0.1, 0.5, 0.8, 0.7], [0.7, 0.2, 0.5, 0.9], [0.2, 0.3, 0.1, 0.5]])


def claim(*, quick: bool) -> Claim:
    """Self-play against the minimax winner; a Bradley-Terry reward against INPO on the cyclic game."""
    winner = minimax_winner(_BIASED)
    found = [
        sampled_self_play(_BIASED, iterations=4000 if quick else 20000, seed=seed)
        for seed in range(1 if quick else 3)
    ]
    average = [one for one, _ in found]
    table, reference = cyclic_game()
    ours = self_play(table, reference, tau=0.05, iterations=200)[-1]
    rewarded = reward_policy(table, reference, tau=0.05)

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for place, (label, policy) in enumerate(
            (("minimax winner", winner), ("average", found[0][0]), ("last", found[0][1]))
        ):
            axes.bar(np.arange(4) + 0.25 * (place - 1), policy, 0.25, label=label)
        axes.set(xlabel="response", ylabel="probability")
        axes.legend()

    return Claim(
        (
            at_most(
                "average of self-play: L1 to the minimax winner",
                max(np.abs(a - winner).sum() for a in average),
                0.06,
            ),
            at_most("its exploitability", max(exploitability(_BIASED, a) for a in average), 0.02),
            at_most("exploitability of the minimax winner itself", exploitability(_BIASED, winner), 1e-9),
            at_least(
                "cyclic game: exploitability with a Bradley-Terry reward, times INPO's",
                exploitability(table, rewarded) / exploitability(table, ours),
                3.0,
            ),
        ),
        draw=draw,
    )
