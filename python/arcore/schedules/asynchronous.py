"""Frames of a video at times of their own: how such times are drawn in training, and counted down in sampling.

Training: `fopp_times` draws times that grow from frame to frame, so that early frames are cleaner (AR-Diffusion,
arXiv:2503.07418, section 3.3). Times that are independent of each other (Diffusion Forcing, arXiv:2407.01392) are
`schedule.sample_times(B, F)`, and equal times `schedule.sample_times(B, 1)`, of any noise schedule.

Sampling: a table of levels `[M, F]` says at which of S steps each frame is before iteration m = 0..M - 1; S is pure
noise, 0 is clean. Each column falls by at most one per row. `table_times` turns it into times of a noise schedule.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from arcore._kinds import Axes, check_kinds

Levels = Annotated[Tensor, Axes("S F", whole=True)]


@check_kinds
def fopp_times(
    batch: int,
    frames: int,
    num_steps: int,
    *,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Times that never fall from frame to frame, drawn by the frame-oriented probability propagation of AR-Diffusion.

    One frame and its time are uniform; from there the times of earlier and later frames are drawn one by one, each in
    proportion to the number of ways in which the remaining frames can continue. So every frame sees every time about
    as often; a draw that is uniform over all non-decreasing rows almost never gives the first frame a late time.

    Args:
        batch: rows B.
        frames: F.
        num_steps: T.
        device: of the result.
        generator: of the random numbers.

    Returns:
        int64 `[B, F]`, each row non-decreasing, 0 to T - 1.

    Raises:
        ValueError: a count is below 1.
    """
    _check_counts(batch=batch, frames=frames, num_steps=num_steps)
    before = _log_ways(frames, num_steps).to(device)  # [F, T]
    start = torch.randint(frames, (batch, 1), device=device, generator=generator)
    first = torch.randint(num_steps, (batch, 1), device=device, generator=generator)
    out = torch.zeros(batch, frames, dtype=torch.int64, device=device).scatter(1, start, first)
    steps = torch.arange(num_steps, device=device)

    def draw(weights: Tensor, allowed: Tensor) -> Tensor:
        shares = torch.where(allowed, weights, -math.inf).softmax(dim=1)
        return torch.multinomial(shares, 1, generator=generator)[:, 0]

    for frame in range(frames - 2, -1, -1):
        drawn = draw(before[frame], steps <= out[:, frame + 1, None])
        out[:, frame] = torch.where(frame < start[:, 0], drawn, out[:, frame])
    for frame in range(1, frames):
        # By symmetry: later frames seen from the end, times counted from T - 1 down.
        drawn = draw(before[frames - 1 - frame].flip(0), steps >= out[:, frame - 1, None])
        out[:, frame] = torch.where(frame > start[:, 0], drawn, out[:, frame])
    return out


@lru_cache(maxsize=8)
def _log_ways(frames: int, num_steps: int) -> Tensor:
    """Logarithm of the number of non-decreasing times of `f` frames that end at t or before, C(t + f, f): `[F, T]`."""
    frame = torch.arange(frames, dtype=torch.float64, device="cpu")[:, None]
    step = torch.arange(num_steps, dtype=torch.float64, device="cpu")
    return torch.lgamma(step + frame + 1) - torch.lgamma(step + 1) - torch.lgamma(frame + 1)


@check_kinds
def fopp_marginals(frames: int, num_steps: int) -> Tensor:
    """The exact probability that `fopp_times` gives frame f the time t, float64 `[F, T]`; takes F^2 T^2 operations."""
    _check_counts(frames=frames, num_steps=num_steps)
    ways = _log_ways(frames, num_steps)
    earlier = torch.tril(torch.ones(num_steps, num_steps, dtype=torch.bool))  # row: the next frame's time
    total = torch.zeros(frames, num_steps, dtype=torch.float64)
    for start in range(frames):
        law = torch.full((num_steps,), 1 / num_steps, dtype=torch.float64)
        total[start] += law
        for frame in range(start - 1, -1, -1):
            law = law @ ways[frame].expand(num_steps, -1).masked_fill(~earlier, -math.inf).softmax(dim=1)
            total[frame] += law
        law = torch.full((num_steps,), 1 / num_steps, dtype=torch.float64)
        for frame in range(start + 1, frames):
            weights = ways[frames - 1 - frame].flip(0).expand(num_steps, -1)
            law = law @ weights.masked_fill(~earlier.T, -math.inf).softmax(dim=1)
            total[frame] += law
    return total / frames


@check_kinds
def adaptive_levels(frames: int, steps: int, lag: int) -> Tensor:
    """AR-Diffusion's sampling table: each frame starts `lag` iterations after the one before (section 3.4).

    Args:
        frames: F.
        steps: S of each frame.
        lag: 0 denoises all frames together, S one after the other.

    Returns:
        int64 `[S + (F - 1) * lag + 1, F]`, from S everywhere to 0 everywhere.

    Raises:
        ValueError: a count is below 1, or `lag` is outside 0..S.
    """
    _check_counts(frames=frames, steps=steps)
    if not 0 <= lag <= steps:
        raise ValueError(f"expected lag from 0 to steps={steps} but got {lag}")
    iteration = torch.arange(steps + (frames - 1) * lag + 1)[:, None]
    return steps - (iteration - lag * torch.arange(frames)).clamp(0, steps)


