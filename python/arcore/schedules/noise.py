"""Noise schedules: `x_t = alpha(t) * x + sigma(t) * eps` for data x and standard normal eps."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Annotated, Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor

from arcore._kinds import Axes, check_kinds, explain_kinds
from arcore._offers import Offers

Spacing = Literal[
    "every", "leading", "leading_inner", "linspace", "linspace_inner", "trailing", "trailing_floor"
]
# Spacings that leave step 0 out, so that one step fewer fits.
_INNER = ("leading_inner", "linspace_inner")


@runtime_checkable
class NoiseSchedule(Protocol, metaclass=Offers):
    """What solvers and losses ask of a schedule.

    Attributes:
        clean: the time at which alpha is 1 and sigma is 0; all other times are larger.
        time_scale: networks read `time_scale * t`, about 0 to 1000 for every schedule.
    """

    @property
    def clean(self) -> float: ...

    @property
    def time_scale(self) -> float: ...

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Share of data and of noise at times of any shape, float64."""
        ...

    def sample_times(
        self, *shape: int, device: torch.device | str | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Independent times to train on."""
        ...

    def check_times(self, name: str, t: Tensor) -> None:
        """Raise unless `t` holds times of this schedule, the clean one included."""
        ...


@explain_kinds
def broadcast_time(t: Tensor, x: Tensor) -> Tensor:
    """Give `t` trailing axes of size 1, so that it meets the leading axes of `x`.

    Raises:
        ValueError: the axes of `t` are no leading axes of `x`.
    """
    lead = x.shape[: t.dim()]
    if t.dim() > x.dim() or any(a not in (1, b) for a, b in zip(t.shape, lead, strict=True)):
        raise ValueError(
            f"expected times for leading axes of data of shape {tuple(x.shape)} but got times of shape {tuple(t.shape)}"
        )
    return t.reshape(*t.shape, *[1] * (x.dim() - t.dim()))


@check_kinds
def add_noise(schedule: NoiseSchedule, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """`alpha(t) * x + sigma(t) * eps` in the dtype of x.

    Args:
        schedule: gives alpha and sigma.
        x, eps: `[..., C]`, of one shape.
        t: one time per entry of leading axes of x.

    Raises:
        ValueError: shapes do not fit.
    """
    if x.shape != eps.shape:
        raise ValueError(f"expected noise of the data's shape {tuple(x.shape)} but got {tuple(eps.shape)}")
    alpha, sigma = (broadcast_time(part, x).to(x.dtype) for part in schedule.alpha_sigma(t))
    return alpha * x + sigma * eps


@check_kinds
class VPSchedule:
    """Variance-preserving diffusion in T discrete steps (DDPM, arXiv:2006.11239): alpha^2 + sigma^2 = 1.

    Times are integers: -1 is clean data, 0 the first noisy step, T - 1 almost pure noise. Tables are float64.

    Args:
        kind: growth of beta. `"linear"` and `"scaled_linear"` (linear in its square root) run from `beta_start` to
            `beta_end`, both for T = 1000 and rescaled by 1000 / T otherwise; `"cosine"` is that of arXiv:2102.09672,
            `"sigmoid"` that of arXiv:2212.11972 from -3 to 3.
        num_steps: T.
        beta_start, beta_end: of the linear kinds.

    Attributes:
        betas: float64 `[T]`.
        alphas_cumprod: float64 `[T]`, alpha(t)^2.

    Raises:
        ValueError: unknown kind, T below 1, or betas outside (0, 1).
    """

    clean = -1.0
    time_scale = 1.0
    MAX_BETA = 0.999

    def __init__(
        self,
        kind: Literal["linear", "scaled_linear", "cosine", "sigmoid"] = "linear",
        *,
        num_steps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
    ) -> None:
        if num_steps < 1:
            raise ValueError(f"expected num_steps >= 1 but got {num_steps}")
        self.num_steps = num_steps
        # On the CPU even where a model is built on another device: these are numbers, not weights.
        u = torch.arange(num_steps + 1, dtype=torch.float64, device="cpu") / num_steps
        if kind in ("linear", "scaled_linear"):
            scale = 1000 / num_steps
            low, high = scale * beta_start, scale * beta_end
            power = 1.0 if kind == "linear" else 0.5
            ends = low**power, high**power
            self.betas = (
                torch.linspace(*ends, num_steps, dtype=torch.float64, device="cpu") ** (1 / power)
            ).clamp(max=self.MAX_BETA)
            if not 0.0 < beta_start <= beta_end < 1.0:
                raise ValueError(
                    f"expected 0 < beta_start <= beta_end < 1 but got {beta_start} and {beta_end}"
                )
        elif kind == "cosine":
            bar = ((u + 0.008) / 1.008 * (math.pi / 2)).cos() ** 2
            self.betas = (1 - bar[1:] / bar[:-1]).clamp(max=self.MAX_BETA)
        elif kind == "sigmoid":
            bar = torch.sigmoid(-(6 * u - 3)) - 1 / (1 + math.exp(3))
            self.betas = (1 - bar[1:] / bar[:-1]).clamp(max=self.MAX_BETA)
        else:
            raise ValueError(f"expected kind to be linear, scaled_linear, cosine or sigmoid but got {kind!r}")
        self.alphas_cumprod = (1 - self.betas).cumprod(0)
        one = torch.ones(1, dtype=torch.float64, device="cpu")
        self._bars = torch.cat([one, self.alphas_cumprod])  # entry t + 1

    @explain_kinds
    def alpha_bar(self, t: Annotated[Tensor, Axes("...", whole=True)]) -> Tensor:
        """alpha(t)^2, float64, of int64 times from -1 to T - 1 and any shape."""
        return self._bars.to(t.device)[t + 1]

    @explain_kinds
    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """See `NoiseSchedule`."""
        bar = self.alpha_bar(t)
        return bar.sqrt(), (1 - bar).sqrt()

    @check_kinds
    def sample_times(
        self, *shape: int, device: torch.device | str | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Uniform over 0..T - 1, int64."""
        return torch.randint(self.num_steps, shape, device=device, generator=generator)

    @check_kinds
    def check_times(self, name: str, t: Tensor) -> None:
        """See `NoiseSchedule`. The range is looked at on the CPU only: on a GPU that would wait for the device."""
        if t.dtype != torch.int64:
            raise TypeError(f"expected {name} of dtype int64, steps of the schedule, but got {t.dtype}")
        _check_range(name, t, -1, self.num_steps - 1, "-1 means clean")

    @check_kinds
    def grid(self, steps: int, spacing: Spacing = "leading") -> Tensor:
        """Times that a sampler visits, from noise to clean.

        Each spacing is that of a published sampler; for every S they give the same times as its code.

        Args:
            steps: evaluations S of the network, at most T.
            spacing: with k counting down
                `"every"` every (T // S)-th time from 0 on, of which there may be more than S (AR-Diffusion, DDIM);
                `"leading"` k * (T // S), k = S - 1..0 (DDIM, PNDM);
                `"leading_inner"` k * (T // (S + 1)), k = S..1, never 0 (DPM-Solver with leading times; S below T);
                `"linspace"` S times spread evenly over 0..T - 1, both included (respaced DDPM: DiT, MAR). The stride is
                added up in float64 and each sum rounded to even, as the released code does. One step alone starts at
                T - 1, where that code would start at 0;
                `"linspace_inner"` round(k * (T - 1) / S), k = S..1, never 0 (DPM-Solver: the released samples of
                ACDiT; S below T);
                `"trailing"` round(T * k / S) - 1, k = S..1 (diffusers);
                `"trailing_floor"` floor(T * k / S) - 1, k = S..1, in float32 as the released code of Diffusion Forcing
                computes it, which may round T * k / S down by one where it is whole.

        Returns:
            int64 `[S + 1]`, decreasing; the last entry is -1, clean.

        Raises:
            TypeError: `steps` is no whole number.
            ValueError: steps outside the schedule, or unknown spacing.
        """
        if spacing not in get_args(Spacing):
            raise ValueError(
                f"expected spacing to be one of {', '.join(get_args(Spacing))} but got {spacing!r}"
            )
        if isinstance(steps, bool) or not hasattr(steps, "__index__"):
            raise TypeError(f"expected a whole number of sampling steps but got {steps!r}")
        total = self.num_steps
        most = total - 1 if spacing in _INNER else total
        if not 1 <= steps <= most:
            raise ValueError(
                f"expected 1 to {most} sampling steps of a schedule of {total} with spacing {spacing!r} but got {steps}"
            )
        k = torch.arange(steps, 0, -1)
        if spacing == "every":
            times = torch.arange(0, total, total // steps).flip(0)
        elif spacing == "leading":
            times = (k - 1) * (total // steps)
        elif spacing == "leading_inner":
            times = k * (total // (steps + 1))
        elif spacing == "linspace_inner":
            times = (k.double() * ((total - 1) / steps)).round().long()
        elif spacing == "linspace":
            stride = (total - 1) / max(steps - 1, 1)
            # Added up and not multiplied: where a time falls between two steps, the errors of the sum decide.
            sums = list(accumulate([stride] * (steps - 1), initial=0.0)) if steps > 1 else [float(total - 1)]
            times = torch.tensor([round(time) for time in reversed(sums)])
        elif spacing == "trailing_floor":
            times = (
                torch.linspace(-1, total - 1, steps + 1, dtype=torch.float32, device="cpu").long()[1:].flip(0)
            )
        else:
            times = (k.double() * (total / steps)).round().long() - 1
        return torch.cat([times, torch.tensor([-1])])


@check_kinds
class FlowSchedule:
    """Straight lines between data and noise (flow matching, arXiv:2210.02747): alpha = 1 - t, sigma = t.

    Times are floats from 0, clean, to 1, pure noise.

    Args:
        shift: a > 0 moves times towards noise, t -> a t / (1 + (a - 1) t), for training and sampling alike; 1 leaves
            them as they are.
        density: of the times to train on, before the shift: `"uniform"`, or `"logit_normal"`, the sigmoid of a normal
            number with `mean` and `std`.
        mean, std: of `"logit_normal"`.

    Raises:
        ValueError: unknown density, or a shift or std not above 0.
    """

    clean = 0.0
    time_scale = 1000.0

    def __init__(
        self,
        *,
        shift: float = 1.0,
        density: Literal["uniform", "logit_normal"] = "uniform",
        mean: float = 0.0,
        std: float = 1.0,
    ) -> None:
        if density not in ("uniform", "logit_normal"):
            raise ValueError(f"expected density to be uniform or logit_normal but got {density!r}")
        if not shift > 0 or not std > 0:
            raise ValueError(f"expected shift > 0 and std > 0 but got {shift} and {std}")
        self.shift, self.density, self.mean, self.std = shift, density, mean, std

    def _shifted(self, t: Tensor) -> Tensor:
        return self.shift * t / (1 + (self.shift - 1) * t)

    @explain_kinds
    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """See `NoiseSchedule`."""
        sigma = t.double()
        return 1 - sigma, sigma

    @check_kinds
    def sample_times(
        self, *shape: int, device: torch.device | str | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """From the density, shifted; float32."""
        if self.density == "uniform":
            t = torch.rand(shape, device=device, generator=generator)
        else:
            t = torch.sigmoid(self.mean + self.std * torch.randn(shape, device=device, generator=generator))
        return self._shifted(t)

    @check_kinds
    def check_times(self, name: str, t: Tensor) -> None:
        """See `NoiseSchedule`. The range is looked at on the CPU only."""
        if not t.is_floating_point():
            raise TypeError(f"expected {name} of a floating dtype, 0 to 1, but got {t.dtype}")
        _check_range(name, t, 0, 1, "0 means clean")

    @check_kinds
    def grid(self, steps: int) -> Tensor:
        """S + 1 evenly spaced times from 1 to 0, shifted; float64.

        Raises:
            ValueError: `steps` is below 1.
        """
        if steps < 1:
            raise ValueError(f"expected at least 1 sampling step but got {steps}")
        return self._shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64))


def _check_range(name: str, t: Tensor, low: float, high: float, hint: str) -> None:
    if not t.is_cpu or torch.compiler.is_compiling() or not t.numel():
        return
    least, most = t.min().item(), t.max().item()
    if not (low <= least and most <= high):  # NaN too
        wrong = most if low <= least else least
        raise ValueError(f"expected {name} from {low} to {high} ({hint}) but got {wrong}")
