"""How Infinity is trained and used from the command line."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from arcore.catalog import create_model
from arcore.data import ImageDataset
from arcore.nn.kinds import check_kinds
from arcore.recipes import Start, ZooTask
from arcore.recipes._images import ImageRecipe
from arcore.recipes._pictures import Pictures, image_format
from arcore.recipes._progress import drawing
from arcore.recipes._tokenizers import CodesOptions, CodesTask, load_tokenizer, train_tokenizer
from arcore.recipes.next_scale import fitting_preset
from arcore.training.checkpoint import read_meta
from arcore.training.checks import number
from arcore.training.config import TrainConfig
from arcore.zoo.next_scale.infinity.draw import draw_bits
from arcore.zoo.next_scale.infinity.model import Infinity, bit_loss
from arcore.zoo.next_scale.infinity.text import Text, t5_vectors, word_vectors


@check_kinds
@dataclass(frozen=True, kw_only=True)
class InfinityOptions(CodesOptions):
    """Data, tokenizer and text; the names of the classes are the texts.

    Attributes:
        data: a folder with a subfolder of images per class; or scenes (two digits of mnist), mnist, digits or photos.
        tokenizer: run folder or checkpoint of a trained msbsq. Default: the preset that fits is trained first, into
            OUT/tokenizer.
        noise: largest share of bits that are flipped in what the model reads, so that it learns to correct itself.
        text_encoder: folder with T5's weights in transformers' layout. Default: frozen vectors of words.
    """

    data: str | None = field(default="scenes", metadata={"metavar": "FOLDER|NAME"})
    noise: float = 0.3
    text_encoder: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        number("noise", self.noise, whole=False, least=0)
        if self.noise > 1:
            raise ValueError(f"noise must lie between 0 and 1 but got {self.noise}")


@check_kinds
@dataclass(frozen=True, kw_only=True)
class InfinitySampling:
    """Pictures of a text.

    Attributes:
        prompt: what to draw.
        num: how many.
        out: file, all in a grid: .png, .jpg, .webp, or .safetensors for numbers.
        columns: pictures per row. Default: about square.
        seed: decides all random draws.
        cfg: strength of guidance, one number or one per scale; 1 is none.
        tau: temperature of the bits, one number or one per scale.
        top_p: drop a bit's less likely value where the other has at least this probability, 0 to 1. Default: never.
        guide_at: 0 guides the logits, -n what leaves the n-th block from the end.
        tokenizer: weights of the tokenizer, for a model with published weights.
        text_encoder: folder with T5's weights in transformers' layout, for a model that was trained with it.
    """

    prompt: str | None = None
    num: int = field(default=16, metadata={"aliases": ("-n",)})
    out: Path = Path("samples.png")
    columns: int | None = None
    seed: int = 0
    cfg: tuple[float, ...] = (3.0,)
    tau: tuple[float, ...] = (1.0,)
    top_p: float | None = None
    guide_at: int = 0
    tokenizer: Path | None = field(default=None, metadata={"aliases": ("--vae",)})
    text_encoder: Path | None = None

    def __post_init__(self) -> None:
        for name, flag in (("num", "-n"), ("columns", "--columns")):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{flag} must be at least 1 but got {value}")
        if self.guide_at > 0:
            raise ValueError(f"--guide-at must be 0 or negative but got {self.guide_at}")


class InfinityTask(CodesTask):
    """Cross entropy of all bits, read with some of the earlier ones flipped."""

    model: Infinity

    def __init__(
        self, config: TrainConfig, networks: Mapping[str, nn.Module], facts: Mapping[str, Any]
    ) -> None:
        super().__init__(config, networks, facts)
        self.texts: dict[str, Text] = {}

    def text(self, captions: list[str], device: torch.device) -> Text:
        """Captions as vectors; each is encoded once, and texts end at the longest of the batch."""
        for caption in set(captions) - set(self.texts):
            one = encoded([caption], self.facts.get("text_encoder"), self.model.config.text_dim)
            self.texts[caption] = Text(one.vectors[0], one.lengths[0])
        found = [self.texts[caption] for caption in captions]
        vectors = nn.utils.rnn.pad_sequence([one.vectors for one in found], batch_first=True)
        return Text(vectors.to(device), torch.stack([one.lengths for one in found]).to(device))

    def bits(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Bits of pictures and what the model reads."""
        count, most = len(self.tokenizer.patch_nums), round(100 * self.facts["noise"])
        strengths = None
        if self.training and most:
            # As the authors do: whole hundredths, one strength for a scale of all rows.
            strengths = torch.randint(most + 1, (count,), device=images.device) / 100
        with torch.autocast(images.device.type, enabled=False):
            f = self.tokenizer.latent(images)
            bits, inputs = self.tokenizer.corrected(f, strengths)
        return bits, inputs

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            bits, inputs = self.bits(images)
        names = self.facts["class_names"]
        logits = self.model(inputs, self.text([names[label] for label in labels.tolist()], images.device))
        return bit_loss(logits, bits), {"accuracy": right_bits(logits, bits)}


