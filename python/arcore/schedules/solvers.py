"""Steps of samplers, from one time to a cleaner one.

A solver has no state: a step gets what it needs and returns what the next one needs, so a run can be stored and
continued anywhere, and solvers are shared. Each step is linear in the noisy value, the implied clean value and, for
multistep solvers, the previous one; its factors are computed in float64 for each time and applied in one pass.

`t_from` and `t_to` have one entry per entry of leading axes of x: rows, blocks, frames or tokens. Where both are equal,
values are copied bit for bit.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from arcore._kinds import check_kinds
from arcore.schedules.noise import NoiseSchedule, VPSchedule, broadcast_time
from arcore.schedules.prediction import Prediction, check_prediction, to_x0


class History(NamedTuple):
    """What a multistep solver remembers.

    Attributes:
        x0: the clean value implied at the last step, like x.
        t: the times of that step, like `t_from`.
    """

    x0: Tensor
    t: Tensor


class Factors(NamedTuple):
    """Of a step `x * x + x0 * x0 + previous * history.x0 + noise * noise`, each with the shape of the times."""

    x: Tensor
    x0: Tensor
    previous: Tensor | None = None
    noise: Tensor | None = None


@check_kinds
class Solver:
    """What all solvers do; `factors` tells them apart.

    Args:
        schedule: of the noise.
        prediction: what the network's output is.
        clip: bound on the absolute value of the implied clean data, e.g. 1 for pixels; None for latents.

    Raises:
        ValueError: unknown prediction, or a bound not above 0.
    """

    stochastic = False
    multistep = False
    learned_variance = False

    def __init__(
        self, schedule: NoiseSchedule, prediction: Prediction = "eps", *, clip: float | None = None
    ) -> None:
        check_prediction(prediction)
        if clip is not None and not clip > 0:
            raise ValueError(f"expected clip > 0 but got {clip}")
        self.schedule, self.prediction, self.clip = schedule, prediction, clip

    def factors(self, t_from: Tensor, t_to: Tensor, history_t: Tensor | None) -> Factors:
        """Factors of the step in float64; those of entries that do not move are ignored."""
        raise NotImplementedError

    @torch.no_grad()
    @check_kinds
    def step(
        self,
        output: Tensor,
        x: Tensor,
        t_from: Tensor,
        t_to: Tensor,
        *,
        history: History | None = None,
        noise: Tensor | None = None,
        variance: Tensor | None = None,
    ) -> tuple[Tensor, History | None]:
        """Go from `t_from` to `t_to`.

        Args:
            output: of the network at `t_from`, `[..., C]`; converted to the dtype of x.
            x: values at `t_from`, float32 or float64 `[..., C]`.
            t_from, t_to: times, `t_to <= t_from`.
            history: what the last step of a multistep solver returned; None at first.
            noise: standard normal numbers like x; solvers that draw need it unless every step ends clean.
            variance: for `DDPM` with a learned variance, like x.

        Returns:
            The values at `t_to`, and the history for the next step, which is None for one-step solvers.

        Raises:
            TypeError: x is in half precision, or times have a wrong dtype.
            ValueError: shapes do not fit, times lie outside the schedule or go backwards, or noise is missing.
        """
        self._check(output, x, t_from, t_to, noise)
        t_from, t_to = torch.broadcast_tensors(t_from, t_to)
        moving = t_to != t_from
        x0 = to_x0(self.prediction, output.to(x.dtype), x, t_from, self.schedule)
        if self.clip is not None:
            x0 = x0.clamp(-self.clip, self.clip)
        factors = self.factors(t_from, t_to, history.t if history else None)

        def spread(factor: Tensor) -> Tensor:
            return broadcast_time(torch.where(moving, factor, 0.0), x).to(x.dtype)

        moved = spread(factors.x) * x + spread(factors.x0) * x0
        if factors.previous is not None and history is not None:
            moved = moved + spread(factors.previous) * history.x0
        if factors.noise is not None and bool((moving & (t_to != self.schedule.clean)).any()):
            if noise is None:
                raise ValueError(
                    f"{type(self).__name__} draws noise at every step: pass noise of shape {tuple(x.shape)}"
                )
            moved = moved + self.spread_of_noise(spread(factors.noise), t_from, t_to, x, variance) * noise
        keep = broadcast_time(moving, x)
        new_history = None
        if self.multistep:
            new_history = History(x0, t_from)
            if history is not None:
                kept_t = torch.where(moving, t_from, history.t)
                new_history = History(torch.where(keep, x0, history.x0), kept_t)
        return torch.where(keep, moved, x), new_history

    def spread_of_noise(
        self, default: Tensor, t_from: Tensor, t_to: Tensor, x: Tensor, variance: Tensor | None
    ) -> Tensor:
        """Standard deviation of what is drawn; `default` unless the network predicts it."""
        if variance is not None:
            raise ValueError(f"{type(self).__name__} has no learned variance")
        return default

    def _check(self, output: Tensor, x: Tensor, t_from: Tensor, t_to: Tensor, noise: Tensor | None) -> None:
        if x.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"expected values of dtype float32 or float64 but got {x.dtype}; use x.float()")
        if output.shape != x.shape:
            raise ValueError(
                f"expected an output of the values' shape {tuple(x.shape)} but got {tuple(output.shape)}"
            )
        for name, times in (("t_from", t_from), ("t_to", t_to)):
            broadcast_time(times, x)
            self.schedule.check_times(name, times)
        if noise is not None and noise.shape != x.shape:
            raise ValueError(
                f"expected noise of the values' shape {tuple(x.shape)} but got {tuple(noise.shape)}"
            )
        if t_from.is_cpu and bool((t_to > t_from).any()):
            raise ValueError("expected t_to <= t_from, towards clean data, but some times go the other way")


@check_kinds
class DDIM(Solver):
    """Deterministic or partly stochastic steps (arXiv:2010.02502); with `FlowSchedule` and eta 0, Euler's method.

    Args:
        schedule, prediction, clip: see `Solver`.
        eta: share of the ancestral noise, 0 to 1; 1 is `DDPM` with the posterior variance.

    Raises:
        ValueError: eta outside [0, 1].
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        prediction: Prediction = "eps",
        *,
        clip: float | None = None,
        eta: float = 0.0,
    ) -> None:
        super().__init__(schedule, prediction, clip=clip)
        if not 0.0 <= eta <= 1.0:
            raise ValueError(f"expected eta from 0 to 1 but got {eta}")
        self.eta = eta
        self.stochastic = eta > 0

    def factors(self, t_from: Tensor, t_to: Tensor, history_t: Tensor | None) -> Factors:
        """See `Solver`."""
        alpha, sigma = self.schedule.alpha_sigma(t_from)
        alpha_to, sigma_to = self.schedule.alpha_sigma(t_to)
        drawn = None
        kept = sigma_to
        if self.stochastic:
            shrink = (alpha * sigma_to / (alpha_to * sigma)).square()
            drawn = self.eta * sigma_to * (1 - shrink).clamp(min=0).sqrt()
            kept = (sigma_to.square() - drawn.square()).clamp(min=0).sqrt()
        return Factors(kept / sigma, alpha_to - alpha * kept / sigma, noise=drawn)


