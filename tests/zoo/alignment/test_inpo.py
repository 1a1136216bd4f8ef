"""INPO's loss against its steps, IPO as a special case, games, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from arcore.objectives import sequence_logprob
from arcore.zoo.alignment._games import cyclic_game, omd_step, regularised_nash
from arcore.zoo.alignment.inpo import inpo_loss, minimiser, self_play

Batch = dict[str, Tensor]


class Contract:
    learns = ("logprobs",)
    tolerance = 1e-12

    def batch(self, seed: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        found = {
            name: -3 * torch.rand(5, 2, 7, generator=generator, dtype=torch.float64)
            for name in ("logprobs", "reference", "previous")
        }
        lengths = torch.randint(0, 8, (5, 2, 1), generator=generator)
        return found | {
            "preference": torch.rand(5, generator=generator, dtype=torch.float64),
            "mask": torch.arange(7) < lengths,
        }

    def loss(self, batch: Batch, tau: float = 0.1, eta: float = 0.3) -> Tensor:
        sums = [
            sequence_logprob(batch[name], batch["mask"]) for name in ("logprobs", "reference", "previous")
        ]
        return inpo_loss(*sums, batch["preference"], tau=tau, eta=eta)

    def reference(self, batch: Batch) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for row, preference in enumerate(batch["preference"]):
            h = torch.zeros((), dtype=torch.float64)
            for side, sign in ((0, 1.0), (1, -1.0)):
                for place in range(batch["mask"].shape[2]):
                    if batch["mask"][row, side, place]:
                        new, ref, last = (
                            batch[n][row, side, place] for n in ("logprobs", "reference", "previous")
                        )
                        h = h + sign * (new - ref / 3 - last * 2 / 3)
            total = total + preference * (h - 5 / 3) ** 2 + (1 - preference) * (h + 5 / 3) ** 2
        return total / len(batch["preference"])

    def special_case(self) -> tuple[Tensor, Tensor]:
        """With the reference as last policy, and decided winners, it is IPO."""
        batch = self.batch(3)
        batch |= {"previous": batch["reference"], "preference": torch.ones(5, dtype=torch.float64)}
        apart = torch.where(batch["mask"], batch["logprobs"] - batch["reference"], 0.0).sum(-1)
        return self.loss(batch, tau=0.2, eta=0.4), ((apart[:, 0] - apart[:, 1] - 1 / 0.8) ** 2).mean()

    def padded(self, batch: Batch) -> Batch:
        wide = {
            name: torch.nn.functional.pad(batch[name], (0, 2), value=math.nan)
            for name in ("logprobs", "reference", "previous")
        }
        return batch | wide | {"mask": torch.nn.functional.pad(batch["mask"], (0, 2))}


def test_the_minimiser_is_the_step():
    table, reference = cyclic_game()
    previous = np.random.default_rng(1).dirichlet(np.full(9, 2.0))
    found = minimiser(table, reference, previous, tau=0.3, eta=0.5)
    wanted = omd_step(previous, reference, table @ previous, tau=0.3, eta=0.5)
    assert np.abs(found - wanted).max() < 1e-6
    assert np.abs(wanted - previous).max() > 0.05


@pytest.mark.parametrize("tau", [1.0, 0.2, 0.05])
def test_the_equilibrium_is_one(tau: float):
    table, reference = cyclic_game()
    policy = regularised_nash(table, reference, tau=tau)
    # No step moves it, and no other policy is worth more against it.
    for eta in (tau, 3 * tau):
        np.testing.assert_allclose(
            omd_step(policy, reference, table @ policy, tau=tau, eta=eta), policy, atol=1e-10
        )

    def worth(other: Any) -> float:
        return other @ table @ policy - tau * (other * np.log(other / reference)).sum()

    others = np.random.default_rng(0).dirichlet(np.ones(9), size=50)
    assert max(worth(other) for other in others) < worth(policy)


def test_the_optimistic_step_comes_closer_with_a_constant_eta():
    table, reference = cyclic_game()
    nash = regularised_nash(table, reference, tau=0.05)

    def distance(step):
        policies = self_play(table, reference, tau=0.05, eta=lambda t: 0.5, iterations=50, step=step)
        return np.abs(policies[-1] - nash).sum()

    assert distance("optimistic") <= 0.01
    assert distance("plain") >= 0.05
    with pytest.raises(ValueError, match="'plain', 'optimistic' but got 'omd'"):
        self_play(table, reference, tau=0.05, step="omd")


def test_self_play_converges_with_decreasing_steps_only():
    table, reference = cyclic_game()
    wanted = regularised_nash(table, reference, tau=0.05)
    steady = self_play(table, reference, tau=0.05, eta=lambda t: 0.15, iterations=300)
    decreasing = self_play(table, reference, tau=0.05, iterations=300)
    assert np.abs(steady[-100:] - wanted).sum(1).min() > 0.3
    assert np.abs(decreasing[-1] - wanted).sum() < 0.02


PAIRS = torch.zeros(3, 2)


def test_no_pair_costs_nothing() -> None:
    none = torch.zeros(0, 2, requires_grad=True)
    loss = inpo_loss(none, none, none, torch.zeros(0), tau=0.1, eta=1.0)
    assert loss == 0
    loss.backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy": torch.zeros(3)}, r"expected policy, reference and previous of one shape \(P, 2\)"),
        ({"previous": torch.zeros(2, 2)}, r"but got \(3, 2\), \(3, 2\) and \(2, 2\)"),
        ({"preference": torch.full((3,), 1.5)}, r"expected preference \(3,\) in \[0, 1\] but got .* \[1.5"),
        ({"preference": torch.full((3,), math.nan)}, r"expected preference \(3,\) in \[0, 1\]"),
        ({"tau": 0.4}, "expected 0 < tau <= eta but got tau=0.4 and eta=0.3"),
        ({"tau": 0.0}, "expected 0 < tau <= eta"),
        ({"weight": torch.zeros(3)}, r"expected weight \(3,\), at least 0 and somewhere above"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str):
    settings: dict[str, Any] = {
        "policy": PAIRS,
        "reference": PAIRS,
        "previous": PAIRS,
        "tau": 0.1,
        "eta": 0.3,
    }
    with pytest.raises(ValueError, match=message):
        inpo_loss(**(settings | {"preference": torch.ones(3)} | change))


@pytest.mark.parametrize(
    ("preferences", "reference", "message"),
    [
        ([[0.5, 0.9]], [0.5, 0.5], r"expected preferences of shape \(N, N\), N >= 1, but got \(1, 2\)"),
        (
            [[0.5, 0.9], [0.2, 0.5]],
            [0.5, 0.5],
            r"expected preferences\[0, 1\] \+ preferences\[1, 0\] = 1 but got 0.9",
        ),
        ([[0.5, 1.9], [-0.9, 0.5]], [0.5, 0.5], r"expected preferences in \[0, 1\] but got -0.9 to 1.9"),
        (
            [[0.5, 0.9], [0.1, 0.5]],
            [1.0, 0.0],
            "expected reference to be 2 positive probabilities that sum to 1",
        ),
    ],
)
def test_games_that_are_none(preferences: Any, reference: Any, message: str):
    with pytest.raises(ValueError, match=message):
        self_play(preferences, reference, tau=0.1)
