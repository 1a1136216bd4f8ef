"""Generation of videos, each frame at a time of its own.

In the order of AR-Diffusion (arXiv:2503.07418, section 3.4) or of any table of levels, with the steadied context of
Diffusion Forcing (arXiv:2407.01392, section 3.3).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from arcore.decoding._arguments import (
    check_context,
    check_drawn,
    check_guidance,
    check_kind,
    check_labels,
    check_solver,
    check_tensor,
    dtype_of,
)
from arcore.decoding._evaluating import evaluating
from arcore.decoding.draws import RowNormals, check_grid, row_seeds
from arcore.nn.checks import check_instance, check_number, check_whole
from arcore.nn.protocols import FrameModel
from arcore.schedules import DDIM, Solver, adaptive_levels, add_noise, sliding_windows


def generate_frames(
    model: FrameModel,
    labels: Tensor,
    *,
    lag: int | None = None,
    frames: int | None = None,
    levels: Tensor | None = None,
    solver: Solver | None = None,
    times: Tensor | None = None,
    cfg_scale: float = 1.0,
    context: Tensor | None = None,
    context_time: float | None = None,
    context_noise: bool = False,
    official_quirks: bool = False,
    seed: int | Sequence[int] = 0,
) -> Tensor:
    """Draw videos.

    Every frame starts as noise and goes through the same S steps, each frame `lag` iterations after the one before: S
    + (F - 1) * lag iterations in all. Frames that wait or are finished stay as they are, bit for bit.

    Of a `cacheable` model, only frames that have begun and are not finished are computed, and those that are finished
    lie in a cache. Otherwise every iteration computes all frames that the model takes. A longer video slides a window
    over the frames, which moves their positions: the cache begins anew with each move.

    Finished frames are shown to the network at `context_time`. Above clean they are shrunk as data of that time are,
    but have no noise: a network that expects errors of that size in what it is given takes less of them over, which
    is how Diffusion Forcing steadies long videos. `context_noise` adds the noise.

    The model is put into evaluation mode for the time of the call.

    Args:
        model: the model.
        labels: int64 `[B]`, on the model's device.
        lag: iterations from the start of a frame to that of the next: 0 denoises all frames together, S one after the
            other. Default S / `model.frames_at_once`.
        frames: of the videos, the context's included; default `model.num_frames`. With more, `lag` must be at least
            S / `model.num_frames`.
        levels: table `[M, frames]` in place of `lag`, as `arcore.schedules` makes them: S before a frame starts, 0 when
            it is finished.
        solver: for the model's schedule and prediction; default `DDIM`.
        times: decreasing times `[S + 1]`, the last one clean, for example from `model.schedule.grid`; default 50 steps
            (all of the schedule's where it has fewer) with the spacing that the model has as `spacing`, or "linspace".
        cfg_scale: weight w of the conditional prediction c, u + w (c - u) with the unconditional u; 1 leaves the
            unconditional rows out.
        context: clean first frames `[B, K, *S]` to continue, K < `frames`.
        context_time: None is the model's own.
        context_noise: add noise of that time to what is shown of finished frames, to each the same throughout.
        official_quirks: do what the released sampler of AR-Diffusion does: by default 1 more than the times of spacing
            "every", and then 0, so that a trace of noise stays; frames that wait are shown to the network as at
            time T - 1 and finished ones as at the last but one of the times; and finished frames are stepped once more
            in every iteration, which multiplies them by about 1.00002. Nothing is cached, and `context_time` and
            `context_noise` mean nothing.
        seed: one number, or one per row. A row's draws depend on its own seed alone, never on the rest of the batch.

    Returns:
        float32 `[B, frames, *S]`, frames of shape S, context included.

    Raises:
        TypeError: the model is of another kind, or an argument has a wrong type or dtype.
        ValueError: shapes do not fit, times leave the schedule or do not decrease to clean, levels are no way from S to
            0, a frame would leave the window before it is finished, guidance is negative, or the model gave NaN.
    """
    steady = (context_time, context_noise)
    options = (lag, frames, levels, solver, times, cfg_scale, context, steady, official_quirks, seed)
    *_, (videos, _) = _iterations(model, labels, *options)
    return videos


def stream_frames(
    model: FrameModel,
    labels: Tensor,
    *,
    lag: int | None = None,
    frames: int | None = None,
    levels: Tensor | None = None,
    solver: Solver | None = None,
    times: Tensor | None = None,
    cfg_scale: float = 1.0,
    context: Tensor | None = None,
    context_time: float | None = None,
    context_noise: bool = False,
    seed: int | Sequence[int] = 0,
) -> Iterator[Tensor]:
    """Yield the new frames of `generate_frames`, float32 `[B, *S]`, as soon as each is finished; arguments as there."""
    check_kind("model", model, FrameModel)
    check_labels(labels)
    check_context(context, len(labels), model.frame_shape, frames or model.num_frames, "frames")
    known = 0 if context is None else context.shape[1]
    steady = (context_time, context_noise)
    options = (lag, frames, levels, solver, times, cfg_scale, context, steady, False, seed)
    for videos, finished in _iterations(model, labels, *options):
        for frame in range(known, finished):
            yield videos[:, frame]
        known = max(known, finished)


@torch.no_grad()
def _iterations(
    model: FrameModel,
    labels: Tensor,
    lag: int | None,
    frames: int | None,
    levels: Tensor | None,
    solver: Solver | None,
    times: Tensor | None,
    cfg_scale: float,
    context: Tensor | None,
    steady: tuple[float | None, bool],
    official_quirks: bool,
    seed: int | Sequence[int],
) -> Iterator[tuple[Tensor, int]]:
    """The videos after each iteration, and how many of their first frames are finished."""
    check_kind("model", model, FrameModel)
    check_labels(labels)
    check_solver(solver)
    check_tensor("times", times)
    check_tensor("levels", levels)
    for name, value in (("context_noise", steady[1]), ("official_quirks", official_quirks)):
        check_instance(name, value, bool)
    if steady[0] is not None:
        check_number("context_time", steady[0])
    batch, device = len(labels), labels.device
    solver = solver or DDIM(model.schedule, model.prediction)
    if times is None:
        times = _default_times(model, official_quirks)
    total = model.num_frames if frames is None else check_whole("frames", frames, 1)
    if lag is not None:
        lag = check_whole("lag", lag, 0, "iterations")
    check_context(context, batch, model.frame_shape, total, "frames")
    known = 0 if context is None else context.shape[1]
    _check(model, times, cfg_scale, total, official_quirks)
    steps = len(times) - 1
    if levels is None:
        own = adaptive_levels(total - known, steps, steps // model.frames_at_once if lag is None else lag)
        levels = torch.cat([own.new_zeros(len(own), known), own], dim=1)
    elif lag is not None:
        raise ValueError("expected lag or levels but got both")
    levels, times = levels.cpu(), times.cpu()
    _check_levels(levels, steps, total, known)
    windows = sliding_windows(levels, model.num_frames)
    context_time, context_noise = steady
    if context_time is None:
        context_time = model.context_time
    as_context = torch.tensor([context_time], device=device).to(times.dtype)
    model.schedule.check_times("context_time", as_context)
    shrinks = not official_quirks and (context_noise or context_time != model.schedule.clean)
    guided = cfg_scale != 1.0
    rows = torch.cat([labels, torch.full_like(labels, model.null_class)]) if guided else labels
    dtype = dtype_of(model)
    normals = RowNormals(row_seeds(seed, batch))
    x, history = normals.draw(total, *model.frame_shape, device=device), None
    context_eps = (
        normals.draw(total, *model.frame_shape, device=device) if context_noise else torch.zeros_like(x)
    )
    if context is not None:
        x[:, :known] = context
    place = torch.arange(total)
    with evaluating(model):
        cache = model.make_cache(len(rows)) if model.cacheable and not official_quirks else None
        base = stored = 0  # the frame with which the window begins; frames up to here that are in the cache
        if cache is not None:
            model.start(rows, cache)
        for iteration, (level, target) in enumerate(pairwise(levels)):
            moving = level != target
            if not moving.any():
                continue
            low, high = int(windows.low[iteration]), int(windows.high[iteration])
            finished = _leading(level == 0)
            if cache is not None:
                if low != base:
                    cache.truncate(0)
                    model.start(rows, cache)
                    base = stored = low
                # What has not begun influences nothing.
                low, high = stored, int(moving.nonzero().max()) + 1
            now, then = times[steps - level].to(device), times[steps - target].to(device)
            shown, seen = now, x[:, low:high]
            if shrinks:
                done = (level == 0).to(device)
                shown = torch.where(done, as_context, now)
                context_seen = add_noise(
                    model.schedule, seen, context_eps[:, low:high], as_context.expand(len(seen), high - low)
                )
                seen = torch.where(_per_frame(done[low:high], seen), context_seen, seen)
            if official_quirks:
                waits = ((level == steps) & ~moving).to(device)
                again = ((level == 0) & (place >= low) & (place < high)).to(device)
                now = torch.where(again, int(times[-2]), now)
                shown = torch.where(waits, model.schedule.num_steps - 1, now)
            seen = seen.to(dtype).repeat(1 + guided, *[1] * (x.dim() - 1))
            t = shown[low:high].expand(len(rows), -1)
            if cache is not None:
                part = model.denoise(seen, t, cache, keep=finished - stored)
                stored = finished
            else:
                part = model(seen, t, rows)
            if guided:
                conditional, unconditional = part.chunk(2)
                part = unconditional + cfg_scale * (conditional - unconditional)
            # A frame that does not move stands for its own prediction, should it be stepped all the same.
            output = x.clone()
            moves = _per_frame(moving[low:high].to(device), x)
            output[:, low:high] = torch.where(moves, part, x[:, low:high])
            noise = None
            if solver.stochastic:
                noise = normals.draw(total, *model.frame_shape, device=device)
            x, history = solver.step(
                output, x, now.expand(batch, -1), then.expand(batch, -1), history=history, noise=noise
            )
            check_drawn(x, f"iteration {iteration + 1} of {len(levels) - 1}")
            yield x, _leading(target == 0)


def _default_times(model: FrameModel, official_quirks: bool) -> Tensor:
    steps = min(50, getattr(model.schedule, "num_steps", 50))
    if not official_quirks:
        times: Tensor = model.schedule.grid(steps, getattr(model, "spacing", "linspace"))
        return times
    times = model.schedule.grid(steps, "every") + 1
    if times[0] >= model.schedule.num_steps:
        raise ValueError(
            f"the released times leave a schedule of {model.schedule.num_steps} steps: pass times"
        )
    return times


def _leading(flags: Tensor) -> int:
    """How many entries are true before the first that is not."""
    return int(flags.long().cumprod(0).sum())


def _per_frame(flags: Tensor, x: Tensor) -> Tensor:
    return flags.view(1, -1, *[1] * (x.dim() - 2))


def _check(model: FrameModel, times: Tensor, cfg_scale: float, frames: int, official_quirks: bool) -> None:
    if frames < model.num_frames:
        raise ValueError(
            f"expected at least {model.num_frames} frames, what the model takes at once, but got {frames}"
        )
    check_grid(model.schedule, times, ends_clean=not official_quirks)
    check_guidance(cfg_scale)


def _check_levels(levels: Tensor, steps: int, frames: int, known: int) -> None:
    if levels.dtype != torch.int64:
        raise TypeError(f"expected levels of dtype int64 but got {levels.dtype}")
    if levels.dim() != 2 or len(levels) < 2 or levels.shape[1] != frames:
        raise ValueError(f"expected levels of shape ('M', {frames}) but got {tuple(levels.shape)}")
    first = torch.tensor([0] * known + [steps] * (frames - known), device=levels.device)
    if not torch.equal(levels[0], first) or bool(levels[-1].any()) or bool((levels.diff(dim=0) > 0).any()):
        raise ValueError(
            f"expected levels that start at {steps}, 0 for frames of the context, and fall to 0 but got "
            f"{levels[0].tolist()} at first and {levels[-1].tolist()} at last"
        )
