"""Pretraining an image encoder by predicting the next cluster of patches."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from arcore.catalog import load_checkpoint
from arcore.data import ImageDataset, adaptive_rotation
from arcore.objectives import next_cluster_loss
from arcore.recipes._images import EncoderOptions, ImageRecipe, open_images
from arcore.recipes._pictures import grid, save_picture
from arcore.recipes._recipe import ZooTask
from arcore.training.augment import denormalized, normalized
from arcore.training.config import TrainConfig

SHOWN = 8


class NextClusterTask(ZooTask):
    """Squared error of the next cluster's patches; the training input is partly rotated."""

    model: Any

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.model.config
        seen, windows = images, None
        if self.training:
            sizes = [max(1, config.side // part) for part in (2, 3, 6)]
            seen, windows = adaptive_rotation(images, config.patch_size, sizes=sizes)
        out = next_cluster_loss(
            self.model(seen, windows),
            images,
            patch_size=config.patch_size,
            cluster=config.cluster,
            block=config.block,
            official_quirks=config.official_quirks,
        )
        return out.loss, {"patches": out.patches.detach(), "blocks": out.blocks.detach()}


class NextCluster(ImageRecipe):
    """Patches cluster by cluster; `predictions.png` of a run shows held-out images above what is predicted of them."""

    defaults: ClassVar[TrainConfig] = TrainConfig(steps=1000, batch_size=32, lr=3e-3)
    options: ClassVar[type] = EncoderOptions
    task: ClassVar[type[ZooTask]] = NextClusterTask

    def overrides(self, data: ImageDataset) -> dict[str, Any]:
        return {}

    def finish(self, checkpoint: Path, out: Path) -> list[str]:
        networks, facts = load_checkpoint(checkpoint)
        model: Any = networks["model"].eval()
        options = self.options(**facts["options"])
        train, test = open_images(facts["data"], model.config, options)
        data: Any = test or train
        count = min(SHOWN, len(data))
        chosen = [round(place * (len(data) - 1) / max(SHOWN - 1, 1)) for place in range(count)]
        images = torch.stack([data[index][0] for index in chosen])
        scaled = options.normalize == "imagenet"
        seen = normalized(images) if scaled else images
        with torch.no_grad():
            drawn = model.reconstruct(seen, model(seen))
        drawn = denormalized(drawn) if scaled else drawn
        path = out / "predictions.png"
        save_picture(grid(torch.cat([images, drawn]), columns=len(images)), path)
        return [f"held-out images and their predictions: {path}"]


RECIPE = NextCluster()
