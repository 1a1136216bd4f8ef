"""AR-Diffusion's claim about its scheduler: frames keep their order, and every frame is trained at every time."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from arcore.catalog.claims import Claim, at_least, at_most, equals
from arcore.schedules import fopp_marginals
from arcore.zoo.dynamics.ar_diffusion.model import ARDiffusion, ar_diffusion_tiny

FRAMES, STEPS = 16, 200


def claim(*, quick: bool) -> Claim:
    """The law of the training times at the paper's 16 frames, that of a uniform draw, and what the model draws."""
    law = fopp_marginals(FRAMES, STEPS)
    # A uniform draw over all non-decreasing rows: how many of them pass time t at frame f.
    paths = torch.tensor(
        [
            [
                math.comb(t + f, f) * math.comb(STEPS - 1 - t + FRAMES - 1 - f, FRAMES - 1 - f)
                for t in range(STEPS)
            ]
            for f in range(FRAMES)
        ],
        dtype=torch.float64,
    )
    uniform = paths / paths.sum(dim=1, keepdim=True)

    model = ARDiffusion(replace(ar_diffusion_tiny(), num_steps=STEPS))
    rows = 10_000 if quick else 500_000
    times = model.training_times(rows, generator=torch.Generator().manual_seed(0))
    frames = times.shape[1]
    tenths = fopp_marginals(frames, STEPS).unflatten(1, (10, STEPS // 10)).sum(dim=2)
    drawn = torch.stack([torch.bincount(frame // (STEPS // 10), minlength=10) for frame in times.T]) / rows
    deviation = ((drawn - tenths).abs() / (tenths / rows).sqrt()).max()

    def picture(figure: Any) -> None:
        for place, (title, table) in enumerate((("one frame drawn first", law), ("all rows alike", uniform))):
            axes = figure.add_subplot(1, 2, place + 1)
            image = axes.imshow((STEPS * table).numpy(), aspect="auto", origin="lower", vmin=0, vmax=4)
            axes.set(xlabel="time", ylabel="frame", title=title)
        figure.colorbar(image, ax=figure.axes, label="share of evenly often")

    return Claim(
        (
            equals("training times that fall from one frame to the next", (times.diff(dim=1) < 0).sum(), 0),
            at_least("least share of evenly often that a frame sees a time", STEPS * law.min(), 1 / FRAMES),
            equals("the same, the value of the law", STEPS * law.min(), 0.0628, tolerance=1e-4),
            at_most("the same when all non-decreasing rows are alike", STEPS * uniform.min(), 1e-20),
            at_most("what the model draws, standard errors from the law, at most", deviation, 5.0),
        ),
        draw=picture,
        size=(9.0, 3.5),
    )
