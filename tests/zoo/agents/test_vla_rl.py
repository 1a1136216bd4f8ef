"""VLA-RL: tokens of actions, PPO on environment steps, BabyAI's rooms and expert, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from arcore.zoo.agents import vla_rl
from arcore.zoo.agents.vla_rl import Options, Progress, Sums, demonstrations, room_policy, run, table_policy
from arcore.zoo.agents.vla_rl.babyai import BINS, KINDS, LONGEST, SYMBOLS, VIEW, BabyAI
from arcore.zoo.agents.vla_rl.training import PPO, Trainer, clone, success


class Contract:
    """The table of sums: cloned from half-wrong demonstrations, then improved."""

    steps, margin = 25, 0.3

    def train(self, steps: int, seed: int, state: dict[str, Any] | None = None) -> dict[str, Any]:
        table, policy = Sums(64, seed), table_policy(seed=seed)
        if state is None:
            clone(policy, *table.demonstrations(2000, 0.45), steps=60, seed=seed)
        trainer = Trainer(policy, table, PPO(steps=8, lr=3e-3, warm_up=2), seed=seed)
        if state is not None:
            trainer.load(state["trainer"])
            table.generator.set_state(state["generator"])
            table.context = state["context"].clone()
        for _ in range(steps):
            trainer.advance()
        return {
            "trainer": trainer.state(), "generator": table.generator.get_state(), "context": table.context.clone()
        }  # fmt: skip

    def value(self, state: dict[str, Any], seed: int) -> float:
        policy = table_policy(seed=0)
        policy.load_state_dict(state["trainer"]["policy"])
        return success(policy, Sums(64, seed + 5), episodes=500, seed=seed)

    def baseline(self, seed: int) -> float:
        """Of the demonstrations."""
        context, actions = Sums(64, seed).demonstrations(2000, 0.45)
        return float((actions.sum(1) % 7 == context[:, 0]).float().mean())


@pytest.mark.parametrize("autoregressive", [True, False])
def test_probabilities_of_all_actions_sum_to_one(autoregressive: bool) -> None:
    policy = table_policy(seed=0, autoregressive=autoregressive)
    every = torch.cartesian_prod(torch.arange(7), torch.arange(7))
    logp, values = policy.score(torch.full((49, 1), 3), every)
    assert float(logp.sum(1).exp().sum().detach()) == pytest.approx(1, abs=1e-5)
    assert not values.any()
    second = logp.view(7, 7, 2)[..., 1]
    assert torch.allclose(second[0], second[1]) is not autoregressive


def test_drawn_and_scored_log_probabilities_are_the_same_numbers() -> None:
    policy = table_policy(seed=1)
    rows = torch.randint(0, 6, (40, 1), generator=torch.Generator().manual_seed(0))
    actions, logp, _ = policy.act(rows, torch.Generator().manual_seed(1), temperature=1.5)
    assert torch.equal(policy.score(rows, actions, temperature=1.5)[0].detach(), logp)


def test_only_the_critic_learns_while_it_warms_up() -> None:
    table, policy = Sums(16, 0), table_policy(seed=0)
    trainer = Trainer(policy, table, PPO(steps=4, warm_up=1), seed=0)
    before = {name: p.clone() for name, p in policy.state_dict().items()}
    trainer.advance()
    for name, p in policy.state_dict().items():
        assert torch.equal(p, before[name]) is not name.startswith("critic"), name
    trainer.advance()
    assert not torch.equal(policy.state_dict()["heads.0.0.weight"], before["heads.0.0.weight"])


def test_shaping_by_progress_telescopes() -> None:
    progress = Progress(0)
    rows = torch.zeros(3, VIEW + LONGEST, dtype=torch.int64)
    later = rows + 1
    paid = progress.shaping(0.9, 2.0)(rows, later, torch.tensor([False, True, False]))
    now, then = progress(rows).detach(), progress(later).detach()
    known = 2.0 * (0.9 * torch.where(torch.tensor([False, True, False]), 0.0, then) - now)
    torch.testing.assert_close(paid, known)


def rooms(**changes: Any) -> BabyAI:
    pytest.importorskip("minigrid")
    return BabyAI(vla_rl.LEVEL, 4, **{"seed": 3} | changes)


@pytest.mark.filterwarnings("ignore")
def test_the_expert_fulfils_missions_in_english() -> None:
    found = rooms(limit=4)
    rows = found.observe()
    assert rows.shape == (4, VIEW + LONGEST)
    assert rows.dtype == torch.int64
    assert int(rows.max()) < SYMBOLS
    assert found.seen[0]["mission"].startswith("go to ")
    assert (rows[:, VIEW] == KINDS * 6 + 1).all()  # "go"
    ended, won = 0, 0.0
    while ended < 24:
        rewards, ends = found.step(found.expert())
        ended, won = ended + int(ends.sum()), won + float(rewards.sum())
    assert won / ended >= 0.95


@pytest.mark.filterwarnings("ignore")
def test_random_actions_seldom_do_and_episodes_end_at_the_limit() -> None:
    found = rooms(limit=2)
    generator = torch.Generator().manual_seed(0)
    before = [0] * 4
    for _ in range(10):
        _, ends = found.step(torch.randint(0, BINS, (4, 2), generator=generator))
        before = [0 if end else count + 1 for count, end in zip(before, ends.tolist(), strict=True)]
        assert max(before) < 2
    assert success(room_policy(seed=0), rooms(limit=4), episodes=30, seed=0) < 0.6


@pytest.mark.filterwarnings("ignore")
def test_levels_that_are_won_half_of_the_time_are_drawn_more_often() -> None:
    found = rooms(levels=3)
    found.success[:] = [1.0, 0.5, 0.0]
    counts = [0, 0, 0]
    for _ in range(300):
        found._begin(0)
        counts[found.level[0]] += 1
    weights = [math.exp((0.5 - s) / found.temperature) for s in (1.0, 0.5, 0.0)]
    for count, weight in zip(counts, weights, strict=True):
        assert count / 300 == pytest.approx(weight / sum(weights), abs=0.09)


@pytest.mark.filterwarnings("ignore")
def test_demonstrations_are_corrupted_as_asked_and_know_their_progress() -> None:
    one = demonstrations(rooms(), 40, 0.0, 0)
    other = demonstrations(rooms(), 40, 1.0, 0)
    assert one[0].shape == (40, VIEW + LONGEST)
    assert torch.equal(one[0], other[0])  # the expert acts in both
    assert (one[1] != other[1]).any(1).float().mean() > 0.7
    assert ((one[2] >= 0) & (one[2] < 1)).all()
    assert one[2].max() > 0


@pytest.mark.filterwarnings("ignore")
def test_the_command_clones_and_improves(tmp_path: Path) -> None:
    pytest.importorskip("minigrid")
    few: dict[str, Any] = {"demonstrations": 64, "clone_steps": 3, "rollouts": 1, "rooms": 4, "episodes": 8}
    report = run(Options(progress=0.5, out=tmp_path / "p.safetensors", **few))
    assert "autoregressive head: cloned" in report.text
    assert len(report.values["curve"]) == 1
    assert (tmp_path / "p.safetensors").is_file()
    assert "sums, factorised head" in run(Options(env="sums", factorised=True, **few)).text
    guarded = run(Options(env="sums", guard=tmp_path / "guard.json", **few))
    assert set(guarded.values) == {"curve", "guarded"}
    assert "answers spent" in guarded.text
    assert run(Options(env="sums", guard=tmp_path / "guard.json", **few)).values["guarded"]["spent"] >= 0


def test_refuses() -> None:
    with pytest.raises(ValueError, match="--rooms: expected at least 1 but got 0"):
        Options(rooms=0)
    with pytest.raises(ValueError, match="--corrupted from 0 to 1"):
        Options(corrupted=2.0)
    pytest.importorskip("minigrid")
    with pytest.raises(ValueError, match="--env Nothing-v0: minigrid has no such level"):
        BabyAI("Nothing-v0", 1)
    with pytest.raises(ValueError, match="choose a GoTo level"):
        BabyAI("BabyAI-PickupLoc-v0", 1).observe()