@check_kinds
class DDPM(Solver):
    """Ancestral steps (arXiv:2006.11239) between any two times of a `VPSchedule`.

    Args:
        schedule, prediction, clip: see `Solver`.
        variance: `"posterior"` or `"beta"`, the bounds of what is right; or `"learned"`: the network predicts v in
            about [-1, 1] that mixes their logarithms (arXiv:2102.09672), passed to `step` as `variance`.
        temperature: factor on the noise.

    Raises:
        TypeError: the schedule is no `VPSchedule`.
        ValueError: unknown variance or a negative temperature.
    """

    stochastic = True

    def __init__(
        self,
        schedule: VPSchedule,
        prediction: Prediction = "eps",
        *,
        clip: float | None = None,
        variance: Literal["posterior", "beta", "learned"] = "posterior",
        temperature: float = 1.0,
    ) -> None:
        super().__init__(schedule, prediction, clip=clip)
        if not temperature >= 0:
            raise ValueError(f"expected temperature >= 0 but got {temperature}")
        self.vp, self.variance, self.temperature = schedule, variance, temperature
        self.learned_variance = variance == "learned"

    def _betas(self, t_from: Tensor, t_to: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        bar, bar_to = self.vp.alpha_bar(t_from), self.vp.alpha_bar(t_to)
        beta = 1 - bar / bar_to
        return bar, bar_to, beta, beta * (1 - bar_to) / (1 - bar)

    def factors(self, t_from: Tensor, t_to: Tensor, history_t: Tensor | None) -> Factors:
        """See `Solver`."""
        bar, bar_to, beta, posterior = self._betas(t_from, t_to)
        x0 = beta * bar_to.sqrt() / (1 - bar)
        x = (1 - bar_to) * (1 - beta).sqrt() / (1 - bar)
        drawn = (beta if self.variance == "beta" else posterior).sqrt() * self.temperature
        return Factors(x, x0, noise=torch.where(t_to == self.vp.clean, 0.0, drawn))

    def spread_of_noise(
        self, default: Tensor, t_from: Tensor, t_to: Tensor, x: Tensor, variance: Tensor | None
    ) -> Tensor:
        """See `Solver`."""
        if not self.learned_variance:
            return super().spread_of_noise(default, t_from, t_to, x, variance)
        if variance is None or variance.shape != x.shape:
            raise ValueError(f"DDPM with a learned variance needs variance of shape {tuple(x.shape)}")
        _, _, beta, posterior = self._betas(t_from, t_to)
        low, high = (broadcast_time(part.log(), x).to(x.dtype) for part in (posterior, beta))
        share = (variance.to(x.dtype) + 1) / 2
        std = torch.exp(0.5 * (share * high + (1 - share) * low)) * self.temperature
        return torch.where(default > 0, std, 0.0)


class DPMSolver2M(Solver):
    """DPM-Solver++ of second order with one earlier step, midpoint form (arXiv:2211.01095, algorithm 2).

    The first step of an entry, and one that ends clean, are of first order.
    """

    multistep = True

    def factors(self, t_from: Tensor, t_to: Tensor, history_t: Tensor | None) -> Factors:
        """See `Solver`."""
        alpha, sigma = self.schedule.alpha_sigma(t_from)
        alpha_to, sigma_to = self.schedule.alpha_sigma(t_to)
        x, x0 = sigma_to / sigma, alpha_to - alpha * sigma_to / sigma
        if history_t is None:
            return Factors(x, x0)
        alpha_past, sigma_past = self.schedule.alpha_sigma(history_t)
        # Steps in half the log of the signal-to-noise ratio.
        snr = alpha.log() - sigma.log()
        step = alpha_to.log() - sigma_to.log() - snr
        past = snr - (alpha_past.log() - sigma_past.log())
        usable = (t_to != self.schedule.clean) & (past > 0)
        half = torch.where(usable, 0.5 * step / past * x0, 0.0)
        return Factors(x, x0 + half, previous=-half)