@check_kinds
def pyramid_levels(frames: int, steps: int, uncertainty: float) -> Tensor:
    """Diffusion Forcing's pyramid: frame i is floor(i * uncertainty) levels behind the first.

    Args:
        frames: F.
        steps: S of each frame.
        uncertainty: levels that a frame adds; 0 denoises all together, S one after the other.

    Returns:
        int64 `[S + floor((F - 1) * uncertainty) + 1, F]`.

    Raises:
        ValueError: a count is below 1, or `uncertainty` is negative.
    """
    _check_counts(frames=frames, steps=steps)
    if not 0 <= uncertainty < math.inf:
        raise ValueError(f"expected a finite uncertainty >= 0 but got {uncertainty}")
    behind = (torch.arange(frames, dtype=torch.float64) * uncertainty).floor().long()
    height = steps + int(behind[-1]) + 1
    return (steps + behind - torch.arange(height)[:, None]).clamp(0, steps)


@check_kinds
def trapezoid_levels(frames: int, steps: int, uncertainty: float) -> Tensor:
    """Diffusion Forcing's trapezoid: from both ends inwards, for sequences whose first and last frames are likeliest.

    Frame i is floor(min(i, F - 1 - i) * uncertainty) levels behind the ends. (The released table leaves a frame of an
    even number of them as noise that counts as clean, gives the last frame a delay, and for small uncertainties stops
    before the end.)

    Args:
        frames: F.
        steps: S of each frame.
        uncertainty: levels that a frame adds; 0 denoises all together.

    Returns:
        int64 `[S + floor(floor((F - 1) / 2) * uncertainty) + 1, F]`.

    Raises:
        ValueError: a count is below 1, or `uncertainty` is negative.
    """
    half = pyramid_levels((frames + 1) // 2, steps, uncertainty)
    return torch.cat([half, half[:, : frames // 2].flip(1)], dim=1)


@check_kinds
def grouped_levels(levels: Levels, frames: int) -> Tensor:
    """The table of more frames than another has: groups of its F frames go through it one after the other.

    Args:
        levels: table `[M, F]`, from S everywhere to 0 everywhere.
        frames: of all groups; a last group that is cut short follows the first columns.

    Returns:
        int64 `[M', frames]`.

    Raises:
        ValueError: `frames` is below 1, or there are no levels.
    """
    _check_counts(frames=frames)
    if not levels.numel():
        raise ValueError(f"expected levels of at least one step and frame but got {tuple(levels.shape)}")
    steps, size, rows = int(levels[0, 0]), levels.shape[1], []
    for start in range(0, frames, size):
        group = levels[:, : frames - start]
        # The last row is the next group's first.
        group = group[: int((group != 0).any(dim=1).sum())]
        before, after = start, max(0, frames - start - size)
        rows.append(F.pad(F.pad(group, (before, 0), value=0), (0, after), value=steps))
    return torch.cat([*rows, levels.new_zeros(1, frames)])


class Windows(NamedTuple):
    """The frames of a long video that take part in each iteration: those from `low` up to `high`, int64 `[M - 1]`."""

    low: Tensor
    high: Tensor


@check_kinds
def sliding_windows(levels: Levels, size: int) -> Windows:
    """Where a window of `size` frames lies so that it holds all frames that move.

    It ends with the last frame that has begun by the iteration, but never before `size`.

    Args:
        levels: table `[M, F]`.
        size: frames that the network takes at once.

    Returns:
        The windows of the M - 1 iterations.

    Raises:
        ValueError: a frame would leave the window before it is clean, as a lag of fewer than S / size iterations makes
            it.
    """
    frames = levels.shape[1]
    if not 1 <= size <= frames:
        raise ValueError(f"expected a window of 1 to {frames} frames but got {size}")
    moving = levels[1:] != levels[:-1]
    place = torch.arange(frames)
    first = torch.where(moving, place, frames).amin(dim=1)
    high = (torch.where(moving, place, -1).amax(dim=1) + 1).clamp(min=size)
    low = high - size
    if bool((first < low).any()):
        raise ValueError(
            f"expected at most {size} frames to be on their way at once but got "
            f"{int((high - first).max())}: take a larger lag or window, or fewer steps"
        )
    return Windows(low, high)


@check_kinds
def table_times(
    levels: Annotated[Tensor, Axes("...", whole=True)], grid: Annotated[Tensor, Axes("S")]
) -> Tensor:
    """Times of a table of levels.

    Args:
        levels: int64, 0 to S.
        grid: `[S + 1]` from noise to clean, as a noise schedule's `grid` gives it.

    Returns:
        Like levels, in the dtype of `grid`.

    Raises:
        ValueError: a level is outside the grid.
    """
    if levels.numel() and not 0 <= int(levels.min()) <= int(levels.max()) < len(grid):
        raise ValueError(
            f"expected levels from 0 to {len(grid) - 1} but got {int(levels.min())} to {int(levels.max())}"
        )
    return grid[len(grid) - 1 - levels]


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"expected {name} >= 1 but got {count}")
