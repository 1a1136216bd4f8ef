"""Diffusion: predicting the noise in an image at random times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from arcore.decoding import generate_blocks
from arcore.nn.kinds import check_kinds
from arcore.objectives import diffusion_loss, variance_bound
from arcore.recipes._denoise import DenoiseSampling, solver_of
from arcore.recipes._images import PictureRecipe
from arcore.recipes._recipe import ZooTask
from arcore.schedules import add_noise
from arcore.training.config import TrainConfig


@check_kinds
@dataclass(frozen=True, kw_only=True)
class DiffusionSampling(DenoiseSampling):
    """Pictures of a class, denoised.

    Attributes:
        guided_channels: guide the first so many channels only, and take the others from the conditional prediction; the
            released sampler of DiT guides 3 of 4. Default: all.
    """

    guided_channels: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.guided_channels is not None and self.guided_channels < 0:
            raise ValueError(f"--guided-channels must be at least 0 but got {self.guided_channels}")


class DiffusionTask(ZooTask):
    """Noise prediction at random times; with a learned variance also its bound.

    Evaluation draws the same times and noise for every batch and every model, so losses can be compared.
    """

    model: Any

    def times(
        self, shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None
    ) -> Tensor:
        """Times to train on."""
        drawn: Tensor = self.model.schedule.sample_times(*shape, device=device, generator=generator)
        return drawn

    def noisy(self, clean: Tensor, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
        """Times of that shape, noise, and the data with it."""
        generator = None
        if not self.training:
            generator = torch.Generator(clean.device).manual_seed(0)
        t = self.times(shape, clean.device, generator)
        eps = torch.randn(clean.shape, device=clean.device, generator=generator)
        return t, eps, add_noise(self.model.schedule, clean, eps, t)

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        t, eps, noisy = self.noisy(images, len(images))
        output = self.model(noisy, t, labels)
        if not self.model.config.learn_sigma:
            return diffusion_loss(output, images, eps, t, self.model.schedule), {}
        output, variance = output.chunk(2, dim=1)
        squares = diffusion_loss(output, images, eps, t, self.model.schedule)
        bound = variance_bound(output, variance, images, noisy, t, self.model.schedule).mean()
        return squares + bound, {"mse": squares.detach(), "bound": bound.detach()}


class Diffusion(PictureRecipe):
    """All of an image denoised at once."""

    defaults: ClassVar[TrainConfig] = TrainConfig(steps=2000, batch_size=64, lr=2e-3, weight_decay=0.0)
    sampling: ClassVar[type | None] = DiffusionSampling
    task: ClassVar[type[ZooTask]] = DiffusionTask

    def draw(self, networks: Mapping[str, Any], labels: Tensor, options: Any) -> Tensor:
        model = networks["model"]
        steps = min(25, model.schedule.num_steps - 1) if options.steps is None else options.steps
        learned = getattr(model.config, "learn_sigma", False)
        solver, times = solver_of(model, options, steps, learned=learned)
        blocks = generate_blocks(
            model,
            labels,
            solver=solver,
            times=times,
            cfg_scale=options.cfg,
            guided_channels=getattr(options, "guided_channels", None),
            seed=options.seed,
        )
        pixels: Tensor = model.to_pixels(blocks)
        return pixels


RECIPE = Diffusion()
