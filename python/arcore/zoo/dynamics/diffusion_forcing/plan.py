"""Planning with Diffusion Forcing: a way from a start towards a goal, drawn under guidance (section 4.2, appendix D).

The frames are positions. The first token is the start, repeated; the others begin as noise and go through a table of
levels. At every step the prediction is moved down the gradient of the distance to the goal at all later positions, so
that the way gets there early and stays. Planning for fewer positions than an episode has, and planning anew from where
the first part of a plan has led, use the same function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from arcore.decoding._evaluating import evaluating
from arcore.decoding.draws import RowNormals, row_seeds
from arcore.nn.checks import check_number, check_whole
from arcore.schedules import add_noise, pyramid_levels
from arcore.zoo.dynamics.diffusion_forcing.model import DiffusionForcing

# Of the released planner as it runs. Its text says 20 for the start, 1 up to the horizon and 0 behind it, but these
# weights share their memory with those of actions, 2 and 8, which are written later.
START_WEIGHT, LATER_WEIGHT, TOTAL_WEIGHT = 2.0, 8.0, 1000.0
# The released planner averages over the rows of its batch, 128 in its evaluation, which makes the guidance of a row
# depend on how many others there are; this is its strength there.
RELEASED_ROWS = 128
CLIP_NOISE = 20.0


def plan(
    model: DiffusionForcing,
    start: Tensor,
    goal: Tensor,
    *,
    horizon: int | None = None,
    guidance: float = 2.0 / RELEASED_ROWS,
    steps: int = 50,
    levels: Tensor | None = None,
    seed: int | Sequence[int] = 0,
) -> Tensor:
    """Draw ways from starts to goals.

    Args:
        model: of positions, `image_size=1` and no classes, such as `diffusion_forcing_maze2d_medium`.
        start, goal: positions `[B, c]`, an even number of values each, on the model's device.
        horizon: positions after the start, at most `config.frames - config.frame_stack`; None is that many.
        guidance: strength; 0 draws ways from the start to anywhere. The released planner's 2 over its 128 rows.
        steps: S, of every token.
        levels: table `[M, tokens]` of the tokens after the first, for `ceil(horizon / frame_stack)` tokens, as
            `arcore.schedules` makes them; None is the pyramid in which each token is one level behind the one before.
        seed: one number, or one per row. A way depends on its own seed alone, never on the rest of the batch.

    Returns:
        float32 `[B, horizon, c]`.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: the model is of another kind, a shape does not fit, an argument is out of range, or the model gave
            NaN.
    """
    config = model.config
    stack, size = config.frame_stack, config.in_channels
    if config.image_size != 1 or config.num_classes or size % 2:
        raise ValueError(
            "expected a model of positions, image_size=1, no classes and an even number of channels, but got "
            f"image_size={config.image_size}, num_classes={config.num_classes} and in_channels={size}"
        )
    if start.dim() != 2 or start.shape[1] != size or start.shape != goal.shape:
        raise ValueError(
            f"expected start and goal of shape {('B', size)} but got {tuple(start.shape)} and {tuple(goal.shape)}"
        )
    most = config.frames - stack
    horizon = most if horizon is None else check_whole("horizon", horizon, 1)
    if horizon > most:
        raise ValueError(f"expected a horizon of at most {most} positions but got {horizon}")
    guidance = check_number("guidance", guidance)
    steps = check_whole("steps", steps, 1)
    tokens = -(-horizon // stack)
    if levels is None:
        levels = pyramid_levels(tokens, steps, 1)
    if levels.dim() != 2 or levels.shape[1] != tokens or int(levels.max()) != steps or bool(levels[-1].any()):
        raise ValueError(
            f"expected levels for {tokens} tokens, from {steps} to 0, but got a table of shape {tuple(levels.shape)}"
        )
    # A network that sees all tokens was trained with noise behind the end of shorter ways.
    padding = 0 if config.causal else model.num_frames - tokens - 1
    start, goal = ((place - model.mean) / model.std for place in (start, goal))
    batch, device = len(start), start.device
    normals = RowNormals(row_seeds(seed, batch))
    noise = normals.draw(tokens, *model.frame_shape, device=device).clamp(-CLIP_NOISE, CLIP_NOISE)
    first = start.repeat(1, stack).unsqueeze(1)
    x = torch.cat([first, noise, noise.new_zeros(batch, padding, *model.frame_shape)], dim=1)
    times = torch.linspace(-1, config.num_steps - 1, steps + 1).long()
    ends = [levels.new_zeros(len(levels), 1), levels, levels.new_full((len(levels), padding), steps)]
    table = times[torch.cat(ends, dim=1).cpu()].to(device)
    labels = torch.zeros(batch, dtype=torch.int64, device=device)

    def cost(x0: Tensor) -> Tensor:
        return _distance(x0, start, goal, stack)

    with evaluating(model):
        for now, then in pairwise(table):
            x = _step(model, x, now.expand(batch, -1), then.expand(batch, -1), labels, guidance, cost)
            if not bool(x.isfinite().all()):
                raise ValueError(
                    "the plan has values that are not finite: try less guidance, or check the weights"
                )
    places = x[:, 1 : tokens + 1].reshape(batch, -1, size)[:, :horizon]
    out: Tensor = (places * model.std + model.mean).float()
    return out


def replan(
    model: DiffusionForcing,
    act: Callable[[Tensor, Tensor], Tensor],
    start: Tensor,
    goal: Tensor,
    *,
    horizon: int | None = None,
    every: int = 50,
    **options: Any,
) -> Tensor:
    """Plan, carry out the first part, and plan the rest anew from where that has led.

    Args:
        model: as for `plan`.
        act: goes from positions `[B, c]` towards the next ones of the plan `[B, c]` and returns where it came to.
        start, goal: as for `plan`.
        horizon: positions in all; None is the most that the model plans.
        every: positions that are carried out of a plan; the released planner's 50.
        **options: of `plan`.

    Returns:
        Where it went, `[B, horizon, c]`.

    Raises:
        TypeError, ValueError: see `plan`.
    """
    every = check_whole("every", every, 1)
    left = (
        model.config.frames - model.config.frame_stack
        if horizon is None
        else check_whole("horizon", horizon, 1)
    )
    here, went = start, []
    while left > 0:
        wanted = plan(model, here, goal, horizon=left, **options)
        for place in wanted[:, :every].unbind(1):
            here = act(here, place)
            went.append(here)
        left -= every
    return torch.stack(went, dim=1)


def _distance(x0: Tensor, start: Tensor, goal: Tensor, stack: int) -> Tensor:
    """What guidance makes small, `[B]`: squashed distances to the start, then to the goal."""
    places = x0.reshape(len(x0), -1, start.shape[1])  # [B, tokens * stack, c]
    count = places.shape[1]
    wanted = torch.cat(
        [start[:, None].expand(-1, stack, -1), goal[:, None].expand(-1, count - stack, -1)], dim=1
    )
    # Values are in pairs: positions, then speeds.
    pairs = (places - wanted).unflatten(-1, (-1, 2)).norm(dim=-1) / 2
    weight = torch.full((count, 1), LATER_WEIGHT, device=x0.device)
    weight[:stack] = START_WEIGHT
    # A column for actions, of which there are none, counts in the mean.
    return TOTAL_WEIGHT * (pairs.tanh() * weight).sum((1, 2)) / (count * (pairs.shape[-1] + 1))


def _step(
    model: DiffusionForcing,
    x: Tensor,
    now: Tensor,
    then: Tensor,
    labels: Tensor,
    guidance: float,
    cost: Callable[[Tensor], Tensor],
) -> Tensor:
    """One step of every token from its time `now` to `then`; tokens whose time stays do not change."""
    schedule, read = model.schedule, torch.where(now < 0, model.context_time, now)
    calm = add_noise(schedule, x, torch.zeros_like(x), read)
    seen = torch.where((now < 0).unsqueeze(-1), calm, x)
    alpha, sigma = (part.to(x.dtype).unsqueeze(-1) for part in schedule.alpha_sigma(read))
    alpha_to, sigma_to = (part.to(x.dtype).unsqueeze(-1) for part in schedule.alpha_sigma(then))
    with torch.set_grad_enabled(guidance != 0):
        seen = seen.detach().requires_grad_(guidance != 0)
        output = model(seen, read, labels)
        if model.prediction == "x0":
            x0 = output
        elif model.prediction == "eps":
            x0 = (seen - sigma * output) / alpha
        else:
            x0 = alpha * seen - sigma * output
        eps = (seen - alpha * x0) / sigma
        if guidance:
            (downhill,) = torch.autograd.grad(cost(x0).sum(), seen)
            eps = eps + sigma_to * guidance * downhill
            x0 = (seen - sigma * eps) / alpha
    moved = alpha_to * x0 + sigma_to * eps
    return torch.where((now != then).unsqueeze(-1), moved, x).detach()
