"""Generation of continuous tokens in random order, several at a time (MAR, arXiv:2406.11838, section 3.5)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from arcore.decoding._arguments import (
    check_drawn,
    check_guidance,
    check_kind,
    check_labels,
    check_solver,
    check_tensor,
    dtype_of,
)
from arcore.decoding._evaluating import evaluating
from arcore.decoding.draws import RowNormals, row_seeds
from arcore.nn.checks import check_number, check_whole
from arcore.nn.protocols import MaskedModel
from arcore.schedules import DDPM, Solver


def masked_counts(tokens: int, iterations: int) -> list[int]:
    """How many tokens are still missing before each iteration, and after the last.

    They follow a cosine, so that few tokens come at first; every iteration adds at least one.

    Args:
        tokens: L.
        iterations: K, from 1 to L.

    Returns:
        K + 1 numbers, from L to 0.

    Raises:
        ValueError: K is out of range.
    """
    iterations, tokens = check_whole("iterations", iterations, 1), check_whole("tokens", tokens, 1)
    if iterations > tokens:
        raise ValueError(f"expected 1 to {tokens} iterations for {tokens} tokens but got {iterations}")
    counts = [tokens]
    for k in range(1, iterations):
        rest = math.floor(tokens * math.cos(math.pi / 2 * k / iterations))
        counts.append(max(1, min(counts[-1] - 1, rest)))
    return [*counts, 0]


@torch.no_grad()
def generate_masked(
    model: MaskedModel,
    labels: Tensor,
    *,
    iterations: int | None = None,
    solver: Solver | None = None,
    times: Tensor | None = None,
    cfg_scale: float = 1.0,
    cfg_schedule: Literal["linear", "constant"] = "linear",
    temperature: float = 1.0,
    seed: int | Sequence[int] = 0,
) -> Tensor:
    """Draw tokens.

    The model is put into evaluation mode for the time of the call.

    Args:
        model: the model.
        labels: int64 `[B]`, on the model's device.
        iterations: passes of the transformer, from 1 to L; None is 64, or L where that is less.
        solver: of the head; None is the ancestral one, with a learned variance where the head has one.
        times: that the head visits, decreasing to clean; None is 100 evenly spread ones.
        cfg_scale: weight w of the conditional prediction; 1 leaves the unconditional rows out.
        cfg_schedule: `"linear"`: 1 + (w - 1) * n / L where all but n tokens are still missing after the iteration, with
            L - 1 in place of L in the last, as the published sampler has it. `"constant"`: w.
        temperature: factor on the noise that the default solver adds.
        seed: one number, or one per row; see `row_seeds`. A row's order and noise depend on its seed alone.

    Returns:
        float32 `[B, L, C]`.

    Raises:
        TypeError: the model is of another kind, an argument has a wrong type or dtype, or a head is in half precision.
        ValueError: an argument is out of range, or the model gave NaN.
    """
    check_kind("model", model, MaskedModel)
    check_labels(labels)
    check_solver(solver)
    check_tensor("times", times)
    check_guidance(cfg_scale)
    temperature = check_number("temperature", temperature)
    if cfg_schedule not in ("linear", "constant"):
        raise ValueError(f"expected cfg_schedule to be linear or constant but got {cfg_schedule!r}")
    if solver is not None and temperature != 1.0:
        raise ValueError("temperature is for the default solver: give yours its own")
    (length, channels), head = model.token_shape, model.head
    schedule: Any = head.schedule
    counts = masked_counts(length, min(64, length) if iterations is None else iterations)
    if solver is None:
        variance: Literal["learned", "posterior"] = "learned" if head.learn_variance else "posterior"
        solver = DDPM(schedule, head.prediction, variance=variance, temperature=temperature)
    if times is None:
        times = schedule.grid(min(100, schedule.num_steps), "linspace")
    batch, device = len(labels), labels.device
    drawn = len(times) - 1 if solver.stochastic else 1
    guided = cfg_scale != 1.0
    rows = torch.cat([labels, torch.full_like(labels, model.null_class)]) if guided else labels
    normals = RowNormals(row_seeds(seed, batch))
    order = normals.draw(length).argsort(dim=1).to(device)
    tokens = torch.zeros(batch, length, channels, device=device)
    dtype = dtype_of(model)
    with evaluating(model):
        for iteration, (missing, rest) in enumerate(pairwise(counts), start=1):
            # Sorted: the sum over keys is then the same for the same set.
            visible = order[:, missing:].sort(dim=1).values
            places = order[:, rest:missing]
            known = tokens.to(dtype)
            if guided:
                known, visible = torch.cat([known, known]), torch.cat([visible, visible])
            z = model(known, visible, rows)
            z = z.gather(1, places.repeat(1 + guided, 1).unsqueeze(-1).expand(-1, -1, z.shape[-1])).flatten(
                0, 1
            )
            wanted, *uncond = z.chunk(1 + guided)
            scale = cfg_scale
            if cfg_schedule == "linear":
                scale = 1 + (cfg_scale - 1) * (length - max(1, rest)) / length
            noise = normals.draw(drawn, missing - rest, channels, device=device).transpose(0, 1)
            fresh = head.sample(
                wanted,
                noise.flatten(1, 2),
                solver=solver,
                times=times,
                uncond=uncond[0] if guided else None,
                cfg_scale=scale,
            )
            check_drawn(fresh, f"iteration {iteration} of {len(counts) - 1}")
            index = places.unsqueeze(-1).expand(-1, -1, channels)
            tokens = tokens.scatter(1, index, fresh.float().unflatten(0, (batch, missing - rest)))
    return tokens
