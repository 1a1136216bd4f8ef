"""SPO: rewards of win rates, the loss against a plain reference, the minimax winner, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from arcore.zoo.alignment._games import exploitability
from arcore.zoo.alignment.spo import (
    minimax_winner,
    reward_policy,
    sampled_self_play,
    spo_loss,
    win_rate_rewards,
)

Batch = dict[str, Tensor]


class Contract:
    learns = ("logprobs",)
    tolerance = 1e-12

    def batch(self, seed: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        old = -torch.rand(3, 4, 5, generator=generator, dtype=torch.float64)
        upper = torch.rand(3, 4, 4, generator=generator, dtype=torch.float64).triu(1)
        return {
            "logprobs": old + 0.4 * torch.randn(3, 4, 5, generator=generator, dtype=torch.float64),
            "old": old,
            "wins": upper + (1 - upper).mT.tril(-1),
            "mask": torch.arange(5) < torch.randint(1, 6, (3, 4, 1), generator=generator),
        }

    def loss(self, batch: Batch) -> Tensor:
        return spo_loss(**batch)

    def reference(self, batch: Batch) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for prompt, wins in enumerate(batch["wins"]):
            for row in range(4):
                gain = sum(wins[row, other].item() for other in range(4) if other != row) / 3 - 0.5
                tokens = batch["mask"][prompt, row].nonzero()[:, 0]
                for place in tokens:
                    rho = (batch["logprobs"][prompt, row, place] - batch["old"][prompt, row, place]).exp()
                    limited = 0.8 if rho < 0.8 else 1.2 if rho > 1.2 else rho
                    total = total - min(rho * gain, limited * gain) / (len(tokens) * 12)
        return total

    def special_case(self) -> tuple[Tensor, Tensor]:
        """Two responses and a decided winner: half of the difference of their ratios."""
        batch = {name: value[:, :2] for name, value in self.batch(3).items()}
        batch["wins"] = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64).expand(3, 2, 2)
        rho = torch.where(batch["mask"], (batch["logprobs"] - batch["old"]).exp(), 0.0)
        mean = rho.sum(-1) / batch["mask"].sum(-1)
        known = -0.5 * (mean[:, 0] - mean[:, 1]).mean() / 2
        return spo_loss(**batch, clip_low=1.0, clip_high=math.inf), known

    def padded(self, batch: Batch) -> Batch:
        wide = {n: torch.nn.functional.pad(batch[n], (0, 2), value=math.nan) for n in ("logprobs", "old")}
        return batch | wide | {"mask": torch.nn.functional.pad(batch["mask"], (0, 2))}


def test_rewards_of_a_group_sum_to_half_of_it():
    wins = torch.tensor([[0.3, 1.0, 0.5], [0.0, 9.0, 1.0], [0.5, 0.0, math.nan]])
    assert win_rate_rewards(wins).tolist() == [0.75, 0.5, 0.25]
    upper = (torch.rand(2, 6, 6) < 0.5).double().triu(1)
    rewards = win_rate_rewards(upper + (1 - upper).mT.tril(-1))
    torch.testing.assert_close(rewards.sum(-1), torch.full((2,), 3.0, dtype=torch.float64))


def test_the_minimax_winner_of_a_known_game():
    pytest.importorskip("scipy")
    # Rock, paper, scissors with payoffs a, b, c has the mixture (c, b, a) / (a + b + c) of its opposite edges.
    game = [[0.5, 0.9, 0.4], [0.1, 0.5, 0.7], [0.6, 0.3, 0.5]]
    winner = minimax_winner(game)
    np.testing.assert_allclose(winner, np.array([0.2, 0.1, 0.4]) / 0.7, atol=1e-8)
    assert abs(exploitability(np.array(game), winner)) < 1e-9
    # A response that all others lose to is the winner.
    assert minimax_winner([[0.5, 0.6], [0.4, 0.5]]).tolist() == [1.0, 0.0]


def test_the_average_of_self_play_beats_its_last_policy():
    game = np.array([[0.5, 0.9, 0.4], [0.1, 0.5, 0.7], [0.6, 0.3, 0.5]])
    average, last = sampled_self_play(game, iterations=1500, step=0.1, seed=3)
    assert exploitability(game, average) < 0.03
    assert exploitability(game, average) < exploitability(game, last)
    again, _ = sampled_self_play(game, iterations=1500, step=0.1, seed=3)
    assert (again == average).all()


def test_a_reward_that_explains_the_preferences_is_found():
    reward, reference = np.array([0.0, 0.7, -0.4]), np.array([0.5, 0.2, 0.3])
    table = 1 / (1 + np.exp(reward[None] - reward[:, None]))
    wanted = reference * np.exp(reward / 0.5)
    np.testing.assert_allclose(reward_policy(table, reference, tau=0.5), wanted / wanted.sum(), atol=1e-9)


@pytest.mark.parametrize(
    ("wins", "message"),
    [
        (torch.zeros(2, 3), r"expected wins \(..., B, B\) with B >= 2 but got \(2, 3\)"),
        (torch.zeros(1, 1), r"expected wins \(..., B, B\) with B >= 2 but got \(1, 1\)"),
        (torch.ones(2, 2), r"wins\[i, j\] \+ wins\[j, i\] = 1 but they are not"),
        (torch.tensor([[0.0, math.nan], [0.0, 0.0]]), r"expected wins in \[0, 1\]"),
    ],
)
def test_wins_that_are_none(wins: Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        win_rate_rewards(wins)


def test_bad_input():
    batch: dict[str, Any] = Contract().batch(0)
    with pytest.raises(ValueError, match=r"expected logprobs \(Q, B, T\) and wins \(Q, B, B\)"):
        spo_loss(**(batch | {"wins": batch["wins"][:2]}))
