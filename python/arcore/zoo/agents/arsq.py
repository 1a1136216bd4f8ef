"""ARSQ: soft Q-learning whose values are log-probabilities of action tokens (Liu et al., arXiv:2502.00288).

A continuous action is written coarse to fine: at each of L levels, for each of D dimensions, one of B bins of the
interval that is left of that dimension. A network reads the state and where the intervals are by now, and gives u in
R^B for the next token; `A = u - alpha logsumexp(u / alpha)` is its soft advantage, and

    Q(s, a) = V(s) + sum over tokens of A,     policy of a token = softmax(u / alpha).

So `sum over actions of exp((Q - V) / alpha) = 1` whatever the weights are: V is the soft maximum of Q, and `Q - V` is
alpha times the policy's log-probability. With a head that does not see the earlier tokens, Q is a sum of terms of
single tokens, and cannot say that two tokens are good together only. Demonstrations of mixed quality train the
same Q, with a margin that keeps what they did above what they did not.

Left out: images and convolutional encoders of the paper's robot tasks.

Nearest neighbours here: VLA-RL, whose tokens have probabilities alone. Legend: N rows, K = L D tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from arcore._optional import require
from arcore.catalog import System
from arcore.catalog.claims import Claim, Row, at_least, at_most, equals, steps
from arcore.catalog.running import Report

SYSTEM = System(
    name="arsq",
    title="ARSQ",
    paper="arXiv:2502.00288",
    topic="agents",
    kind="agent",
    summary="Soft Q-learning over action tokens, coarse to fine, from demonstrations of mixed quality.",
    claim=(
        "Values of all actions are normalised exactly; where two tokens are good together only, the autoregressive "
        "head finds them and a factorised one does not; with mixed demonstrations of Pendulum it earns as much."
    ),
    checked_on="synthetic data",
)


class ActionValues(nn.Module):
    """Soft advantages of action tokens and the value of the state.

    Args:
        state: width of a state.
        dims: D.
        levels: L.
        bins: B.
        alpha: temperature.
        autoregressive: False hides the earlier tokens from the head.
        width: of the hidden layers.
    """

    def __init__(
        self,
        state: int,
        *,
        dims: int = 1,
        levels: int = 3,
        bins: int = 5,
        alpha: float = 0.05,
        autoregressive: bool = True,
        width: int = 128,
    ) -> None:
        super().__init__()
        if min(state, dims, levels, width) < 1 or bins < 2 or not alpha > 0:
            raise ValueError(
                f"arcore.ActionValues: expected state, dims, levels, width >= 1, bins >= 2 and alpha > 0 but got "
                f"{state}, {dims}, {levels}, {width}, {bins} and {alpha}"
            )
        self.dims, self.levels, self.bins, self.alpha = dims, levels, bins, alpha
        self.autoregressive = autoregressive
        self.tokens = levels * dims
        self.trunk = nn.Sequential(nn.Linear(state, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.place = nn.Parameter(0.1 * torch.randn(self.tokens, width))
        # Centres of the intervals, with their finer digits blown up so that each level can be told apart.
        self.centres = nn.Linear(dims * levels * bins, width)
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, bins))
        self.value = nn.Linear(width, 1)

    def advantages(self, states: Tensor, tokens: Tensor) -> Tensor:
        """`[N, S]` and int64 `[N, K]` (a token sees those before it) to normalised advantages `[N, K, B]`."""
        hidden = self.trunk(states)[:, None] + self.place
        if self.autoregressive:
            one_hot = nn.functional.one_hot(tokens, self.bins).to(states.dtype)
            seen = one_hot[:, None] * torch.ones(self.tokens, self.tokens).tril(-1)[None, :, :, None].to(
                states
            )
            hidden = hidden + self.centres(seen.flatten(2))
        u = self.head(hidden)
        out: Tensor = u - self.alpha * torch.logsumexp(u / self.alpha, -1, keepdim=True)
        return out

    def values(self, states: Tensor) -> Tensor:
        """`[N, S]` to `[N]`, the soft value V."""
        out: Tensor = self.value(self.trunk(states))[:, 0]
        return out

    def q(self, states: Tensor, tokens: Tensor) -> Tensor:
        """`[N]`, the values of actions."""
        taken = self.advantages(states, tokens).gather(-1, tokens[..., None])[..., 0]
        return self.values(states) + taken.sum(-1)

    @torch.no_grad()
    def act(self, states: Tensor, generator: torch.Generator | None) -> Tensor:
        """Tokens `[N, K]`, drawn from the policy, or its likeliest ones without a generator."""
        tokens = torch.zeros(len(states), self.tokens, dtype=torch.int64)
        for k in range(self.tokens):
            a = self.advantages(states, tokens)[:, k]
            law = (a / self.alpha).exp()
            tokens[:, k] = (
                a.argmax(-1) if generator is None else law.multinomial(1, generator=generator)[:, 0]
            )
        return tokens


def to_actions(tokens: Tensor, *, dims: int, levels: int, bins: int) -> Tensor:
    """int64 `[N, L * D]`, coarse to fine, to the centres of their intervals, `[N, D]` in [-1, 1]."""
    digits = tokens.view(-1, levels, dims).double()
    low, width = torch.full(digits[:, 0].shape, -1.0, dtype=torch.float64), 2.0
    for level in range(levels):
        width = width / bins
        low = low + digits[:, level] * width
    return (low + width / 2).float()


def to_tokens(actions: Tensor, *, dims: int, levels: int, bins: int) -> Tensor:
    """The tokens whose interval holds an action, `[N, D]` in [-1, 1] to int64 `[N, L * D]`.

    Raises:
        ValueError: an action is outside or no number.
    """
    if actions.dim() != 2 or actions.shape[1] != dims or not (actions.abs() <= 1 + 1e-6).all():
        raise ValueError(
            f"arcore.to_tokens: expected actions (N, {dims}) in [-1, 1] but got shape {tuple(actions.shape)}; divide "
            "by the largest action"
        )
    cells = bins**levels
    index = ((actions.double() + 1) / 2 * cells).floor().clamp(0, cells - 1).long()
    digits = [index // bins ** (levels - 1 - level) % bins for level in range(levels)]
    return torch.stack(digits, 1).flatten(1)


class Batch(NamedTuple):
    """Transitions.

    Attributes:
        states: `[N, S]`.
        tokens: `[N, K]`.
        rewards: `[N]`, of n steps, discounted.
        discounts: `[N]`, what multiplies the value after them; 0 where an episode ended.
        after: `[N, S]`, states after them.
        demo: bool `[N]`, from demonstrations.
    """

    states: Tensor
    tokens: Tensor
    rewards: Tensor
    discounts: Tensor
    after: Tensor
    demo: Tensor


class Learner:
    """Twin networks with slow copies.

    Args:
        state: width of a state.
        lr: learning rate.
        slow: share of the new weights in the copies after each update.
        margin: how far what demonstrations did stays above the rest.
        conservative: weight of that term.
        seed: of the weights.
        network: settings of `ActionValues`.
    """

    def __init__(
        self,
        state: int,
        *,
        lr: float = 1e-3,
        slow: float = 0.02,
        margin: float = 0.01,
        conservative: float = 0.1,
        seed: int = 0,
        **network: Any,
    ) -> None:
        torch.manual_seed(seed)
        self.twins = nn.ModuleList(ActionValues(state, **network) for _ in range(2))
        self.copies = nn.ModuleList(ActionValues(state, **network) for _ in range(2))
        self.copies.load_state_dict(self.twins.state_dict())
        self.copies.requires_grad_(False)
        self.slow, self.margin, self.conservative = slow, margin, conservative
        self.optimizer = torch.optim.Adam(self.twins.parameters(), lr=lr)

    def update(self, b: Batch) -> float:
        """One step; returns the loss."""
        with torch.no_grad():
            later = torch.minimum(*(net.values(b.after) for net in self.copies))  # type: ignore[operator]
            target = b.rewards + b.discounts * later
        loss = torch.zeros(())
        for net in self.twins:
            every = net.advantages(b.states, b.tokens)  # type: ignore[operator]
            taken = every.gather(-1, b.tokens[..., None])
            q = net.values(b.states) + taken[..., 0].sum(-1)  # type: ignore[operator]
            loss = loss + (q - target).square().mean()
            if self.conservative and bool(b.demo.any()):
                above = (every - taken)[b.demo].clamp(min=-self.margin)
                loss = loss + self.conservative * above.mean()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.twins.parameters(), 10.0)
        self.optimizer.step()
        with torch.no_grad():
            for one, other in zip(self.copies.parameters(), self.twins.parameters(), strict=True):
                one.lerp_(other, self.slow)
        return float(loss.detach())

    def act(self, states: Tensor, generator: torch.Generator | None) -> Tensor:
        """Tokens by the first network's policy."""
        return self.twins[0].act(states, generator)  # type: ignore[operator, no-any-return]


