"""ARSQ: normalised values, tokens and intervals, n-step transitions, the climb table, and what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from arcore.zoo.agents.arsq import Options, run
from arcore.zoo.agents.arsq.episodes import Replay, learn, swing_up
from arcore.zoo.agents.arsq.values import (
    ActionValues,
    Batch,
    Learner,
    climb,
    every_action,
    normalisation_error,
    to_actions,
    to_tokens,
)


class Contract:
    """One state; the reward of two tokens is the climb table, and half of the transitions are demonstrations."""

    steps, margin = 300, 0.15

    def __init__(self) -> None:
        self.table = torch.full((4, 4), 0.6)
        self.table[0], self.table[:, 0] = 0.0, 0.0
        self.table[0, 0] = 1.0

    def learner(self) -> Learner:
        return Learner(1, dims=2, levels=1, bins=4, alpha=0.05, width=32, lr=3e-3, seed=0)

    def train(self, steps: int, seed: int, state: dict[str, Any] | None = None) -> dict[str, Any]:
        learner, generator = self.learner(), torch.Generator().manual_seed(seed)
        if state is not None:
            state = copy.deepcopy(state)
            learner.twins.load_state_dict(state["twins"])
            learner.copies.load_state_dict(state["copies"])
            learner.optimizer.load_state_dict(state["optimizer"])
            generator.set_state(state["generator"])
        for _ in range(steps):
            tokens = torch.randint(0, 4, (32, 2), generator=generator)
            ones = torch.ones(32, 1)
            reward = self.table[tokens[:, 0], tokens[:, 1]]
            learner.update(
                Batch(ones, tokens, reward, torch.zeros(32), ones, torch.zeros(32, dtype=torch.bool))
            )
        return copy.deepcopy({
            "twins": dict(learner.twins.state_dict()), "copies": dict(learner.copies.state_dict()),
            "optimizer": learner.optimizer.state_dict(), "generator": generator.get_state(),
        })  # fmt: skip

    def value(self, state: dict[str, Any], seed: int) -> float:
        learner = self.learner()
        learner.twins.load_state_dict(state["twins"])
        tokens = learner.act(torch.ones(500, 1), torch.Generator().manual_seed(seed))
        return float(self.table[tokens[:, 0], tokens[:, 1]].mean())

    def baseline(self, seed: int) -> float:
        return float(self.table.mean())


@pytest.mark.parametrize("alpha", [1e-3, 0.05, 1.0])
@pytest.mark.parametrize("autoregressive", [True, False])
def test_values_of_all_actions_are_normalised(alpha: float, autoregressive: bool) -> None:
    torch.manual_seed(0)
    net = ActionValues(
        3, dims=2, levels=2, bins=3, alpha=alpha, autoregressive=autoregressive, width=16
    ).double()
    states = torch.randn(2, 3, dtype=torch.float64)
    assert normalisation_error(net, states) <= 1e-10
    # The policy's log-probability is (Q - V) / alpha; draws follow it.
    tokens = every_action(net)
    rows = states[:1].expand(len(tokens), -1)
    law = ((net.q(rows, tokens) - net.values(rows)) / alpha).exp().detach()
    drawn = net.act(states[:1].expand(4000, -1), torch.Generator().manual_seed(1))
    index = (drawn * 3 ** torch.arange(3, -1, -1)).sum(1)
    counts = torch.bincount(index, minlength=81) / 4000
    assert (counts - law).abs().max() <= 0.04


def test_tokens_are_the_intervals_of_actions() -> None:
    generator = torch.Generator().manual_seed(0)
    for dims, levels, bins in ((1, 3, 5), (3, 2, 4), (2, 1, 7)):
        sizes = {"dims": dims, "levels": levels, "bins": bins}
        actions = 2 * torch.rand(200, dims, generator=generator) - 1
        tokens = to_tokens(actions, **sizes)
        assert tokens.shape == (200, levels * dims)
        assert (to_actions(tokens, **sizes) - actions).abs().max() <= 1 / bins**levels + 1e-6
        assert torch.equal(to_tokens(to_actions(tokens, **sizes), **sizes), tokens)
    edge = to_tokens(torch.tensor([[-1.0], [1.0]]), dims=1, levels=2, bins=5)
    assert edge.tolist() == [[0, 0], [4, 4]]
    with pytest.raises(ValueError, match=r"expected actions \(N, 1\) in \[-1, 1\].*divide by the largest"):
        to_tokens(torch.tensor([[2.0]]), dims=1, levels=2, bins=5)
    with pytest.raises(ValueError, match="expected actions"):
        to_tokens(torch.tensor([[float("nan")]]), dims=1, levels=2, bins=5)


def test_transitions_of_three_steps_end_with_their_episode() -> None:
    store = Replay(1, 3, 0.5)
    for t in range(5):
        one = np.array([[float(t)]], dtype=np.float32)
        store.add(one, np.array([[0]]), np.array([1.0 + t]), one + 1, np.array([t == 3]))
    batch = store.draw(200, torch.Generator().manual_seed(0), True)
    assert batch.demo.all()
    known = {0: (1 + 0.5 * 2 + 0.25 * 3, 0.125, 3), 2: (3 + 0.5 * 4, 0.25, 4), 3: (4, 0.5, 4), 4: (5, 0.5, 5)}
    for start, (reward, discount, after) in known.items():
        rows = batch.states[:, 0] == start
        assert rows.any()
        assert (batch.rewards[rows] == reward).all()
        assert (batch.discounts[rows] == discount).all()
        assert (batch.after[rows, 0] == after).all()


def test_the_margin_lifts_what_demonstrations_did() -> None:
    learner = Learner(1, dims=1, levels=1, bins=3, alpha=0.5, width=16, conservative=5.0, seed=0)
    ones = torch.ones(8, 1)

    def advantages() -> Tensor:
        tokens = torch.zeros(1, 1, dtype=torch.int64)
        return learner.twins[0].advantages(ones[:1], tokens)[0, 0].detach()  # type: ignore[operator]

    worst = int(advantages().argmin())
    tokens = torch.full((8, 1), worst)
    for _ in range(100):
        learner.update(
            Batch(ones, tokens, torch.zeros(8), torch.zeros(8), ones, torch.ones(8, dtype=torch.bool))
        )
    a = advantages()
    others = [float(a[k]) for k in range(3) if k != worst]
    assert float(a[worst]) - max(others) >= 0.009


@pytest.mark.slow
def test_two_tokens_that_are_good_together_only() -> None:
    assert climb(autoregressive=True, updates=1500)[0] == 1.0
    assert climb(autoregressive=False, updates=1500)[0] == pytest.approx(0.6)


@pytest.mark.filterwarnings("ignore")
def test_pendulum_learns_from_made_and_from_given_demonstrations(tmp_path: Path) -> None:
    pytest.importorskip("gymnasium")
    few: dict[str, Any] = {
        "steps": 80,
        "demo_steps": 64,
        "episodes": 2,
        "rooms": 4,
        "batch": 16,
        "updates": 1,
    }
    report = run(Options(out=tmp_path / "w.safetensors", **few))
    assert -2000 < report.values["return"] < 0
    assert (tmp_path / "w.safetensors").is_file()
    states = np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32)
    content = {"states": states, "actions": np.zeros((30, 1)), "rewards": np.zeros(30), "after": states}
    np.savez(tmp_path / "d.npz", **content, ended=np.arange(30) % 10 == 9)
    assert learn(Options(demos=tmp_path / "d.npz", **few))[0] == 0
    np.savez(tmp_path / "e.npz", **content)
    with pytest.raises(ValueError, match=r"expected arrays states, .* but \['ended'\] is missing"):
        learn(Options(demos=tmp_path / "e.npz", **few))
    with pytest.raises(FileNotFoundError, match="--demos: there is no file"):
        learn(Options(demos=tmp_path / "f.npz", **few))
    with pytest.raises(ValueError, match="gymnasium has no such environment"):
        learn(Options(env="Nothing-v0", **few))
    with pytest.raises(ValueError, match="--env CartPole-v1: expected rows of numbers"):
        learn(Options(env="CartPole-v1", **few))


def test_the_controller_pumps_when_it_hangs_and_holds_when_it_stands() -> None:
    hanging = np.array([[-1.0, 0.0, 1.0], [-1.0, 0.0, -1.0]], dtype=np.float32)
    assert swing_up(hanging)[:, 0].tolist() == [1.0, -1.0]
    standing = np.array([[0.99, 0.1, 0.0]], dtype=np.float32)
    assert swing_up(standing)[0, 0] < 0


def test_refuses() -> None:
    with pytest.raises(ValueError, match=r"bins >= 2 and alpha > 0 but got 3, 1, 3, 128, 1 and 0.05"):
        ActionValues(3, bins=1)
    with pytest.raises(ValueError, match="--steps: expected at least 1"):
        Options(steps=0)
    with pytest.raises(ValueError, match="--alpha > 0"):
        Options(alpha=0.0)
