"""Learning in gymnasium's environments from demonstrations of mixed quality and own episodes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from arcore._optional import require
from arcore.catalog.claims import steps
from arcore.zoo.agents.arsq.values import Batch, Learner, to_actions, to_tokens


def swing_up(observations: Any) -> Any:
    """A controller for Pendulum-v1: energy while it hangs, a damped spring when it stands. `[N, 3]` to `[N, 1]`."""
    cos, sin, speed = observations[:, 0], observations[:, 1], observations[:, 2]
    energy = speed**2 / 6 + 5 * (cos - 1)
    pump = np.where(np.abs(speed) < 0.05, 1.0, np.sign(speed)) * np.clip(-2 * energy, -1, 1)
    hold = np.clip(-(8 * sin + 2 * speed) / 2, -1, 1)
    return np.where((cos > 0.9) & (np.abs(speed) < 4), hold, pump)[:, None].astype(np.float32)


class Replay:
    """Steps of several rooms in order, drawn as transitions of n steps."""

    def __init__(self, rooms: int, n: int, discount: float) -> None:
        self.rooms, self.n, self.discount = rooms, n, discount
        self.rows: list[tuple[Any, Any, Any, Any, Any]] = []

    def add(self, states: Any, tokens: Any, rewards: Any, after: Any, cut: Any) -> None:
        self.rows.append((states, tokens, rewards, after, cut))

    def draw(self, count: int, generator: torch.Generator, demo: bool) -> Batch:
        at = torch.randint(len(self.rows), (count,), generator=generator).tolist()
        room = torch.randint(self.rooms, (count,), generator=generator).tolist()
        found: list[tuple[Any, ...]] = []
        for t, r in zip(at, room, strict=True):
            total, factor, last = 0.0, 1.0, t
            for k in range(t, min(t + self.n, len(self.rows))):
                total, factor, last = total + factor * float(self.rows[k][2][r]), factor * self.discount, k
                if self.rows[k][4][r]:
                    break
            found.append((self.rows[t][0][r], self.rows[t][1][r], total, factor, self.rows[last][3][r]))
        states, tokens, rewards, discounts, after = zip(*found, strict=True)
        return Batch(
            torch.as_tensor(np.stack(states)),
            torch.as_tensor(np.stack(tokens)),
            torch.tensor(rewards),
            torch.tensor(discounts),
            torch.as_tensor(np.stack(after)),
            torch.full((count,), demo),
        )


def _make(options: Any, count: int) -> Any:
    gymnasium = require("gymnasium", extra="agents")
    try:
        envs = gymnasium.make_vec(options.env, num_envs=count, vectorization_mode="sync")
    except gymnasium.error.Error as error:
        raise ValueError(f"--env {options.env}: gymnasium has no such environment ({error})") from None
    space = envs.single_action_space
    if not hasattr(space, "high") or len(envs.single_observation_space.shape) != 1:
        raise ValueError(f"--env {options.env}: expected rows of numbers as observations and actions")
    return envs


def learn(options: Any) -> tuple[float, float, Learner]:
    """Mean return of the demonstrations' episodes and of the learnt policy, and what was learnt."""
    o = options
    envs = _make(o, o.rooms)
    dims, high = envs.single_action_space.shape[0], envs.single_action_space.high
    sizes = {"dims": dims, "levels": o.levels, "bins": o.bins}
    generator = torch.Generator().manual_seed(o.seed)
    random = np.random.default_rng(o.seed)
    demos, returned = _demonstrations(o, envs, high, sizes, random)
    learner = Learner(
        envs.single_observation_space.shape[0],
        alpha=o.alpha,
        autoregressive=not o.factorised,
        seed=o.seed,
        **sizes,
    )
    replay = Replay(o.rooms, 3, o.discount)
    states, _ = envs.reset(seed=o.seed)
    fresh = np.zeros(o.rooms, bool)
    for step in steps(o.steps // o.rooms, f"ARSQ on {o.env}"):
        tokens = learner.act(torch.as_tensor(states), generator)
        actions = to_actions(tokens, **sizes).numpy() * high
        after, rewards, ended, cut, _ = envs.step(actions.astype(np.float32))
        # The step after an episode's end only begins the next one.
        if not fresh.any():
            replay.add(states, tokens.numpy(), rewards * o.reward_scale, after, ended | cut)
        states, fresh = after, ended | cut
        if step >= 4:
            for _ in range(o.updates):
                halves = [store.draw(o.batch // 2, generator, store is demos) for store in (demos, replay)]
                learner.update(Batch(*(torch.cat(pair) for pair in zip(*halves, strict=True))))
    return returned, _evaluate(o, learner, sizes, high), learner


def _demonstrations(o: Any, envs: Any, high: Any, sizes: dict[str, int], random: Any) -> tuple[Replay, float]:
    store = Replay(o.rooms, 3, o.discount)
    if o.demos is not None:
        return _read(o, store, sizes)
    if o.env != "Pendulum-v1":
        raise ValueError(f"--demos is needed for {o.env}: demonstrations are made for Pendulum-v1 alone")
    states, _ = envs.reset(seed=o.seed + 1)
    sums, episodes = 0.0, 0
    expert = random.random(o.rooms) < 0.3
    for _ in range(o.demo_steps // o.rooms):
        actions = swing_up(states)
        noise = random.uniform(-1, 1, actions.shape).astype(np.float32)
        mixed = np.where(expert[:, None] | (random.random((o.rooms, 1)) < 0.3), actions, noise)
        tokens = to_tokens(torch.as_tensor(mixed), **sizes)
        after, rewards, ended, cut, _ = envs.step(mixed * high)
        store.add(states, tokens.numpy(), rewards * o.reward_scale, after, ended | cut)
        sums += float(rewards.sum())
        states = after
        if (ended | cut).any():
            expert = random.random(o.rooms) < 0.3
            episodes += int((ended | cut).sum())
            states, _ = envs.reset()
    return store, sums / max(episodes, 1)


def _read(o: Any, store: Replay, sizes: dict[str, int]) -> tuple[Replay, float]:
    assert o.demos is not None
    if not o.demos.is_file():
        raise FileNotFoundError(f"--demos: there is no file {o.demos}")
    with np.load(o.demos) as found:
        missing = [name for name in ("states", "actions", "rewards", "after", "ended") if name not in found]
        if missing:
            raise ValueError(
                f"{o.demos}: expected arrays states, actions, rewards, after and ended but {missing} is missing"
            )
        states, actions, rewards, after, ended = (
            found[name] for name in ("states", "actions", "rewards", "after", "ended")
        )
    tokens = to_tokens(torch.as_tensor(actions, dtype=torch.float32), **sizes).numpy()
    store.rooms = 1
    for row in range(len(states)):
        store.add(
            states[row : row + 1].astype(np.float32),
            tokens[row : row + 1],
            rewards[row : row + 1] * o.reward_scale,
            after[row : row + 1].astype(np.float32),
            ended[row : row + 1],
        )
    return store, float(rewards.sum() / max(1, ended.sum()))


def _evaluate(o: Any, learner: Learner, sizes: dict[str, int], high: Any) -> float:
    envs = _make(o, o.episodes)
    states, _ = envs.reset(seed=o.seed + 100)
    total, alive = np.zeros(o.episodes), np.ones(o.episodes, bool)
    while alive.any():
        actions = to_actions(learner.act(torch.as_tensor(states), None), **sizes).numpy() * high
        states, rewards, ended, cut, _ = envs.step(actions.astype(np.float32))
        total += rewards * alive
        alive &= ~(ended | cut)
    return float(total.mean())
