"""Frame diffusion: the frames of a video at times of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from arcore.decoding import generate_frames
from arcore.nn.kinds import check_kinds
from arcore.objectives import diffusion_loss, fused_snr_weights, min_snr_weights
from arcore.recipes._denoise import DenoiseSampling, Kind, solver_of
from arcore.recipes._images import PictureRecipe
from arcore.recipes._recipe import ZooTask
from arcore.recipes.diffusion import DiffusionTask
from arcore.training.config import TrainConfig


@check_kinds
@dataclass(frozen=True, kw_only=True)
class FrameSampling(DenoiseSampling):
    """Videos of a class, denoised frame by frame.

    Attributes:
        steps: evaluations of the model per frame. Default: 50.
        lag: steps by which each frame starts later than the one before: 0 denoises all frames together, as many as
            `steps` one after the other. Default: the model's own.
        frames: of a video; more than in training slide a window over them. Default: as in training.
        as_released: the times and the order of the released sampler of AR-Diffusion, which leave a trace of noise.
    """

    solver: Kind = "ddim"
    lag: int | None = None
    frames: int | None = None
    as_released: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.as_released and self.solver != "ddim":
            raise ValueError("--as-released steps by --solver ddim")


class FrameDiffusionTask(DiffusionTask):
    """What the model predicts of all frames of a video in one pass, at times that it draws for them together."""

    def times(
        self, shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None
    ) -> Tensor:
        drawn: Tensor = self.model.training_times(shape[0], generator)
        return drawn

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        clean = self.model.to_frames(images)
        t, eps, noisy = self.noisy(clean, *clean.shape[:2])
        prediction = partial(diffusion_loss, prediction=self.model.prediction)
        inputs = (self.model(noisy, t, labels), clean, eps, t, self.model.schedule)
        weight = self.weights(t)
        if weight is None:
            return prediction(*inputs), {}
        return prediction(*inputs, weight=weight), {"mse": prediction(*inputs).detach()}

    def weights(self, t: Tensor) -> Tensor | None:
        """How much the error of each frame counts; None where all count alike."""
        config: Any = self.model.config
        kind = getattr(config, "loss_weight", "uniform")
        if kind == "uniform":
            return None
        options: dict[str, Any] = {"prediction": self.model.prediction, "snr_clip": config.snr_clip}
        if kind == "min_snr":
            return min_snr_weights(t, self.model.schedule, **options)
        # The decay is that of one frame of the data.
        decay = config.snr_decay**config.frame_stack
        return fused_snr_weights(t, self.model.schedule, decay=decay, **options)


class FrameDiffusion(PictureRecipe):
    """Videos whose frames are each noisy to a degree of their own."""

    defaults: ClassVar[TrainConfig] = TrainConfig(steps=2000, batch_size=64, lr=2e-3, weight_decay=0.0)
    sampling: ClassVar[type | None] = FrameSampling
    task: ClassVar[type[ZooTask]] = FrameDiffusionTask

    def draw(self, networks: Mapping[str, Any], labels: Tensor, options: Any) -> Tensor:
        model = networks["model"]
        steps = min(50, model.schedule.num_steps) if options.steps is None else options.steps
        solver, times = solver_of(model, options, steps, learned=False)
        if options.as_released:
            times = model.schedule.grid(steps, "every") + 1
        frames = generate_frames(
            model,
            labels,
            lag=options.lag,
            frames=options.frames,
            solver=solver,
            times=times,
            cfg_scale=options.cfg,
            official_quirks=options.as_released,
            seed=options.seed,
        )
        pixels: Tensor = model.to_pixels(frames)
        return pixels


RECIPE = FrameDiffusion()
