"""How a drafter of image codes is trained from the command line."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from arcore.catalog import load_checkpoint
from arcore.data import open_dataset
from arcore.data.identity import place
from arcore.nn.kinds import check_kinds
from arcore.recipes import Recipe, Start, Work, ZooTask
from arcore.training import checkpoint
from arcore.training.config import TrainConfig
from arcore.zoo.acceleration.lantern.drafter import FeatureDrafter, config_for, feature_loss
from arcore.zoo.raster.llamagen import LlamaGen


@check_kinds
@dataclass(frozen=True, kw_only=True)
class DrafterOptions:
    """The image model.

    Attributes:
        base: run folder of a raster image model, of `arcore train llamagen_tiny`.
        data: images to train on. Default: those of the base.
    """

    base: Path | None = None
    data: str | None = None

    def __post_init__(self) -> None:
        if self.base is None:
            raise ValueError(
                "say which image model the drafter is for with --base FOLDER, a run of `arcore train llamagen_tiny`"
            )


class DrafterTask(ZooTask):
    """`feature_loss` of a drafter on a frozen model."""

    model: Any

    def __init__(
        self,
        config: TrainConfig,
        networks: Mapping[str, nn.Module],
        facts: Mapping[str, Any],
        base: Any,
        tokenizer: Any,
    ) -> None:
        super().__init__(config, networks, facts)
        # In a list, so that the frozen networks are neither trained nor saved.
        self._frozen = [network.eval().requires_grad_(False) for network in (base, tokenizer)]

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        base, tokenizer = (network.to(images.device) for network in self._frozen)
        with torch.no_grad():
            ids = torch.cat([base.prompt(labels), tokenizer.encode(images)], dim=1)
        return feature_loss(self.model, base, ids, noise=0.2 if self.training else 0.0), {}


class DrafterRecipe(Recipe):
    """A drafter for a trained image model."""

    defaults: ClassVar[TrainConfig] = TrainConfig(steps=400, batch_size=32, lr=2e-3, clip=1.0)
    options: ClassVar[type] = DrafterOptions
    movable: ClassVar[tuple[str, ...]] = ("base", "data")

    def prepare(self, start: Start, options: Any) -> Work:
        networks, about = load_checkpoint(checkpoint.find(options.base))
        base, tokenizer = networks.get("model"), networks.get("tokenizer")
        if not isinstance(base, LlamaGen) or tokenizer is None:
            raise ValueError(
                f"{options.base} holds no raster image model: train one with `arcore train llamagen_tiny`"
            )
        drafter: Any = start.networks.get("model") or FeatureDrafter(config_for(base))  # type: ignore[abstract]
        drafter.check(base)
        config: Any = tokenizer.config
        data, shape = (
            options.data or about["data"],
            {"image_size": config.image_size, "channels": config.in_channels},
        )
        train, test = (open_dataset(data, split=split, **shape) for split in ("train", "test"))
        start.tell(data, train, test)
        facts = {"preset": start.preset, "base": place(options.base), "data": place(data)}
        task = DrafterTask(start.config, {"model": drafter}, facts, base, tokenizer)
        return Work(task, train, test if len(test) else None)

    def finish(self, checkpoint: Path, out: Path) -> list[str]:
        words = ["arcore", "sample", "BASE", "--decoder", "lantern", "--drafter", str(out)]
        return [f"draw images with it: {shlex.join(words)}"]


RECIPE = DrafterRecipe()
