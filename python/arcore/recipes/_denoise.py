"""What the recipes that denoise share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from arcore.nn.kinds import check_kinds
from arcore.recipes._images import PictureOptions
from arcore.schedules import DDIM, DDPM, DPMSolver2M, Solver

Kind = Literal["dpm", "ddim", "ddpm"]


@check_kinds
@dataclass(frozen=True, kw_only=True)
class DenoiseSampling(PictureOptions):
    """Pictures of a class, denoised.

    Attributes:
        cfg: weight of the conditional prediction in classifier-free guidance; 1 turns it off.
        steps: evaluations of the model per block. Default: 25.
        solver: how it steps: DPM-Solver++ of second order, DDIM, or ancestral.
        temperature: scales the noise of the solver ddpm.
        vae: decoder of the latents that the model draws: file or folder of weights, a run of arcore train kl_*, a name
            on the model hub, or `hub` (extra hub). Without it latents are kept as numbers.
    """

    steps: int | None = None
    solver: Kind = "dpm"
    temperature: float = 1.0
    vae: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.solver != "ddpm" and self.temperature != 1.0:
            raise ValueError(f"--temperature is for --solver ddpm: {self.solver} draws no noise on its way")


def solver_of(source: Any, options: Any, steps: int, *, learned: bool) -> tuple[Solver, Tensor]:
    """The solver that is asked for, and its times.

    Args:
        source: has `schedule` and `prediction`, and perhaps `spacing` of times.
        options: have `solver` and `temperature`.
        steps: evaluations.
        learned: the model predicts a variance.
    """
    schedule, kind = source.schedule, options.solver
    # The times of the official sampler, where the model says that they are others.
    spaced = getattr(source, "spacing", "linspace")
    times = schedule.grid(steps, "linspace_inner" if kind == "dpm" else spaced)
    if kind != "ddpm":
        return (DDIM if kind == "ddim" else DPMSolver2M)(schedule, source.prediction), times
    variance: Any = "learned" if learned else "posterior"
    return DDPM(schedule, source.prediction, variance=variance, temperature=options.temperature), times
