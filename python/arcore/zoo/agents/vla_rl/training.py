"""Behaviour cloning, and PPO on environment steps whose actions are several tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from arcore.nn.kinds import check_kinds
from arcore.objectives import gae, ppo_loss, turn_logprobs, value_loss
from arcore.zoo.agents.vla_rl.policy import ActionPolicy


class Rooms(Protocol):
    """B environments that are acted in together; an episode that ends is followed by a new one."""

    def observe(self) -> Tensor:
        """int64 `[B, ...]`."""
        ...

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Rewards `[B]` and which episodes ended, bool `[B]`."""
        ...


@dataclass(frozen=True, kw_only=True)
class PPO:
    """Settings, by default those of the published code where they do not depend on the size of the model.

    Attributes:
        steps: environment steps of a rollout.
        epochs: passes over a rollout.
        batch: environment steps of an update.
        lr: of the policy.
        critic_lr: of the critic.
        warm_up: first rollouts in which only the critic learns.
        clip: of the ratio, per environment step.
        value_clip: of the values.
        discount: gamma.
        smoothing: lambda.
        temperature: of the draws.
        max_grad_norm: gradients are scaled down to this norm.
    """

    steps: int = 16
    epochs: int = 2
    batch: int = 256
    lr: float = 1e-3
    critic_lr: float = 3e-3
    warm_up: int = 5
    clip: float = 0.2
    value_clip: float = 0.2
    discount: float = 0.99
    smoothing: float = 0.95
    temperature: float = 1.0
    max_grad_norm: float = 1.0


@check_kinds
def clone(
    policy: ActionPolicy,
    observations: Tensor,
    actions: Tensor,
    *,
    steps: int,
    seed: int,
    batch: int = 256,
    lr: float = 2e-3,
) -> float:
    """Behaviour cloning by maximum likelihood; returns the last loss, nats per action.

    Args:
        policy: trained in place.
        observations: `[N, ...]` of demonstrations.
        actions: int64 `[N, K]`.
        steps: optimiser steps.
        seed: of the batches.
        batch: rows of a step.
        lr: largest learning rate; it falls to 0.
    """
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    loss = torch.zeros(())
    for _ in range(steps):
        rows = torch.randint(len(observations), (batch,), generator=generator)
        logp, _ = policy.score(observations[rows], actions[rows])
        loss = -logp.sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return float(loss.detach())


class Trainer:
    """PPO on a policy: ratio, clip and advantages belong to an action, whose log-probability is a sum over tokens.

    Args:
        policy: trained in place.
        rooms: where it acts.
        settings: of PPO.
        seed: of draws and batches.
        shaping: what is added to the rewards, from observations before and after and which episodes ended.
    """

    def __init__(
        self,
        policy: ActionPolicy,
        rooms: Rooms,
        settings: PPO,
        *,
        seed: int,
        shaping: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        self.policy, self.rooms, self.settings, self.shaping = policy, rooms, settings, shaping
        critic = list(policy.critic.parameters())
        inside = {id(p) for p in critic}
        actor = [p for p in policy.parameters() if id(p) not in inside]
        self.optimizer = torch.optim.Adam(
            [{"params": actor, "lr": settings.lr}, {"params": critic, "lr": settings.critic_lr}]
        )
        self.generator = torch.Generator().manual_seed(seed)
        self.rollouts = 0

    def advance(self) -> dict[str, float]:
        """One rollout and its updates; mean reward of the episodes that ended, and the share of them won."""
        s, policy = self.settings, self.policy
        seen, acted, logps, values, rewards, ends = [], [], [], [], [], []
        for _ in range(s.steps):
            observation = self.rooms.observe()
            action, logp, value = policy.act(observation, self.generator, temperature=s.temperature)
            reward, ended = self.rooms.step(action)
            seen.append(observation)
            acted.append(action)
            logps.append(logp)
            values.append(value)
            rewards.append(reward)
            ends.append(ended)
        after = self.rooms.observe()
        won = torch.stack(rewards, 1)
        done = torch.stack(ends, 1)
        if self.shaping is not None:
            later = [*seen[1:], after]
            extra = [self.shaping(one, other, end) for one, other, end in zip(seen, later, ends, strict=True)]
            paid = won + torch.stack(extra, 1)
        else:
            paid = won
        with torch.no_grad():
            last = policy.critic(policy.encoder(after))[:, 0]
        old_values = torch.stack(values, 1)
        found = gae(paid, old_values, discount=s.discount, smoothing=s.smoothing, done=done, last=last)
        flat = {
            "seen": torch.stack(seen, 1).flatten(0, 1),
            "acted": torch.stack(acted, 1).flatten(0, 1),
            "old": torch.stack(logps, 1).flatten(0, 1).sum(-1),
            "values": old_values.flatten(),
            "advantages": found.advantages.flatten(),
            "returns": found.returns.flatten(),
        }
        warm = self.rollouts < s.warm_up
        for _ in range(s.epochs):
            for rows in torch.randperm(len(flat["old"]), generator=self.generator).split(s.batch):
                self._update({name: value[rows] for name, value in flat.items()}, warm)
        self.rollouts += 1
        ended_now = int(done.sum())
        return {
            "success": float(won.sum()) / max(ended_now, 1),
            "episodes": float(ended_now),
            "value_error": float((found.returns - old_values).square().mean()),
        }

    def _update(self, b: dict[str, Tensor], warm: bool) -> None:
        s, policy = self.settings, self.policy
        logp, value = policy.score(b["seen"], b["acted"], temperature=s.temperature)
        one = torch.ones(len(value), 1, dtype=torch.bool)
        turns = torch.zeros(logp.shape, dtype=torch.int64)
        action = turn_logprobs(logp, turns, 1)
        critic = value_loss(
            value[:, None], b["returns"][:, None], one, old=b["values"][:, None], clip=s.value_clip
        )
        gain = b["advantages"]
        gain = (gain - gain.mean()) / (gain.std() + 1e-8) if len(gain) > 1 else gain
        loss = (
            critic if warm else critic + ppo_loss(action, b["old"][:, None], gain[:, None], one, clip=s.clip)
        )
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), s.max_grad_norm)
        if warm:
            for p in self.optimizer.param_groups[0]["params"]:
                p.grad = None
        self.optimizer.step()

    def state(self) -> dict[str, Any]:
        """What a later run goes on from."""
        return {
            "policy": {name: p.clone() for name, p in self.policy.state_dict().items()},
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "rollouts": self.rollouts,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.policy.load_state_dict(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.rollouts = state["rollouts"]


@check_kinds
def success(
    policy: ActionPolicy, rooms: Rooms, *, episodes: int, seed: int, temperature: float = 1.0
) -> float:
    """Share of so many episodes that are won by drawing from the policy."""
    return float(wins(policy, rooms, episodes=episodes, seed=seed, temperature=temperature).mean())


@torch.no_grad()
def wins(policy: ActionPolicy, rooms: Rooms, *, episodes: int, seed: int, temperature: float = 1.0) -> Tensor:
    """Whether each of at least so many episodes is won, 0 or 1, `[N]`; those that end together all count."""
    generator = torch.Generator().manual_seed(seed)
    found: list[Tensor] = []
    while sum(map(len, found)) < episodes:
        actions, _, _ = policy.act(rooms.observe(), generator, temperature=temperature)
        rewards, ends = rooms.step(actions)
        found.append(rewards[ends])
    return torch.cat(found)
