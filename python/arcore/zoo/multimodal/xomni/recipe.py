"""How X-Omni is trained and used from the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from arcore.data import ImageDataset
from arcore.nn.kinds import check_kinds
from arcore.recipes import Start, Work, ZooTask
from arcore.recipes._codes import read_images
from arcore.recipes._images import ImageRecipe
from arcore.recipes._pictures import Pictures, image_format
from arcore.recipes._tokenizers import CodesOptions, CodesTask, load_tokenizer, train_tokenizer
from arcore.recipes.raster import tokenizer_for
from arcore.training.config import TrainConfig
from arcore.zoo.multimodal.xomni.model import XOmni


@check_kinds
@dataclass(frozen=True, kw_only=True)
class XOmniOptions(CodesOptions):
    """Data and tokenizer; captions are the names of the classes.

    Attributes:
        tokenizer: run folder or checkpoint of a trained tokenizer of single maps of codes (vq16, or a run of ett).
            Default: the preset that fits is trained first, into OUT/tokenizer.
    """


@check_kinds
@dataclass(frozen=True, kw_only=True)
class XOmniSampling:
    """Pictures of a caption, or captions of pictures.

    Attributes:
        prompt: caption to draw.
        num: how many pictures.
        images: picture, or folder of pictures, to describe instead.
        out: file of the pictures: .png, .jpg, .webp, or .safetensors for numbers.
        columns: pictures per row. Default: about square.
        temperature: above 1 draws more varied codes, below 1 likelier ones.
        min_p: keep codes of at least this share of the likeliest one's probability.
        steps: of the flow from noise to pixels.
        seed: decides all random draws.
    """

    prompt: str | None = None
    num: int = 16
    images: Path | None = None
    out: Path = Path("samples.png")
    columns: int | None = None
    temperature: float = 1.0
    min_p: float = 0.03
    steps: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in (("num", self.num), ("columns", self.columns), ("steps", self.steps)):
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1 but got {value}")


class XOmniTask(CodesTask):
    """Cross entropy of captions and codes in both orders, and the decoder's flow matching loss."""

    model: XOmni

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        # Codes are the same whatever the precision of the model's own arithmetic.
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            codes = self.tokenizer.encode(images)
            vectors = self.tokenizer.codebook()[codes]
        names = self.facts["class_names"]
        captions = [names[label] for label in labels.tolist()]
        half = len(codes) // 2
        parts = [
            self.model.loss(self.model.sequences(captions[rows], codes[rows], image_first=first))
            for rows, first in ((slice(half), False), (slice(half, None), True))
            if len(codes[rows])
        ]
        language, flow = torch.stack(parts).mean(), self.model.decoder.loss(images, vectors)
        return language + flow, {"nll": language.detach(), "flow": flow.detach()}


@dataclass(frozen=True)
class Described:
    """Captions of pictures.

    Attributes:
        files: of the pictures.
        texts: their captions.
    """

    files: list[Path]
    texts: list[str]

    def save(self, path: Path | None) -> list[str]:
        """A line per picture; nothing is written."""
        return [f"{file}\t{text}" for file, text in zip(self.files, self.texts, strict=True)]


class XOmniRecipe(ImageRecipe):
    """Captions and codes in one sequence, pixels by flow matching."""

    defaults: ClassVar[TrainConfig] = TrainConfig(steps=1000, batch_size=32, lr=2e-3, clip=1.0)
    options: ClassVar[type] = XOmniOptions
    sampling: ClassVar[type | None] = XOmniSampling
    task: ClassVar[type[ZooTask]] = XOmniTask
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
            side=tokenizer.side,
            factor=tokenizer.config.factor,
            vocab_size=tokenizer.vocab_size,
            in_channels=tokenizer.config.in_channels,
            code_channels=tokenizer.config.code_channels,
            **overrides,
        )

    def overrides(self, data: ImageDataset) -> dict[str, Any]:
        longest = max(len(name.encode()) for name in data.class_names)
        return {"max_caption": max(longest, 16)}

    def prepare(self, start: Start, options: Any) -> Work:
        work = super().prepare(start, options)
        assert isinstance(work.task, XOmniTask)
        return work

    def finish(self, checkpoint: Path, out: Path) -> list[str]:
        from arcore.training.checkpoint import read_meta

        name = read_meta(checkpoint)["class_names"][0]
        return [
            f"draw: arcore sample {out} --prompt {name!r}",
            f"describe: arcore sample {out} --images FOLDER",
            f"reward its pictures: arcore run xomni --checkpoint {out} --data DATA",
        ]

    def check_sampling(self, options: Any) -> None:
        if (options.prompt is None) == (options.images is None):
            raise ValueError("say what to draw with --prompt CAPTION, or what to describe with --images")
        image_format(options.out)

    @torch.no_grad()
    def sample(
        self,
        networks: Mapping[str, Any],
        facts: Mapping[str, Any],
        options: Any,
        show: Callable[[str], None],
    ) -> Pictures | Described:
        tokenizer, model = networks["tokenizer"], networks["model"]
        place = next(model.parameters()).device
        if options.images is not None:
            files, images = read_images(
                options.images, tokenizer.config.image_size, tokenizer.config.in_channels
            )
            texts = [
                text
                for batch in images.split(64)
                for text in model.describe(tokenizer.encode(batch.to(place)))
            ]
            return Described(files, texts)
        codes = model.draw(
            [options.prompt] * options.num,
            min_p=options.min_p,
            temperature=options.temperature,
            seed=options.seed,
        )
        images = model.decoder.draw(tokenizer.codebook()[codes], steps=options.steps, seed=options.seed)
        what = f"{options.num} x {options.prompt!r}, seed {options.seed}"
        return Pictures(images.cpu(), what, options.columns)


RECIPE = XOmniRecipe()
