"""INPO: iterative Nash policy optimisation, self-play against preferences that need no score (Zhang et al.,
arXiv:2407.00617).

Preferences of people may go round in a circle, and then no reward explains them; what remains is the equilibrium of the
game between two policies, each drawn towards a reference by tau KL. Online mirror descent plays it against itself: with
P(y > pi_t) the chance that y is preferred to a response of the last policy,

    pi_{t+1} = exp(P(y > pi_t) / eta) ref^(tau / eta) pi_t^(1 - tau / eta) / Z .

The loss finds this step from pairs drawn from pi_t, without P or Z. For responses a and b, with D = log-probability of
a less that of b, and p the probability that a is preferred,

    h = D_pi - (tau / eta) D_ref - (1 - tau / eta) D_prev,     p (h - 1 / 2 eta)^2 + (1 - p) (h + 1 / 2 eta)^2 .

With prev = ref it is IPO (arXiv:2310.12036) with beta = eta. With a constant eta = 3 tau, as in practice, where a few
steps are taken, the exact steps *cycle* on a strongly cyclic game at small tau; with eta_t = tau (t + 2) / 2 they
converge.

Nearest neighbour here: SRPO, whose solution does not depend on where the pairs come from. Legend: P pairs, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from arcore.catalog import System
from arcore.catalog.claims import Claim, at_least, at_most
from arcore.nn.kinds import check_kinds
from arcore.zoo.alignment._games import Vector, checked, cyclic_game, omd_step, regularised_nash

SYSTEM = System(
    name="inpo",
    title="INPO",
    paper="arXiv:2407.00617",
    paper_title="Iterative Nash Policy Optimization: Aligning LLMs with General Preferences via No-Regret Learning",
    topic="alignment",
    kind="objective",
    summary="Self-play towards the equilibrium of preferences, one regression on pairs per step.",
    claim=(
        "The loss's minimiser is the step of online mirror descent; with decreasing steps self-play reaches the "
        "equilibrium of a cyclic game, and with constant ones at a small tau it cycles."
    ),
    checked_on="closed form",
    reported="a length-controlled win rate of 42.6 % on AlpacaEval 2 from a Llama-3-8B SFT model",
)


@check_kinds
def inpo_loss(
    policy: Tensor,
    reference: Tensor,
    previous: Tensor,
    preference: Tensor,
    *,
    tau: float,
    eta: float,
    weight: Tensor | None = None,
) -> Tensor:
    """Mean loss of pairs of responses; scalar.

    Args:
        policy: `[P, 2]` log-probabilities of both responses, with gradient (`arcore.objectives.sequence_logprob`).
        reference: `[P, 2]` under the frozen model.
        previous: `[P, 2]` under the policy that drew them.
        preference: `[P]` probability that the first is preferred; 1.0 for a decided winner.
        tau: weight of the KL divergence from the reference, above 0.
        eta: inverse of the step's size, at least tau.
        weight: `[P]`, how much each pair counts in the mean; None for all alike.

    Raises:
        ValueError: shapes differ, a preference is out of [0, 1], or not 0 < tau <= eta.
    """
    if policy.dim() != 2 or policy.shape[1] != 2 or {reference.shape, previous.shape} != {policy.shape}:
        raise ValueError(
            "arcore.inpo_loss: expected policy, reference and previous of one shape (P, 2) but got "
            f"{tuple(policy.shape)}, {tuple(reference.shape)} and {tuple(previous.shape)}; give sums over tokens"
        )
    if preference.shape != policy.shape[:1] or not ((preference >= 0) & (preference <= 1)).all():
        raise ValueError(
            f"arcore.inpo_loss: expected preference ({len(policy)},) in [0, 1] but got shape {tuple(preference.shape)} "
            f"with values {preference.flatten()[:4].tolist()}; it is the probability that the first is preferred"
        )
    _check_steps("arcore.inpo_loss", tau, eta)
    share, target = tau / eta, 1 / (2 * eta)
    gap = policy - share * reference.detach() - (1 - share) * previous.detach()
    h = gap[:, 0] - gap[:, 1]
    loss = preference * (h - target) ** 2 + (1 - preference) * (h + target) ** 2
    if weight is None:
        return loss.mean() if len(loss) else loss.sum()
    if weight.shape != loss.shape or not (weight >= 0).all() or not weight.any():
        raise ValueError(
            f"arcore.inpo_loss: expected weight ({len(loss)},), at least 0 and somewhere above, but got shape "
            f"{tuple(weight.shape)}; leave it out to count all pairs alike"
        )
    return (weight * loss).sum() / weight.sum()


def _check_steps(name: str, tau: float, eta: float) -> None:
    if not 0 < tau <= eta < float("inf"):
        raise ValueError(
            f"{name}: expected 0 < tau <= eta but got tau={tau} and eta={eta}; beyond it the last policy's weight "
            "would be negative"
        )


@check_kinds
def self_play(
    preferences: ArrayLike,
    reference: ArrayLike,
    *,
    tau: float,
    eta: Callable[[int], float] | None = None,
    iterations: int = 50,
    step: Literal["plain", "optimistic"] = "plain",
) -> Vector:
    """The exact steps, from the reference.

    Args:
        preferences: `[N, N]`, row preferred to column.
        reference: `[N]` positive probabilities.
        tau: weight of the KL divergence.
        eta: of step t = 0, 1, ...; None takes tau (t + 2) / 2.
        iterations: how many.
        step: "optimistic" plays after a step with the last gain seen as a guess of the next one, and then corrects
            (see `optimistic_mirror_descent`), which does not circle around the equilibrium.

    Returns:
        `[iterations + 1, N]` policies that were played.

    Raises:
        ValueError: no preferences, no distribution, or not 0 < tau <= eta.
    """
    table, start = checked(preferences), np.asarray(reference, dtype=np.float64)
    if start.shape != table.shape[:1] or not (start > 0).all() or abs(start.sum() - 1) > 1e-9:
        raise ValueError(
            f"expected reference to be {len(table)} positive probabilities that sum to 1 but got shape {start.shape}, "
            f"sum {start.sum():g}; a response of probability 0 could never be chosen"
        )
    if step not in ("plain", "optimistic"):
        raise ValueError(f"expected step to be 'plain' or 'optimistic' but got {step!r}")
    policies = [start]
    corrected = start
    for t in range(iterations):
        now = tau * (t + 2) / 2 if eta is None else eta(t)
        _check_steps("arcore.self_play", tau, now)
        gain = table @ policies[-1]
        if step == "plain":
            corrected = policies[-1]
        elif t > 0:
            corrected = omd_step(corrected, start, gain, tau=tau, eta=now)
        policies.append(omd_step(corrected, start, gain, tau=tau, eta=now))
    return np.stack(policies)


def minimiser(preferences: Vector, reference: Vector, previous: Vector, *, tau: float, eta: float) -> Vector:
    """The policy that minimises the loss over all pairs drawn from `previous`.

    It is a table of an autoregressive model: logits of the first letter and of the second after each first, of 9
    responses of two letters.
    """
    first, second = (torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in ((3,), (3, 3)))
    one, other = (place.flatten() for place in np.indices((9, 9)))
    log = {"reference": torch.from_numpy(np.log(reference)), "previous": torch.from_numpy(np.log(previous))}
    pairs = torch.from_numpy(np.stack([one, other], 1))
    weight = torch.from_numpy(previous[one] * previous[other])
    wins = torch.from_numpy(preferences[one, other])

    def logprobs() -> Tensor:
        return (first.log_softmax(0)[:, None] + second.log_softmax(1)).flatten()

    optimizer = torch.optim.LBFGS(
        [first, second],
        max_iter=500,
        tolerance_grad=1e-13,
        tolerance_change=1e-18,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = inpo_loss(
            logprobs()[pairs],
            log["reference"][pairs],
            log["previous"][pairs],
            wins,
            tau=tau,
            eta=eta,
            weight=weight,
        )
        value.backward()
        return value

    optimizer.step(closure)
    return np.asarray(logprobs().detach().exp().numpy())


def claim(*, quick: bool) -> Claim:
    """The minimiser against the step, and self-play against the equilibrium."""
    table, reference = cyclic_game()
    random = np.random.default_rng(0)
    apart = 0.0
    for _ in range(1 if quick else 10):
        previous = random.dirichlet(np.full(9, 3.0))
        found = minimiser(table, reference, previous, tau=0.2, eta=0.6)
        wanted = omd_step(previous, reference, table @ previous, tau=0.2, eta=0.6)
        apart = max(apart, float(np.abs(found - wanted).max()))
    three = np.array([[0.5, 0.9, 0.2], [0.1, 0.5, 0.7], [0.8, 0.3, 0.5]])
    start = np.array([0.6, 0.3, 0.1])

    def distance(game: Vector, ref: Vector, tau: float, count: int, constant: float | None = None) -> Vector:
        eta = None if constant is None else lambda t: constant
        policies = self_play(game, ref, tau=tau, eta=eta, iterations=count)
        return np.asarray(np.abs(policies - regularised_nash(game, ref, tau=tau)).sum(1))

    small, cycling = distance(table, reference, 0.05, 2000), distance(table, reference, 0.05, 2000, 0.15)

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        axes.loglog(np.arange(1, 2002), small, label="eta = tau (t + 2) / 2")
        axes.loglog(np.arange(1, 2002), cycling, label="eta = 3 tau")
        axes.set(xlabel="step", ylabel="L1 distance to the equilibrium")
        axes.legend()

    return Claim(
        (
            at_most("minimiser of the loss against the step, largest difference", apart, 1e-5),
            at_most(
                "three responses, tau 0.2: L1 to the equilibrium after 50 steps",
                distance(three, start, 0.2, 50)[-1],
                0.02,
            ),
            at_most(
                "three responses, tau 0.05: after 200 steps", distance(three, start, 0.05, 200)[-1], 0.02
            ),
            at_most("nine responses, tau 0.05: after 2000 steps", small[-1], 0.02),
            at_least("the same with eta = 3 tau: least of the last 1000 steps", cycling[-1000:].min(), 0.3),
        ),
        draw=draw,
    )
