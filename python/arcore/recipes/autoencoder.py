"""Training an autoencoder with continuous latents, a little regularised towards a normal distribution."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from arcore._files import atomic_path
from arcore._optional import require
from arcore.data import ImageDataset
from arcore.nn.kinds import check_kinds
from arcore.recipes._codes import Coded, read_images
from arcore.recipes._images import ImageOptions, ImageRecipe
from arcore.recipes._pictures import TENSORS, image_format
from arcore.recipes._recipe import ZooTask
from arcore.training.checks import number
from arcore.training.config import TrainConfig


@check_kinds
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


@check_kinds
@dataclass(frozen=True, kw_only=True)
class ReconstructionOptions:
    """Pictures and their reconstructions.

    Attributes:
        images: picture, or folder of pictures.
        out: file: .png, .jpg or .webp shows them above their reconstructions; .safetensors keeps their latents.
        columns: pictures per row. Default: about square.
        batch: pictures at a time.
    """

    images: Path | None = None
    out: Path = Path("samples.png")
    columns: int | None = None
    batch: int = 16

    def __post_init__(self) -> None:
        if self.batch < 1 or (self.columns is not None and self.columns < 1):
            raise ValueError("--batch and --columns must be at least 1")


@dataclass(frozen=True)
class Latents:
    """Latents of pictures.

    Attributes:
        values: `[N, *S]`.
    """

    values: Tensor

    def save(self, path: Path) -> list[str]:
        """Write them as `latents`."""
        with atomic_path(path) as temporary:
            require("safetensors.torch", extra="zoo").save_file(
                {"latents": self.values.contiguous()}, temporary
            )
        return [f"{path}: latents {tuple(self.values.shape)} of {len(self.values)} pictures"]


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
    sampling: ClassVar[type | None] = ReconstructionOptions
    trained: ClassVar[str] = "autoencoder"

    def overrides(self, data: ImageDataset) -> dict[str, Any]:
        return {}

    def facts(self, options: Any) -> dict[str, Any]:
        return {"kl_weight": options.kl_weight}

    def finish(self, checkpoint: Path, out: Path) -> list[str]:
        return [
            f"look at it: arcore sample {out} --images FOLDER --out {out / 'reconstructions.png'}",
            f"draw with it: arcore sample MODEL --vae {out} --class NAME, for a model of its latents",
        ]

    def check_sampling(self, options: Any) -> None:
        if options.images is None:
            raise ValueError("this is an autoencoder: give pictures with --images")
        image_format(options.out)

    @torch.no_grad()
    def sample(
        self,
        networks: Mapping[str, Any],
        facts: Mapping[str, Any],
        options: Any,
        show: Callable[[str], None],
    ) -> Coded | Latents:
        model = networks[self.trained]
        place = next(model.parameters()).device
        files, images = read_images(options.images, model.config.image_size, model.config.in_channels)
        latents, drawn = [], []
        for part in images.split(options.batch):
            latents.append(model.encode(part.to(place)).cpu())
            drawn.append(model.decode(latents[-1].to(place)).cpu())
        if options.out.suffix.lower() == TENSORS:
            return Latents(torch.cat(latents))
        return Coded(files, images, torch.cat(drawn), [], options.columns)


RECIPE = Autoencoder()
