"""What a network may predict of a noisy value, and how one form gives the others.

With `x_t = alpha * x0 + sigma * eps`: "eps" and "x0" are the two parts, "v" is `alpha * eps - sigma * x0`
(arXiv:2202.00512), "velocity" is `eps - x0` (flow matching), "score" is `-eps / sigma`.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from arcore._kinds import check_kinds
from arcore.schedules.noise import NoiseSchedule, broadcast_time

Prediction = Literal["eps", "x0", "v", "velocity", "score"]
PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)


@check_kinds
def target(kind: Prediction, x0: Tensor, eps: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """What a network of that kind should predict.

    Args:
        kind: see the module.
        x0, eps: `[..., C]`, data and noise.
        t: one time per entry of leading axes. A score needs sigma > 0.
        schedule: gives alpha and sigma.
    """
    _check_alike("eps", eps, "x0", x0)
    alpha, sigma = _alpha_sigma(kind, schedule, t, x0)
    if kind == "eps":
        return eps
    if kind == "x0":
        return x0
    if kind == "velocity":
        return eps - x0
    if kind == "score":
        return -eps / sigma
    return alpha * eps - sigma * x0


@check_kinds
def to_x0(kind: Prediction, output: Tensor, x: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """The clean data that a prediction implies.

    Where nothing but noise is left (alpha = 0), "eps" and "score" say nothing about the data and the result is not
    finite; use "v", "x0" or "velocity" with such schedules.

    Args:
        kind: what `output` is.
        output: `[..., C]`.
        x: the noisy value, `[..., C]`.
        t: one time per entry of leading axes.
        schedule: gives alpha and sigma.
    """
    _check_alike("output", output, "x", x)
    alpha, sigma = _alpha_sigma(kind, schedule, t, x)
    if kind == "x0":
        return output
    if kind == "eps":
        return (x - sigma * output) / alpha
    if kind == "score":
        return (x + sigma.square() * output) / alpha
    if kind == "velocity":
        return (x - sigma * output) / (alpha + sigma)
    return (alpha * x - sigma * output) / (alpha.square() + sigma.square())


@check_kinds
def to_eps(kind: Prediction, output: Tensor, x: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """The noise that a prediction implies; arguments as for `to_x0`. "x0" needs sigma > 0."""
    _check_alike("output", output, "x", x)
    alpha, sigma = _alpha_sigma(kind, schedule, t, x)
    if kind == "eps":
        return output
    if kind == "x0":
        return (x - alpha * output) / sigma
    if kind == "score":
        return -sigma * output
    if kind == "velocity":
        return (x + alpha * output) / (alpha + sigma)
    return (sigma * x + alpha * output) / (alpha.square() + sigma.square())


def check_prediction(kind: str) -> None:
    """Raise ValueError for an unknown kind."""
    if kind not in PREDICTIONS:
        raise ValueError(f"expected prediction to be one of {', '.join(PREDICTIONS)} but got {kind!r}")


def _check_alike(name: str, value: Tensor, like: str, other: Tensor) -> None:
    if value.shape != other.shape:
        raise ValueError(
            f"expected {name} of {like}'s shape {tuple(other.shape)} but got {tuple(value.shape)}"
        )


def _alpha_sigma(kind: str, schedule: NoiseSchedule, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    check_prediction(kind)
    alpha, sigma = (broadcast_time(part, x).to(x.dtype) for part in schedule.alpha_sigma(t))
    return alpha, sigma
