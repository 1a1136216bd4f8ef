"""What every agent must do. A system's test file has a class `Contract` like `GreedyBandit` below."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from .conftest import contracts


class GreedyBandit:
    """A test double: a bandit that mostly plays the arm that paid best so far.

    A contract of an agent has `train(steps, seed, state=None)`, which returns a state that a later call goes on from;
    `value(state, seed)`, the mean return of acting by it; and `baseline(seed)`, that of the behaviour policy or of
    chance, which the agent must beat by `margin` after `steps` steps.
    """

    steps, margin = 400, 0.15
    pays = torch.tensor([0.2, 0.5, 0.8])

    def train(self, steps: int, seed: int, state: dict[str, Any] | None = None) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        state = copy.deepcopy(state) or {
            "plays": torch.ones(3),
            "paid": torch.ones(3),
            "rng": generator.get_state(),
        }
        generator.set_state(state["rng"])
        for _ in range(steps):
            explore = torch.rand((), generator=generator) < 0.2
            arm = (
                torch.randint(3, (), generator=generator)
                if explore
                else (state["paid"] / state["plays"]).argmax()
            )
            state["plays"][arm] += 1
            state["paid"][arm] += (torch.rand((), generator=generator) < self.pays[arm]).float()
        return state | {"rng": generator.get_state()}

    def value(self, state: dict[str, Any], seed: int) -> float:
        return float(self.pays[(state["paid"] / state["plays"]).argmax()])

    def baseline(self, seed: int) -> float:
        return float(self.pays.mean())


@pytest.fixture(params=contracts("agent", GreedyBandit))
def contract(request: pytest.FixtureRequest) -> Any:
    return request.param()


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize("seed", [0, 1])
def test_beats_its_baseline(contract: Any, seed: int) -> None:
    state = contract.train(contract.steps, seed)
    assert contract.value(state, seed) >= contract.baseline(seed) + contract.margin


def test_training_is_seeded(contract: Any) -> None:
    few = max(2, contract.steps // 10)
    assert same(contract.train(few, 0), contract.train(few, 0))
    assert not same(contract.train(few, 0), contract.train(few, 1))


def test_training_goes_on_where_it_stopped(contract: Any) -> None:
    half = max(1, contract.steps // 20)
    whole = contract.train(2 * half, 0)
    assert same(contract.train(half, 0, contract.train(half, 0)), whole)
