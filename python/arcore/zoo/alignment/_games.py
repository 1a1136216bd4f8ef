"""Preference games that are small enough to solve: what the self-play systems of this topic are checked on.

`preferences[i, j]` is the probability that response i is preferred to response j. Policies are vectors of probabilities
over the responses. With a reference policy and tau > 0, the game in which each player gains the probability of winning
less tau times the KL divergence from the reference has one equilibrium, `log pi = P pi / tau + log ref + const`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Vector = NDArray[np.float64]


def checked(preferences: ArrayLike) -> Vector:
    """The preferences as float64 `[N, N]`.

    Raises:
        ValueError: not square, out of [0, 1], or `P + P^T` is not 1.
    """
    found = np.asarray(preferences, dtype=np.float64)
    if found.ndim != 2 or found.shape[0] != found.shape[1] or not len(found):
        raise ValueError(
            f"expected preferences of shape (N, N), N >= 1, but got {found.shape}; row i beats column j"
        )
    if not ((found >= 0) & (found <= 1)).all():
        raise ValueError(
            f"expected preferences in [0, 1] but got {found.min()} to {found.max()}; they are probabilities"
        )
    if np.abs(found + found.T - 1).max() > 1e-9:
        i, j = np.argwhere(np.abs(found + found.T - 1) > 1e-9)[0]
        raise ValueError(
            f"expected preferences[{i}, {j}] + preferences[{j}, {i}] = 1 but got {found[i, j]} and {found[j, i]}; one "
            "of the two is preferred, and a response ties with itself at 0.5"
        )
    return found


def normalised(logits: Vector) -> Vector:
    """Softmax."""
    weights = np.exp(logits - logits.max())
    return np.asarray(weights / weights.sum())


def omd_step(policy: Vector, reference: Vector, gain: Vector, *, tau: float, eta: float) -> Vector:
    """A step of online mirror descent: `pi exp(gain / eta)` with a share tau / eta of the reference.

    `exp(gain / eta) ref^(tau / eta) pi^(1 - tau / eta)`, normalised; eta is the inverse of a step's size.
    """
    share = tau / eta
    return normalised(gain / eta + share * np.log(reference) + (1 - share) * np.log(policy))


def regularised_nash(preferences: Vector, reference: Vector, *, tau: float) -> Vector:
    """The equilibrium by damped Newton steps on `log pi = P pi / tau + log ref + const`; exact to 1e-10.

    Raises:
        RuntimeError: it was not found.
    """
    logits = np.log(reference)

    def residual(at: Vector) -> Vector:
        found = at - preferences @ normalised(at) / tau - np.log(reference)
        return np.asarray(found - found.mean())

    for _ in range(200):
        policy, wrong = normalised(logits), residual(logits)
        if np.abs(wrong).max() < 1e-12:
            return policy
        slope = np.eye(len(logits)) - preferences @ (np.diag(policy) - np.outer(policy, policy)) / tau
        slope -= slope.mean(0)
        move, size = np.linalg.lstsq(slope, -wrong, rcond=None)[0], 1.0
        while (
            np.linalg.norm(residual(logits + size * move)) > np.linalg.norm(wrong) * (1 - 0.1 * size)
            and size > 1e-4
        ):
            size /= 2
        logits = logits + size * move
        logits -= logits.mean()
    if np.abs(residual(logits)).max() < 1e-9:
        return normalised(logits)
    raise RuntimeError(
        "the equilibrium was not found: tau is too small for these preferences; take a larger one"
    )


def exploitability(preferences: Vector, policy: Vector) -> float:
    """By how much the best response wins against the policy more often than half of the time."""
    return float((preferences @ policy).max() - 0.5)


def cyclic_game() -> tuple[Vector, Vector]:
    """Preferences among 9 responses of two letters, cyclic in both, and a reference policy."""
    first, second = np.divmod(np.arange(9), 3)

    def wheel(letters: Vector) -> Vector:
        return np.array([0.0, 1.0, -1.0])[(letters[:, None] - letters[None]) % 3]

    reference = np.outer([0.5, 0.3, 0.2], [0.6, 0.3, 0.1]).flatten()
    return 0.5 + 0.1 * wheel(first) + 0.3 * wheel(second), reference
