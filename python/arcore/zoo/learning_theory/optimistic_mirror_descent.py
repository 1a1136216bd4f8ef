"""Optimistic online mirror descent, between stochastic and adversarial online learning (Chen et al., arXiv:2302.04552).

A learner plays x_t, then sees the gradient g_t of the round's loss there. Optimistic mirror descent plays after a step
with a guess M_t of the gradient, here the last one seen, and corrects with the one that came:

    x_t = argmin <M_t, x> + B(x, h_t) / eta_t,     h_{t+1} = argmin <g_t, x> + B(x, h_t) / eta_t .

Where losses are drawn from slowly changing distributions (SEA), regret grows with the root of their variance and of
their drift instead of the root of time. Step sizes are those of the paper: for convex losses
D / sqrt(1 + sum |g_s - M_s|^2) over the rounds before, for lambda-strongly convex ones 2 / (lambda t). In games whose
players both do so the last iterate goes to the equilibrium, where plain mirror descent circles around it and leaves.
Where losses are pure noise around one mean, the guess is noise too, and does not help.

Nearest neighbour here: INPO and SPO, which play such games; their step is the plain one. Not offered: the Newton step
for exp-concave losses, whose projection is another one, and the meta-learner for dynamic regret.

Legend: d width, T rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from arcore.catalog import System
from arcore.catalog.claims import Claim, at_least, at_most, steps
from arcore.nn.kinds import check_kinds

SYSTEM = System(
    name="optimistic_mirror_descent",
    title="Optimistic mirror descent (SEA)",
    paper="arXiv:2302.04552",
    paper_title="Optimistic Online Mirror Descent for Bridging Stochastic and Adversarial Online Convex Optimization",
    topic="learning_theory",
    kind="theory",
    summary="Online learning that steps with a guess of the next gradient, and corrects.",
    claim=(
        "In rock-paper-scissors the last iterate goes to the equilibrium where plain mirror descent leaves it; under "
        "slowly turning losses the regret is lower, and of strongly convex ones it grows like a logarithm."
    ),
    checked_on="closed form",
)

Array = NDArray[np.float64]
Domain = Literal["ball", "box", "simplex", "entropy"]


class MirrorDescent:
    """One learner.

        x = learner.play()
        learner.update(gradient_at_x)

    Args:
        start: `[d]`, first h; a point of the domain.
        domain: "ball" of `radius` around 0, "box" [-radius, radius]^d, or "simplex", all with Euclidean steps; or
            "entropy", the simplex with steps that multiply.
        radius: of ball and box.
        optimism: guess the last gradient; without it, M_t is 0 and this is plain mirror descent.
        step: eta of every round; None takes the paper's for convex losses.
        strong: lambda of strongly convex losses; takes its step. Not with `step`.

    Attributes:
        rounds: how many gradients it saw.
        deviation: sum of |g_t - M_t|^2 so far.

    Raises:
        ValueError: start is not in the domain, or a number is out of range.
    """

    @check_kinds
    def __init__(
        self,
        start: ArrayLike,
        *,
        domain: Domain = "ball",
        radius: float = 1.0,
        optimism: bool = True,
        step: float | None = None,
        strong: float | None = None,
    ) -> None:
        if domain not in ("ball", "box", "simplex", "entropy"):
            raise ValueError(
                f"arcore.MirrorDescent: expected domain to be ball, box, simplex or entropy but got {domain!r}; "
                "choose one"
            )
        if step is not None and strong is not None:
            raise ValueError("arcore.MirrorDescent: expected step or strong but got both; leave one out")
        for name, value in (("radius", radius), ("step", step), ("strong", strong)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"arcore.MirrorDescent: expected {name} > 0 but got {value}; it is a size")
        self.domain, self.radius, self.optimism = domain, radius, optimism
        self.step, self.strong = step, strong
        self.base = np.asarray(start, dtype=np.float64).copy()
        if self.base.ndim != 1 or not len(self.base) or not np.allclose(self._project(self.base), self.base):
            raise ValueError(
                f"arcore.MirrorDescent: expected start [d] in the {domain} but got {np.asarray(start)}; "
                "project it first"
            )
        if domain == "entropy" and not (self.base > 0).all():
            raise ValueError(
                "arcore.MirrorDescent: expected a positive start for steps that multiply but got a 0; it would stay 0"
            )
        self.guess = np.zeros_like(self.base)
        self.rounds, self.deviation = 0, 0.0

    @property
    def eta(self) -> float:
        """Step size of the coming round."""
        if self.step is not None:
            return self.step
        if self.strong is not None:
            return 2 / (self.strong * (self.rounds + 1))
        width = {"ball": 2 * self.radius, "box": 2 * self.radius * len(self.base) ** 0.5, "simplex": 2**0.5}
        # The largest KL divergence from the uniform point stands for the diameter.
        diameter = width.get(self.domain, math.log(max(len(self.base), 2)) ** 0.5)
        return float(diameter / math.sqrt(1.0 + self.deviation))

    def play(self) -> Array:
        """The point of this round, `[d]`."""
        return self._move(self.guess)

    def update(self, gradient: ArrayLike) -> None:
        """Learn the gradient at the point that was played.

        Args:
            gradient: `[d]`, finite.

        Raises:
            ValueError: another shape, or a value that is not finite.
        """
        found = np.asarray(gradient, dtype=np.float64)
        if found.shape != self.base.shape or not np.isfinite(found).all():
            raise ValueError(
                f"arcore.MirrorDescent: expected a finite gradient of shape {self.base.shape} but got {found}; it is "
                "that of the loss at play()"
            )
        self.base = self._move(found)
        self.deviation += float(((found - self.guess) ** 2).sum())
        self.rounds += 1
        if self.optimism:
            self.guess = found

    def _move(self, gradient: Array) -> Array:
        if self.domain == "entropy":
            logits = np.log(self.base) - self.eta * gradient
            # Far below the largest, weights would become 0 and never return.
            weights = np.exp(np.maximum(logits - logits.max(), -600.0))
            return np.asarray(weights / weights.sum())
        return self._project(self.base - self.eta * gradient)

    def _project(self, point: Array) -> Array:
        if self.domain == "ball":
            return np.asarray(point / max(1.0, float(np.linalg.norm(point)) / self.radius))
        if self.domain == "box":
            return np.clip(point, -self.radius, self.radius)
        falling = np.sort(point)[::-1]
        excess = (np.cumsum(falling) - 1) / np.arange(1, len(point) + 1)
        return np.maximum(point - excess[falling > excess][-1], 0.0)


@check_kinds
def play_game(payoff: ArrayLike, *, optimism: bool, step: float = 0.1, rounds: int = 4000) -> Array:
    """Both players of a zero-sum game learn at once; the first one's policies `[rounds, N]`, from (0.5, 0.3, 0.2).

    Args:
        payoff: `[3, 3]`, what the first gains.
        optimism: whether they guess.
        step: eta.
        rounds: how many.
    """
    table = np.asarray(payoff, dtype=np.float64)
    first, second = (
        MirrorDescent(start, domain="entropy", optimism=optimism, step=step)
        for start in ([0.5, 0.3, 0.2], [0.2, 0.5, 0.3])
    )
    played = []
    for _ in range(rounds):
        x, y = first.play(), second.play()
        first.update(-table @ y)
        second.update(table.T @ x)
        played.append(x)
    return np.array(played)


def regret(
    make: Callable[[], MirrorDescent],
    *,
    noise: float,
    drift: float,
    rounds: int,
    seed: int,
    strong: float = 0.0,
) -> float:
    """Regret under losses `<c_t, x> + strong |x|^2 / 2` whose c_t is noise around a slowly turning mean.

    It is against the best fixed point of the unit ball, in hindsight.

    Args:
        make: makes a learner on the unit ball in the plane.
        noise: standard deviation of each coordinate of c_t.
        drift: by how much of a turn the mean goes in all rounds.
        rounds: T.
        seed: of the noise.
        strong: curvature of the losses.
    """
    random, learner = np.random.default_rng(seed), make()
    angles = 2 * math.pi * drift * np.arange(rounds) / rounds
    costs = np.stack([np.cos(angles), np.sin(angles)], 1) + noise * random.standard_normal((rounds, 2))
    paid = 0.0
    for cost in costs:
        x = learner.play()
        paid += float(cost @ x + strong * x @ x / 2)
        learner.update(cost + strong * x)
    total = float(np.linalg.norm(costs.sum(0)))
    size = 1.0 if strong == 0 else min(1.0, total / (strong * rounds))
    return paid - (-size * total + strong * rounds * size**2 / 2)


_RPS = np.array([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]])


def claim(*, quick: bool) -> Claim:
    """The last iterate of a game, and regret under stochastic losses."""
    paths = {name: play_game(_RPS, optimism=name == "optimistic") for name in ("optimistic", "plain")}
    away = {name: np.abs(path - 1 / 3).sum(1) for name, path in paths.items()}
    seeds = range(2 if quick else 10)

    def mean(optimism: bool, noise: float, drift: float, rounds: int, strong: float | None = None) -> float:
        def make() -> MirrorDescent:
            return MirrorDescent([0.0, 0.0], optimism=optimism, strong=strong)

        return float(
            np.mean(
                [
                    regret(make, noise=noise, drift=drift, rounds=rounds, seed=seed, strong=strong or 0.0)
                    for seed in steps(len(seeds), "regret")
                ]
            )
        )

    calm = {optimism: mean(optimism, 0.02, 20.0, 2000) / 2000 for optimism in (True, False)}
    long, short = (mean(True, 0.5, 0.0, rounds, 4.0) for rounds in (4000, 1000))

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for name, distance in away.items():
            axes.semilogy(distance, label=name)
        axes.set(xlabel="round", ylabel="L1 distance to the equilibrium")
        axes.legend()

    return Claim(
        (
            at_most(
                "rock-paper-scissors, optimistic: last iterate to the equilibrium, L1",
                away["optimistic"][-1],
                1e-2,
            ),
            at_least("the same, plain", away["plain"][-1], 0.5),
            at_most(
                "regret per round under slowly turning losses, less that of plain descent",
                calm[True] - calm[False],
                -0.3,
            ),
            at_most("strongly convex: regret of 4 T rounds over that of T", long / short, 1.8),
        ),
        draw=draw,
    )
