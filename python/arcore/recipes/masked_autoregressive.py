"""Masked autoregression over continuous tokens: a diffusion head on what a transformer makes of some of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from arcore.decoding import generate_masked
from arcore.nn.kinds import check_kinds
from arcore.objectives import diffusion_head_loss, draw_visible
from arcore.recipes._denoise import DenoiseSampling, Kind, solver_of
from arcore.recipes._images import PictureRecipe
from arcore.recipes._recipe import ZooTask
from arcore.training.config import TrainConfig


@check_kinds
@dataclass(frozen=True, kw_only=True)
class MaskedSampling(DenoiseSampling):
    """Pictures of a class, some tokens at a time.

    Attributes:
        steps: evaluations of the diffusion head per token. Default: 100.
        iterations: passes of the transformer. Default: 64, or as many as there are tokens.
        cfg_schedule: linear lets guidance grow with the tokens that are there; constant does not.
    """

    solver: Kind = "ddpm"
    iterations: int | None = None
    cfg_schedule: Literal["linear", "constant"] = "linear"


class MaskedAutoregressiveTask(ZooTask):
    """A diffusion head on what a transformer makes of some of the tokens.

    Evaluation hides the same places and draws the same times and noise for every batch and every model.
    """

    model: Any

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        tokens = self.model.to_tokens(images)
        device = tokens.device
        generator = None if self.training else torch.Generator(device).manual_seed(0)
        visible, masked = draw_visible(*tokens.shape[:2], device=device, generator=generator)
        rows = torch.arange(len(tokens), device=device)[:, None]
        z = self.model(tokens, visible, labels)[rows, masked]
        squares, bound = diffusion_head_loss(
            self.model.head, tokens[rows, masked].flatten(0, 1), z.flatten(0, 1), generator=generator
        )
        if bound is None:
            return squares, {}
        return squares + bound, {"mse": squares.detach(), "bound": bound.detach()}


class MaskedAutoregressive(PictureRecipe):
    """Tokens in random order."""

    defaults: ClassVar[TrainConfig] = TrainConfig(steps=2000, batch_size=64, lr=2e-3, weight_decay=0.0)
    sampling: ClassVar[type | None] = MaskedSampling
    task: ClassVar[type[ZooTask]] = MaskedAutoregressiveTask

    def draw(self, networks: Mapping[str, Any], labels: Tensor, options: Any) -> Tensor:
        model = networks["model"]
        steps = min(100, model.head.schedule.num_steps - 1) if options.steps is None else options.steps
        solver, times = solver_of(model.head, options, steps, learned=model.head.learn_variance)
        tokens = generate_masked(
            model,
            labels,
            iterations=options.iterations,
            solver=solver,
            times=times,
            cfg_scale=options.cfg,
            cfg_schedule=options.cfg_schedule,
            seed=options.seed,
        )
        pixels: Tensor = model.to_pixels(tokens)
        return pixels


RECIPE = MaskedAutoregressive()