def every_action(net: ActionValues) -> Tensor:
    """All `B^K` token sequences, `[B^K, K]`."""
    return torch.cartesian_prod(*[torch.arange(net.bins)] * net.tokens).view(-1, net.tokens)


def normalisation_error(net: ActionValues, states: Tensor) -> float:
    """Largest `|sum over all actions of exp((Q - V) / alpha) - 1|`."""
    tokens = every_action(net)
    worst = 0.0
    for state in states:
        rows = state.expand(len(tokens), -1)
        total = ((net.q(rows, tokens) - net.values(rows)) / net.alpha).exp().sum()
        worst = max(worst, abs(float(total.detach()) - 1))
    return worst


def climb(*, autoregressive: bool, seed: int = 0, updates: int = 1500) -> tuple[float, float]:
    """Fit the table that is 1 at (0, 0), 0 in the rest of its row and column, and 0.6 elsewhere; 2 tokens of 4.

    Returns:
        The table's value of the likeliest action, and the mean squared error of Q.
    """
    table = torch.full((4, 4), 0.6)
    table[0], table[:, 0] = 0.0, 0.0
    table[0, 0] = 1.0
    torch.manual_seed(seed)
    net = ActionValues(1, dims=2, levels=1, bins=4, alpha=0.05, autoregressive=autoregressive, width=64)
    tokens = every_action(net)
    wanted = table[tokens[:, 0], tokens[:, 1]]
    state = torch.ones(len(tokens), 1)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    loss = torch.zeros(())
    for _ in range(updates):
        loss = (net.q(state, tokens) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    best = net.act(state[:1], None)[0]
    return float(table[best[0], best[1]]), float(loss.detach())


# -- Pendulum


def swing_up(observations: Any) -> Any:
    """A controller for Pendulum-v1: energy while it hangs, a damped spring when it stands. `[N, 3]` to `[N, 1]`."""
    cos, sin, speed = observations[:, 0], observations[:, 1], observations[:, 2]
    energy = speed**2 / 6 + 5 * (cos - 1)
    pump = np.where(np.abs(speed) < 0.05, 1.0, np.sign(speed)) * np.clip(-2 * energy, -1, 1)
    hold = np.clip(-(8 * sin + 2 * speed) / 2, -1, 1)
    return np.where((cos > 0.9) & (np.abs(speed) < 4), hold, pump)[:, None].astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Learning from mixed demonstrations and own episodes.

    Attributes:
        env: name of a gymnasium environment with box observations and actions.
        demos: .npz with states, actions (in [-1, 1]), rewards, after and ended. Default: made, for Pendulum-v1.
        demo_steps: of demonstrations to make: 30 percent by a controller, 70 percent by it and noise.
        steps: of the environment.
        rooms: environments that are acted in together.
        levels: L.
        bins: B.
        alpha: temperature, in units of scaled rewards.
        reward_scale: what rewards are multiplied by.
        discount: gamma.
        batch: transitions of an update, half of them demonstrations.
        updates: for each step of all rooms.
        factorised: a head that does not see earlier tokens.
        episodes: of the evaluation.
        out: file for the weights. Default: none.
        seed: decides everything random.
    """

    env: str = "Pendulum-v1"
    demos: Path | None = None
    demo_steps: int = 4000
    steps: int = 10000
    rooms: int = 8
    levels: int = 3
    bins: int = 5
    alpha: float = 0.02
    reward_scale: float = 0.1
    discount: float = 0.98
    batch: int = 256
    updates: int = 2
    factorised: bool = False
    episodes: int = 16
    out: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("demo_steps", "steps", "rooms", "levels", "batch", "updates", "episodes"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"--{name.replace('_', '-')}: expected at least 1 but got {getattr(self, name)}"
                )
        if self.bins < 2 or not self.alpha > 0 or not 0 < self.discount < 1:
            raise ValueError(
                f"expected --bins >= 2, --alpha > 0 and --discount in (0, 1) but got {self.bins}, {self.alpha} and "
                f"{self.discount}"
            )


class _Replay:
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


def _make(options: Options, count: int) -> Any:
    gymnasium = require("gymnasium", extra="agents")
    try:
        envs = gymnasium.make_vec(options.env, num_envs=count, vectorization_mode="sync")
    except gymnasium.error.Error as error:
        raise ValueError(f"--env {options.env}: gymnasium has no such environment ({error})") from None
    space = envs.single_action_space
    if not hasattr(space, "high") or len(envs.single_observation_space.shape) != 1:
        raise ValueError(f"--env {options.env}: expected rows of numbers as observations and actions")
    return envs


def learn(options: Options) -> tuple[float, float, Learner]:
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
    replay = _Replay(o.rooms, 3, o.discount)
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


def _demonstrations(
    o: Options, envs: Any, high: Any, sizes: dict[str, int], random: Any
) -> tuple[_Replay, float]:
    store = _Replay(o.rooms, 3, o.discount)
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


def _read(o: Options, store: _Replay, sizes: dict[str, int]) -> tuple[_Replay, float]:
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


def _evaluate(o: Options, learner: Learner, sizes: dict[str, int], high: Any) -> float:
    envs = _make(o, o.episodes)
    states, _ = envs.reset(seed=o.seed + 100)
    total, alive = np.zeros(o.episodes), np.ones(o.episodes, bool)
    while alive.any():
        actions = to_actions(learner.act(torch.as_tensor(states), None), **sizes).numpy() * high
        states, rewards, ended, cut, _ = envs.step(actions.astype(np.float32))
        total += rewards * alive
        alive &= ~(ended | cut)
    return float(total.mean())


def run(options: Options) -> Report:
    """Learn from demonstrations of mixed quality and from own episodes."""
    returned, earned, learner = learn(options)
    if options.out is not None:
        from arcore._files import atomic_path

        with atomic_path(options.out) as temporary:
            require("safetensors.torch", extra="zoo").save_file(learner.twins.state_dict(), temporary)
    head = "factorised" if options.factorised else "autoregressive"
    text = (
        f"{options.env}, {head} head: mean return {earned:.1f} over {options.episodes} episodes after "
        f"{options.steps} steps; the demonstrations' {returned:.1f}"
    )
    return Report(text, {"return": earned, "demonstrations": returned})


def claim(*, quick: bool) -> Claim:
    """Normalisation, the climb table, and (in full) Pendulum against the factorised head."""
    torch.manual_seed(0)
    worst = 0.0
    for dims, levels, bins, alpha in ((1, 3, 5, 1e-3), (2, 2, 3, 0.05), (3, 1, 4, 1.0)):
        net = ActionValues(4, dims=dims, levels=levels, bins=bins, alpha=alpha, width=32).double()
        worst = max(worst, normalisation_error(net, torch.randn(3, 4, dtype=torch.float64)))
    seeds = range(1 if quick else 3)
    ours = [climb(autoregressive=True, seed=seed, updates=400 if quick else 1500) for seed in seeds]
    plain = [climb(autoregressive=False, seed=seed, updates=400 if quick else 1500) for seed in seeds]
    rows: tuple[Row, ...] = (
        at_most("sum over all actions of exp(A / alpha), distance from 1", worst, 1e-10),
        equals("climb: value of the autoregressive head's action, least", min(v for v, _ in ours), 1.0),
        equals(
            "climb: value of the factorised head's action, largest",
            max(v for v, _ in plain),
            0.6,
            tolerance=1e-6,
        ),
        at_least("climb: error of the factorised head's Q, least", min(e for _, e in plain), 1e-2),
        at_most("climb: error of the autoregressive head's Q, largest", max(e for _, e in ours), 1e-3),
    )
    if not quick:
        ar = [learn(Options(seed=seed))[:2] for seed in range(3)]
        apart = [learn(Options(seed=seed, factorised=True))[1] for seed in range(3)]
        mean = sum(earned for _, earned in ar) / 3
        rows += (
            at_least(
                "Pendulum: mean return over the factorised head's, of 3 seeds", mean - sum(apart) / 3, 0
            ),
            at_least("Pendulum: over the demonstrations'", mean - sum(d for d, _ in ar) / 3, 100),
        )
    return Claim(rows)
