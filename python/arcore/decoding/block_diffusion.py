"""Generation block by block, each by diffusion (ACDiT, arXiv:2412.07720, section 3.3)."""

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
from arcore.nn.checks import check_whole
from arcore.nn.protocols import BlockModel
from arcore.schedules import DPMSolver2M, Solver


def generate_blocks(
    model: BlockModel,
    labels: Tensor,
    *,
    solver: Solver | None = None,
    times: Tensor | None = None,
    cfg_scale: float = 1.5,
    guided_channels: int | None = None,
    context: Tensor | None = None,
    seed: int | Sequence[int] = 0,
) -> Tensor:
    """Draw sequences of blocks, with a cache that is allocated once.

    Each block starts as noise and is denoised against the cache, which is only read. When it is clean it is added to
    the cache; the last one is not, as nothing reads it. The prediction is u + cfg_scale (c - u) with the conditional c
    and the unconditional u. Both copies of a block stand in one sequence and read one cache.

    The model is put into evaluation mode for the time of the call.

    Args:
        model: the model.
        labels: int64 `[B]`, on the model's device.
        solver: for the model's schedule and prediction; default `DPMSolver2M`.
        times: decreasing times `[S + 1]`, the last one clean, for example from `model.schedule.grid`; default 25 steps
            with spacing "linspace_inner", those of the released sampler of ACDiT (all of the schedule's but one where
            it has fewer). The released sampler of DiT takes `DDPM(..., variance="learned")`, 250 steps with spacing
            "linspace", `cfg_scale=4` and `guided_channels=3`.
        cfg_scale: strength of guidance; 1 runs the conditional copy alone.
        guided_channels: guide the first entries along the first axis of a block only, and take the others from the
            conditional copy; 3 is what the released sampler of DiT does. None guides all.
        context: clean first blocks `[B, K, *S]` to continue, K < T.
        seed: one number, or one per row. A row's draws depend on its own seed alone, never on the rest of the batch.
            Row i of a single number has the seed (number, i).

    Returns:
        float32 `[B, T, *S]`, T blocks of shape S, context included.

    Raises:
        TypeError: the model is of another kind, or an argument has a wrong type or dtype.
        ValueError: shapes do not fit, times leave the schedule or do not decrease to clean, guidance is negative, or
            the model gave NaN.
    """
    blocks = stream_blocks(
        model,
        labels,
        solver=solver,
        times=times,
        cfg_scale=cfg_scale,
        guided_channels=guided_channels,
        context=context,
        seed=seed,
    )
    new = list(blocks)
    return torch.stack([*([] if context is None else context.float().unbind(1)), *new], dim=1)


@torch.no_grad()
def stream_blocks(
    model: BlockModel,
    labels: Tensor,
    *,
    solver: Solver | None = None,
    times: Tensor | None = None,
    cfg_scale: float = 1.5,
    guided_channels: int | None = None,
    context: Tensor | None = None,
    seed: int | Sequence[int] = 0,
) -> Iterator[Tensor]:
    """Yield the new blocks of `generate_blocks`, float32 `[B, *S]`, as soon as each is clean; arguments as there."""
    check_kind("model", model, BlockModel)
    check_solver(solver)
    check_tensor("times", times)
    solver = solver or DPMSolver2M(model.schedule, model.prediction)
    if times is None:
        most = getattr(model.schedule, "num_steps", 1000) - 1
        times = model.schedule.grid(min(25, most), "linspace_inner")
    _check(model, labels, times, cfg_scale, guided_channels, context)
    batch, device = len(labels), labels.device
    times = times.to(device)
    guided = cfg_scale != 1.0
    classes = torch.stack([labels, torch.full_like(labels, model.null_class)], 1)[:, : 1 + guided]
    normals = RowNormals(row_seeds(seed, batch))
    dtype = dtype_of(model)
    with evaluating(model):
        cache = model.make_cache(batch, 1 + guided)
        known = [] if context is None else list(context.unbind(1))
        for block in known:
            model.commit(block.to(dtype), cache)
        for index in range(len(known), model.num_blocks):
            x, history = normals.draw(*model.block_shape, device=device), None
            for t, t_next in pairwise(times):
                rows = x.to(dtype).unsqueeze(1).expand(-1, 1 + guided, *model.block_shape)
                output, variance = model.denoise(rows, t.expand(batch, 1 + guided), classes, cache)
                prediction = _guide(output, cfg_scale, guided_channels)
                noise = None
                if solver.stochastic and t_next != model.schedule.clean:
                    noise = normals.draw(*model.block_shape, device=device)
                x, history = solver.step(
                    prediction,
                    x,
                    t,
                    t_next,
                    history=history,
                    noise=noise,
                    variance=variance[:, 0] if variance is not None and solver.learned_variance else None,
                )
            check_drawn(x, f"block {index + 1} of {model.num_blocks}")
            if index + 1 < model.num_blocks:
                model.commit(x.to(dtype), cache)
            yield x


def _guide(output: Tensor, scale: float, channels: int | None) -> Tensor:
    """`[B, G, *S]` to `[B, *S]`."""
    if output.shape[1] == 1:
        return output[:, 0]
    conditional, unconditional = output.unbind(1)
    mixed = unconditional + scale * (conditional - unconditional)
    if channels is None:
        return mixed
    return torch.cat([mixed[:, :channels], conditional[:, channels:]], dim=1)


def _check(
    model: BlockModel,
    labels: Tensor,
    times: Tensor,
    cfg_scale: float,
    guided_channels: int | None,
    context: Tensor | None,
) -> None:
    check_labels(labels)
    check_grid(model.schedule, times)
    check_guidance(cfg_scale)
    if guided_channels is not None:
        check_whole("guided_channels", guided_channels, 0)
    check_context(context, len(labels), model.block_shape, model.num_blocks, "blocks")
