"""How a tokenizer is tuned through a language model from the command line, and how pictures are named."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from arcore._files import atomic_path
from arcore.data import ImageDataset
from arcore.nn.kinds import check_kinds
from arcore.recipes import Start, Work, ZooTask
from arcore.recipes._codes import read_images
from arcore.recipes._images import ImageRecipe
from arcore.recipes._tokenizers import CodesOptions, load_tokenizer, train_tokenizer
from arcore.recipes.raster import tokenizer_for
from arcore.training.checks import number
from arcore.training.config import TrainConfig
from arcore.zoo.multimodal.ett.model import ETT, caption_loss, read_codes


@check_kinds
@dataclass(frozen=True, kw_only=True)
class ETTOptions(CodesOptions):
    """Data, tokenizer and the balance of the two losses; captions are the names of the classes.

    Attributes:
        alpha: weight of the tokenizer's own loss beside the caption's; 0 lets its pictures decay.
        projector_steps: steps at the beginning in which the projector alone learns (the paper's first stage).
    """

    alpha: float = 1.0
    projector_steps: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        number("alpha", self.alpha, whole=False, least=0)
        number("projector_steps", self.projector_steps, whole=True, least=0)


@check_kinds
@dataclass(frozen=True, kw_only=True)
class CaptionOptions:
    """Captions of pictures.

    Attributes:
        images: picture, or folder of pictures.
        out: text file with a line per picture. Default: they are printed alone.
    """

    images: Path | None = None
    out: Path | None = None


class ETTTask(ZooTask):
    """The caption's loss and that of the tokenizer."""

    model: ETT
    tokenizer: Any
    options = ETTOptions()
    names: tuple[str, ...] = ()

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        vectors, drawn, vq = read_codes(self.tokenizer, images)
        pixels = mse_loss(drawn.float(), images)
        # In the first stage nothing but the projector learns: other gradients are dropped before the step.
        captions = self.model.encode([self.names[label] for label in labels.tolist()]).to(images.device)
        caption = caption_loss(self.model, vectors, captions)
        total = caption + self.options.alpha * (pixels + vq)
        return total, {"caption": caption.detach(), "mse": pixels.detach(), "vq": vq.detach()}

    def on_after_backward(self) -> None:
        if self.step < self.options.projector_steps:
            for name, parameter in self.named_parameters():
                if not name.startswith("model.projector."):
                    parameter.grad = None


@dataclass(frozen=True)
class Captions:
    """Captions of pictures.

    Attributes:
        files: of the pictures.
        texts: their captions.
    """

    files: list[Path]
    texts: list[str]

    def save(self, path: Path | None) -> list[str]:
        """Write a line per picture, or give them back."""
        lines = [f"{file}\t{text}" for file, text in zip(self.files, self.texts, strict=True)]
        if path is None:
            return lines
        with atomic_path(path) as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return [f"{path}: captions of {len(lines)} pictures"]


class ETTRecipe(ImageRecipe):
    """A language model and the tokenizer that it reads, trained together."""

    defaults: ClassVar[TrainConfig] = TrainConfig(steps=600, batch_size=32, lr=1e-3, clip=1.0)
    options: ClassVar[type] = ETTOptions
    sampling: ClassVar[type | None] = CaptionOptions
    task: ClassVar[type[ZooTask]] = ETTTask
    movable: ClassVar[tuple[str, ...]] = ("data", "held_out", "tokenizer")

    def readers(self, start: Start, options: Any) -> dict[str, nn.Module]:
        if options.tokenizer is None:
            return {"tokenizer": train_tokenizer(start, options, tokenizer_for(start.preset))}
        tokenizer = load_tokenizer(options.tokenizer)
        if not hasattr(tokenizer, "side"):
            raise ValueError(
                f"{start.preset} reads one map of codes and the tokenizer in {options.tokenizer} gives several: train "
                "one such as vq16_tiny"
            )
        return {"tokenizer": tokenizer}

    def build(
        self, start: Start, options: Any, networks: Mapping[str, nn.Module], overrides: Mapping[str, Any]
    ) -> nn.Module:
        tokenizer: Any = networks["tokenizer"]
        return start.fresh(
            num_codes=tokenizer.side**2, code_channels=tokenizer.config.code_channels, **overrides
        )

    def overrides(self, data: ImageDataset) -> dict[str, Any]:
        longest = max(len(name.encode()) for name in data.class_names)
        return {"max_caption": longest + 1}

    def prepare(self, start: Start, options: Any) -> Work:
        work = super().prepare(start, options)
        task = work.task
        assert isinstance(task, ETTTask)
        task.options, task.names = options, tuple(task.facts["class_names"])
        return work

    def finish(self, checkpoint: Path, out: Path) -> list[str]:
        return [f"name pictures: arcore sample {out} --images FOLDER"]

    def check_sampling(self, options: Any) -> None:
        if options.images is None:
            raise ValueError("this model names pictures: give a picture or a folder with --images")

    @torch.no_grad()
    def sample(
        self,
        networks: Mapping[str, Any],
        facts: Mapping[str, Any],
        options: Any,
        show: Callable[[str], None],
    ) -> Captions:
        tokenizer, model = networks["tokenizer"], networks["model"]
        place = next(model.parameters()).device
        files, images = read_images(options.images, tokenizer.config.image_size, tokenizer.config.in_channels)
        texts: list[str] = []
        for batch in images.split(64):
            vectors, _, _ = read_codes(tokenizer, batch.to(place))
            texts += [text.decode("utf-8", "replace") for text in model.captions(vectors)]
        return Captions(files, texts)


RECIPE = ETTRecipe()