def right_bits(logits: Tensor, bits: list[Tensor]) -> Tensor:
    """Share of bits whose likelier value is theirs."""
    return ((logits[..., 1] > logits[..., 0]) == torch.cat(bits, 1)).float().mean()


def encoded(prompts: list[str], folder: Any, dim: int) -> Text:
    """Prompts through T5 in a folder, or as frozen vectors of words."""
    return word_vectors(prompts, dim) if folder is None else t5_vectors(prompts, Path(folder), dim)


class InfinityRecipe(ImageRecipe):
    """Texts to bits, scale by scale."""

    defaults: ClassVar[TrainConfig] = TrainConfig(steps=1500, batch_size=32, lr=2e-3, clip=1.0)
    options: ClassVar[type] = InfinityOptions
    sampling: ClassVar[type | None] = InfinitySampling
    task: ClassVar[type[ZooTask]] = InfinityTask
    movable: ClassVar[tuple[str, ...]] = ("data", "held_out", "tokenizer", "text_encoder")

    def readers(self, start: Start, options: Any) -> dict[str, nn.Module]:
        if options.tokenizer is None:
            return {"tokenizer": train_tokenizer(start, options, fitting_preset(start.preset))}
        tokenizer = load_tokenizer(options.tokenizer)
        if not hasattr(tokenizer, "corrected"):
            raise ValueError(
                f"{start.preset} reads bits and the tokenizer in {options.tokenizer} is none of bits: train one "
                "such as msbsq_tiny"
            )
        return {"tokenizer": tokenizer}

    def build(
        self, start: Start, options: Any, networks: Mapping[str, nn.Module], overrides: Mapping[str, Any]
    ) -> nn.Module:
        return start.fresh(**self.fields(options, networks["tokenizer"]), **overrides)

    def fields(self, options: Any, tokenizer: Any) -> dict[str, Any]:
        """Fields of the model's config that tokenizer and texts decide."""
        sides = tokenizer.patch_nums
        fields = {"bits": tokenizer.bits, "patch_nums": sides, "grid": sides[-1]}
        if options.text_encoder is not None:
            from transformers import AutoConfig

            fields["text_dim"] = AutoConfig.from_pretrained(options.text_encoder).d_model
        return fields

    def overrides(self, data: ImageDataset) -> dict[str, Any]:
        return {}

    def facts(self, options: Any) -> dict[str, Any]:
        encoder = options.text_encoder
        return {"noise": options.noise, "text_encoder": None if encoder is None else str(encoder)}

    def finish(self, checkpoint: Path, out: Path) -> list[str]:
        name = read_meta(checkpoint)["class_names"][0]
        words = ["arcore", "sample", str(out), "--prompt", name, "--out", str(out / "samples.png")]
        return [f"draw: {shlex.join(words)}"]

    def published(self, preset: str, weights: Path, options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        for value, flag, what in (
            (options.tokenizer, "--tokenizer FILE", "the weights of their tokenizer"),
            (
                options.text_encoder,
                "--text-encoder FOLDER",
                "the text encoder that it was trained with, flan-t5-xl,",
            ),
        ):
            if value is None:
                raise ValueError(f"{preset} draws bits of a text: give {what} too, with {flag}")
        tokenizer = create_model(fitting_preset(preset), weights=options.tokenizer)
        return {"tokenizer": tokenizer, "model": create_model(preset, weights=weights)}, {}

    def check_sampling(self, options: Any) -> None:
        if options.prompt is None:
            raise ValueError("this is a model of texts: say what to draw with --prompt TEXT")
        image_format(options.out)

    def sample(
        self,
        networks: Mapping[str, Any],
        facts: Mapping[str, Any],
        options: Any,
        show: Callable[[str], None],
    ) -> Pictures:
        model, tokenizer = networks["model"], networks["tokenizer"]
        text = self.texts(model, facts, options)
        strength = options.cfg
        with torch.no_grad():
            if strength != (1.0,):
                null = model.null(text.lengths)
                text = Text(torch.cat([text.vectors, null.vectors.to(text.vectors)]), text.lengths.repeat(2))
            told = model.tell(text)
        drawn = draw_bits(
            model,
            tokenizer,
            told,
            guidance=() if strength == (1.0,) else (strength,),
            temperature=options.tau,
            top_p=options.top_p,
            guide_at=options.guide_at,
            seed=options.seed,
            progress=drawing(),
        )
        what = f"{options.num} x {options.prompt!r}, seed {options.seed}"
        return Pictures(drawn.images.float().cpu(), what, options.columns)

    def texts(self, model: Any, facts: Mapping[str, Any], options: Any) -> Text:
        """The prompt, once for each picture."""
        folder = options.text_encoder or facts.get("text_encoder")
        weight = model.null_text
        one = encoded([options.prompt], folder, model.config.text_dim).to(weight.device, weight.dtype)
        if one.vectors.shape[1] > model.config.text_length:
            raise ValueError(
                f"--prompt: expected at most {model.config.text_length} tokens but got {one.vectors.shape[1]}: "
                "shorten it"
            )
        return Text(one.vectors.expand(options.num, -1, -1), one.lengths.expand(options.num))


RECIPE = InfinityRecipe()
