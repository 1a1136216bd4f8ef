"""Block diffusion: each block of an image or video denoised given the clean blocks before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from arcore.nn.kinds import check_kinds
from arcore.objectives import diffusion_loss
from arcore.recipes._denoise import DenoiseSampling
from arcore.recipes._images import ImageOptions
from arcore.recipes._recipe import Start, ZooTask
from arcore.recipes.diffusion import Diffusion, DiffusionTask
from arcore.training.checks import number


@check_kinds
@dataclass(frozen=True, kw_only=True)
class BlockDiffusionOptions(ImageOptions):
    """Data and blocks.

    Attributes:
        block_size: tokens that are denoised at once: 1 is token by token, all of them a plain diffusion transformer.
            Default: the preset's.
    """

    block_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size is not None:
            number("block_size", self.block_size, whole=True, least=1)


class BlockDiffusionTask(DiffusionTask):
    """Noise prediction of all blocks in one pass, each at a time of its own."""

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        clean = self.model.to_blocks(images)
        t, eps, noisy = self.noisy(clean, *clean.shape[:2])
        return diffusion_loss(self.model(clean, noisy, t, labels), clean, eps, t, self.model.schedule), {}


class BlockDiffusion(Diffusion):
    """Block after block."""

    options: ClassVar[type] = BlockDiffusionOptions
    sampling: ClassVar[type | None] = DenoiseSampling
    task: ClassVar[type[ZooTask]] = BlockDiffusionTask

    def build(
        self, start: Start, options: Any, networks: Mapping[str, nn.Module], overrides: Mapping[str, Any]
    ) -> nn.Module:
        if options.block_size is not None:
            overrides = {**overrides, "block_size": options.block_size}
        return start.fresh(**overrides)


RECIPE = BlockDiffusion()
