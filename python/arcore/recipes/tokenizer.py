"""Training an image tokenizer: an autoencoder with a quantiser."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from torch.nn.functional import mse_loss

from arcore.data import ImageDataset
from arcore.recipes._images import ImageRecipe
from arcore.recipes._recipe import ZooTask
from arcore.training.config import TrainConfig


class TokenizerTask(ZooTask):
    """Mean squared error of the pixels plus the quantiser's own loss."""

    tokenizer: Any

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        out = self.tokenizer(images)
        pixels = mse_loss(out.reconstruction.float(), images)
        return pixels + out.vq_loss, {"mse": pixels.detach(), "vq": out.vq_loss.detach()}


class Tokenizer(ImageRecipe):
    """Images to codes and back."""

    defaults: ClassVar[TrainConfig] = TrainConfig(steps=1000, batch_size=64, lr=3e-3)
    task: ClassVar[type[ZooTask]] = TokenizerTask
    trained: ClassVar[str] = "tokenizer"

    def overrides(self, data: ImageDataset) -> dict[str, Any]:
        return {}


RECIPE = Tokenizer()
