"""Soft values of action tokens, the intervals that tokens stand for, and the learner of twin networks.

Legend: N rows, K = L D tokens, B bins.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from arcore.nn.kinds import check_kinds


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

    @check_kinds
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


@check_kinds
def to_actions(tokens: Tensor, *, dims: int, levels: int, bins: int) -> Tensor:
    """int64 `[N, L * D]`, coarse to fine, to the centres of their intervals, `[N, D]` in [-1, 1]."""
    digits = tokens.view(-1, levels, dims).double()
    low, width = torch.full(digits[:, 0].shape, -1.0, dtype=torch.float64), 2.0
    for level in range(levels):
        width = width / bins
        low = low + digits[:, level] * width
    return (low + width / 2).float()


@check_kinds
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
