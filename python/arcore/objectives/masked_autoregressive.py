"""Objective of masked autoregression over continuous tokens (MAR, arXiv:2406.11838, sections 3.2 and 3.4)."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor

from arcore.nn import DiffusionHead
from arcore.nn.kinds import Axes, Bounds, Count, Positive, Size, check_kinds
from arcore.objectives.diffusion import diffusion_loss, variance_bound
from arcore.schedules import VPSchedule, add_noise


@check_kinds
def draw_visible(
    batch: Count,
    tokens: Size,
    *,
    least: float = 0.7,
    mean: Annotated[float, Bounds(finite=True)] = 1.0,
    std: Positive = 0.25,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Which places a batch is trained to see, and which to draw.

    The masked share is one number for the batch, normal with `mean` and `std`, cut to [least, 1]; its tokens are the
    first of a random order, another one for each row.

    Args:
        batch: rows B.
        tokens: L.
        least: smallest share that is masked, 0 to 1.
        mean, std: of the normal number before the cut.
        device: of the result.
        generator: of the random numbers.

    Returns:
        int64 places, sorted: visible `[B, V]` and masked `[B, L - V]`.

    Raises:
        ValueError: `least` is outside [0, 1) or std is not above 0.
    """
    if not 0.0 <= least < 1.0 or not std > 0.0:
        raise ValueError(f"expected 0 <= least < 1 and std > 0 but got {least} and {std}")
    low, high = (0.5 * (1 + math.erf((edge - mean) / (std * math.sqrt(2)))) for edge in (least, 1.0))
    uniform = torch.rand((), device=device, generator=generator, dtype=torch.float64).item()
    # The inverse of the normal distribution function, between those of the two edges.
    quantile = torch.special.ndtri(torch.tensor(low + (high - low) * uniform, dtype=torch.float64)).item()
    share = min(max(mean + std * quantile, least), 1.0)
    masked = min(max(math.ceil(tokens * share), 1), tokens)
    order = torch.rand(batch, tokens, device=device, generator=generator).argsort(dim=1)
    return order[:, masked:].sort(dim=1).values, order[:, :masked].sort(dim=1).values


@check_kinds
def diffusion_head_loss(
    head: DiffusionHead,
    tokens: Annotated[Tensor, Axes("M C")],
    z: Annotated[Tensor, Axes("M D")],
    *,
    repeats: Size = 4,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Mean squared error of the head at random times.

    Args:
        head: the head.
        tokens: clean tokens `[M, C]`.
        z: `[M, cond_dim]`.
        repeats: times and noises that each token is trained at; the head is small beside the transformer.
        generator: of the random numbers.

    Returns:
        The squared error, and the bound of the learned variance in bits or None, both scalar and float32. The loss is
        their sum.
    """
    tokens, z = tokens.float().repeat(repeats, 1), z.repeat(repeats, 1)
    t = head.schedule.sample_times(len(tokens), device=tokens.device, generator=generator)
    eps = torch.randn(tokens.shape, device=tokens.device, generator=generator)
    noisy = add_noise(head.schedule, tokens, eps, t)
    output, variance = head(noisy, t, z)
    squares = diffusion_loss(output, tokens, eps, t, head.schedule, prediction=head.prediction)
    if variance is None:
        return squares, None
    assert isinstance(head.schedule, VPSchedule)
    return squares, variance_bound(output, variance, tokens, noisy, t, head.schedule).mean()
