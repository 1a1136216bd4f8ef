"""Training an autoencoder with continuous latents, a little regularised towards a normal distribution."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.functional import mse_loss

from arcore.data import ImageDataset
from arcore.recipes._images import ImageOptions, ImageRecipe
from arcore.recipes._recipe import ZooTask
from arcore.training.checks import number
from arcore.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class AutoencoderOptions(ImageOptions):
    """Data and regularisation of an autoencoder.

    Attributes:
        kl_weight: weight of the divergence of the latents from a standard normal distribution, per pixel value.
    """

    kl_weight: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        number("kl_weight", self.kl_weight, whole=False, least=0.0)


class AutoencoderTask(ZooTask):
    """Mean squared error of the pixels plus a little of the latents' divergence."""

    autoencoder: Any

    def __init__(
        self, config: TrainConfig, networks: Mapping[str, nn.Module], facts: Mapping[str, Any]
    ) -> None:
        super().__init__(config, networks, facts)
        self.kl_weight = float(facts.get("kl_weight", 1e-4))

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        out = self.autoencoder(images)
        pixels = mse_loss(out.reconstruction.float(), images)
        loss: Tensor = pixels + self.kl_weight * out.kl
        return loss, {"mse": pixels.detach(), "kl": out.kl.detach()}


class Autoencoder(ImageRecipe):
    """Images to continuous latents and back."""

    defaults: ClassVar[TrainConfig] = TrainConfig(steps=1000, batch_size=64, lr=2e-3, weight_decay=0.0)
    options: ClassVar[type] = AutoencoderOptions
    task: ClassVar[type[ZooTask]] = AutoencoderTask
    trained: ClassVar[str] = "autoencoder"

    def overrides(self, data: ImageDataset) -> dict[str, Any]:
        return {}

    def facts(self, options: Any) -> dict[str, Any]:
        return {"kl_weight": options.kl_weight}


RECIPE = Autoencoder()
