"""A small network that denoises one token at a time, given a vector (MAR, arXiv:2406.11838, section 3).

It stands where a model of discrete tokens has its softmax: the transformer gives each place a vector z, and the head
turns noise into a token distributed as it should be there. All tokens are rows of one batch; none sees another.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore.nn.adaln import EPS
from arcore.nn.checks import dtype_name
from arcore.nn.dit import TimestepEmbedding
from arcore.nn.kinds import Features, check_kinds
from arcore.nn.linear import Linear, linear
from arcore.schedules import History, NoiseSchedule, Prediction, Solver, to_x0
from arcore.schedules.prediction import check_prediction


@check_kinds
class HeadBlock(nn.Module):
    """`h += gate * MLP(norm(h) (1 + scale) + shift)`, the three vectors from the condition of each row.

    Args:
        width: of rows and conditions.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.fc1 = Linear(width, width)
        self.fc2 = Linear(width, width)
        self.modulation = Linear(width, 3 * width)

    def forward(self, h: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        """`[M, width]`, and what `modulation_parts` made of the condition, each like h; scale has its 1 in it."""
        inner = torch.addcmul(shift, self.norm(h), scale)
        return torch.addcmul(h, gate, self.fc2(F.silu(self.fc1(inner))))


@check_kinds
def modulation_parts(layer: nn.Linear, active: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Shift, 1 + scale and, of three parts, gate: each like `active`, the condition after its activation."""
    one = torch.zeros(parts, 1, dtype=active.dtype, device=active.device)
    one[1] = 1
    bias = (layer.bias.view(parts, -1) + one).flatten()
    return linear(active, layer.weight, bias).chunk(parts, dim=-1)


@check_kinds
class DiffusionHead(nn.Module):
    """Predicts the noise in tokens, or what else `arcore.schedules.PREDICTIONS` has, from a vector for each.

    It computes in float32 or float64, also under autocast: near pure noise a step divides by alpha, 5e-5 at the end of
    the cosine schedule, which half precision turns into NaN.

    Args:
        channels: values C of a token.
        cond_dim: width of the vectors z.
        width: of the hidden layers.
        depth: residual blocks.
        schedule: of the noise.
        prediction: `"eps"` for the weights of MAR; `"v"` loses less to rounding and to a short training.
        learn_variance: also predict where the variance lies between its bounds (arXiv:2102.09672).

    Raises:
        ValueError: a size is below 1, or unknown prediction.
    """

    # Tokens times steps whose modulation is computed ahead: more than this saves no more reading of weights.
    AHEAD = 512

    def __init__(
        self,
        channels: int,
        cond_dim: int,
        width: int,
        depth: int,
        *,
        schedule: NoiseSchedule,
        prediction: Prediction = "v",
        learn_variance: bool = False,
    ) -> None:
        super().__init__()
        for name, size in (
            ("channels", channels),
            ("cond_dim", cond_dim),
            ("width", width),
            ("depth", depth),
        ):
            if size < 1:
                raise ValueError(f"arcore.nn.DiffusionHead: expected {name} to be at least 1 but got {size}")
        check_prediction(prediction)
        self.channels, self.learn_variance = channels, learn_variance
        self.schedule, self.prediction = schedule, prediction
        self.time_embed = TimestepEmbedding(width)
        self.cond_embed = Linear(cond_dim, width)
        self.input_proj = nn.Linear(channels, width)
        self.blocks: Any = nn.ModuleList(HeadBlock(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=EPS, elementwise_affine=False)
        self.modulation = Linear(width, 2 * width)
        self.out = nn.Linear(width, (2 if learn_variance else 1) * channels)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initial weights: every block is the identity and the output is zero."""
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)
                part.bias.zero_()
        nn.init.normal_(self.time_embed.fc1.weight, std=0.02)
        nn.init.normal_(self.time_embed.fc2.weight, std=0.02)
        for block in self.blocks:
            block.modulation.weight.zero_()
        self.modulation.weight.zero_()
        self.out.weight.zero_()

    def forward(self, x: Features, t: Tensor, z: Features) -> tuple[Tensor, Tensor | None]:
        """Predict.

        Args:
            x: noisy tokens `[M, C]`.
            t: times `[M]`.
            z: `[M, cond_dim]`.

        Returns:
            The prediction `[M, C]`, and with `learn_variance` the variance, like it; both in the dtype of the weights.

        Raises:
            TypeError: the weights are in half precision.
            ValueError: shapes do not fit.
        """
        dtype = self._check(z)
        if x.shape != (len(z), self.channels) or t.shape != z.shape[:1]:
            raise ValueError(
                f"expected {len(z)} tokens of {self.channels} values and as many times but got {tuple(x.shape)} "
                f"and {tuple(t.shape)}"
            )
        with torch.autocast(x.device.type, enabled=False):
            cond = F.silu(self.time_embed(self._time(t)) + self.cond_embed(z.to(dtype)))
            h = self.input_proj(x.to(dtype))
            for block in self.blocks:
                h = block(h, *modulation_parts(block.modulation, cond, 3))
            return self._output(h, *modulation_parts(self.modulation, cond, 2))

    def _output(self, h: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor | None]:
        out: Tensor = self.out(torch.addcmul(shift, self.norm(h), scale))
        if not self.learn_variance:
            return out, None
        prediction, variance = out.chunk(2, dim=-1)
        return prediction, variance

    @torch.no_grad()
    @check_kinds
    def sample(
        self,
        z: Tensor,
        noise: Tensor,
        *,
        solver: Solver,
        times: Tensor,
        uncond: Tensor | None = None,
        cfg_scale: float | Tensor = 1.0,
    ) -> Tensor:
        """Turn noise into tokens.

        What a step does to its condition is known before the loop, as it depends on z and the time alone. So all
        modulations come from few large products, time embeddings are computed once per step instead of per token, and
        the factors of one-step solvers come from one call.

        Args:
            z: `[M, cond_dim]`.
            noise: standard normal `[S, M, C]`: what tokens start from, then what each step but the last adds. With a
                solver that draws nothing one entry is enough.
            solver: of `arcore.schedules`, with the schedule and the prediction of the head.
            times: `[S + 1]`, decreasing to clean.
            uncond: like z; predictions are guided away from those for it, variances are those for z.
            cfg_scale: weight of the conditional prediction, a number or one per token.

        Returns:
            `[M, C]` in the dtype of the weights.

        Raises:
            TypeError: the weights are in half precision.
            ValueError: shapes, solver or times do not fit.
        """
        dtype = self._check(z)
        steps = len(times) - 1
        needed = steps if solver.stochastic else 1
        if steps < 1 or noise.shape[1:] != (len(z), self.channels) or len(noise) < needed:
            raise ValueError(
                f"expected noise of shape {(needed, len(z), self.channels)} for {steps} steps but got "
                f"{tuple(noise.shape)}"
            )
        if uncond is not None and uncond.shape != z.shape:
            raise ValueError(f"expected uncond like z, {tuple(z.shape)}, but got {tuple(uncond.shape)}")
        if solver.prediction != self.prediction:
            raise ValueError(
                f"expected a solver for prediction={self.prediction!r} but got {solver.prediction!r}"
            )
        if solver.learned_variance != (self.learn_variance and solver.learned_variance):
            raise ValueError("the solver wants a variance, but the head has learn_variance=False")
        self.schedule.check_times("times", times)
        with torch.autocast(z.device.type, enabled=False):
            scale = cfg_scale
            if isinstance(scale, Tensor):
                scale = scale.to(z.device, dtype).reshape(-1, 1)
            both = z if uncond is None else torch.cat([z, uncond])
            cond = self.cond_embed(both.to(dtype))
            moments = self.time_embed(self._time(times[:-1].to(z.device)))  # [S, width]
            step = _Stepper(solver, times, dtype)
            x = noise[0].to(dtype)
            chunk = max(1, self.AHEAD // max(1, len(both)))
            for first in range(0, steps, chunk):
                active = F.silu(moments[first : first + chunk, None] + cond)  # [s, M or 2M, width]
                # For each layer, and then for each step of the chunk, its shift, scale and gate.
                layers = [
                    list(
                        zip(*(part.unbind() for part in modulation_parts(layer, active, parts)), strict=True)
                    )
                    for layer, parts in (
                        *((block.modulation, 3) for block in self.blocks),
                        (self.modulation, 2),
                    )
                ]
                for place in range(len(active)):
                    h = self.input_proj(x)
                    if uncond is not None:
                        h = torch.cat([h, h])
                    for block, modulations in zip(self.blocks, layers, strict=False):
                        h = block(h, *modulations[place])
                    prediction, variance = self._output(h, *layers[-1][place])
                    if uncond is not None:
                        wanted, other = prediction.chunk(2)
                        prediction = other + scale * (wanted - other)
                        variance = None if variance is None else variance[: len(x)]
                    k = first + place
                    fresh = noise[k + 1].to(dtype) if solver.stochastic and k + 1 < steps else None
                    x = step(k, prediction, x, variance, fresh)
        return x

    def _time(self, t: Tensor) -> Tensor:
        return t * self.schedule.time_scale if self.schedule.time_scale != 1.0 else t

    def _check(self, z: Tensor) -> torch.dtype:
        weight = self.cond_embed.weight
        if weight.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"a DiffusionHead computes in float32 or float64 but its weights are {dtype_name(weight.dtype)}, in "
                "which a step near pure noise gives NaN; keep the head in float32 with head.float(), the transformer "
                "may stay as it is"
            )
        if z.dim() != 2 or z.shape[1] != weight.shape[1]:
            raise ValueError(f"expected z of shape {('M', weight.shape[1])} but got {tuple(z.shape)}")
        return weight.dtype


class _Stepper:
    """`solver.step` for a grid that is known ahead: `x = a x + b output + noise`, with a and b from float64."""

    def __init__(self, solver: Solver, times: Tensor, dtype: torch.dtype) -> None:
        self.solver, self.times = solver, times.cpu()
        self.history: History | None = None
        # A bound on the clean data, or a memory, makes a step something else.
        self.linear = solver.clip is None and not solver.multistep
        if not self.linear:
            return
        now, then = self.times[:-1], self.times[1:]
        one, zero = (
            torch.ones(len(now), 1, dtype=torch.float64),
            torch.zeros(len(now), 1, dtype=torch.float64),
        )
        kind, schedule = solver.prediction, solver.schedule
        factors = solver.factors(now, then, None)
        on_x0 = factors.x0.unsqueeze(1)
        self.on_x = (
            (factors.x.unsqueeze(1) + on_x0 * to_x0(kind, zero, one, now, schedule)).flatten().tolist()
        )
        self.on_output: list[float] = (on_x0 * to_x0(kind, one, zero, now, schedule)).flatten().tolist()
        drawn = torch.zeros(len(now), dtype=torch.float64) if factors.noise is None else factors.noise
        moves = drawn > 0
        low = high = drawn
        if solver.learned_variance:
            spread = [
                solver.spread_of_noise(drawn.unsqueeze(1), now, then, one, side * one).flatten()
                for side in (-1, 1)
            ]
            low, high = (torch.where(moves, part, 1.0).log() for part in spread)
        self.moves: list[bool] = moves.tolist()
        self.low: list[float] = low.tolist()
        self.high: list[float] = high.tolist()

    def __call__(
        self, k: int, output: Tensor, x: Tensor, variance: Tensor | None, noise: Tensor | None
    ) -> Tensor:
        if not self.linear:
            t, t_next = (self.times[k + side].to(x.device) for side in (0, 1))
            wanted = variance if self.solver.learned_variance else None
            x, self.history = self.solver.step(
                output, x, t, t_next, history=self.history, noise=noise, variance=wanted
            )
            return x
        x = self.on_x[k] * x + self.on_output[k] * output
        if noise is None or not self.moves[k]:
            return x
        if not self.solver.learned_variance:
            return x + self.low[k] * noise
        assert variance is not None
        middle, half = 0.5 * (self.low[k] + self.high[k]), 0.5 * (self.high[k] - self.low[k])
        spread: Tensor = torch.exp(middle + half * variance)
        return x + spread * noise
