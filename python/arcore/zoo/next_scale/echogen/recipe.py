"""How EchoGen is trained and used from the command line."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from arcore._optional import require
from arcore.catalog import build, load_checkpoint
from arcore.data import open_dataset
from arcore.data._pictures import read_picture
from arcore.nn.kinds import check_kinds
from arcore.recipes import Start, Work, ZooTask
from arcore.recipes._images import open_images
from arcore.recipes._pictures import Pictures, save_picture, to_bytes
from arcore.recipes._progress import drawing
from arcore.training import checkpoint as checkpoints
from arcore.training.checkpoint import read_meta
from arcore.training.config import TrainConfig
from arcore.zoo.next_scale.echogen.model import EchoGen, Reference
from arcore.zoo.next_scale.echogen.references import (
    SubjectScenes,
    published_encoders,
    reference_side,
    small_encoders,
    small_sizes,
    subjects_of,
)
from arcore.zoo.next_scale.infinity.config import InfinityConfig
from arcore.zoo.next_scale.infinity.draw import draw_bits
from arcore.zoo.next_scale.infinity.model import Infinity, bit_loss
from arcore.zoo.next_scale.infinity.recipe import (
    InfinityOptions,
    InfinityRecipe,
    InfinitySampling,
    InfinityTask,
    right_bits,
)


@check_kinds
@dataclass(frozen=True, kw_only=True)
class EchoGenOptions(InfinityOptions):
    """Data, tokenizer and base.

    Attributes:
        data: pictures of which scenes are composed, one beside the other: a folder with a subfolder of images per
            class, scenes (the digits of mnist), mnist or digits.
        base: run folder or checkpoint of a trained infinity whose weights are kept as they are, as the authors do, and
            whose tokenizer is used. Default: all weights are trained.
    """

    base: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base is not None and self.tokenizer is not None:
            raise ValueError("base has a tokenizer already: leave tokenizer out")


@check_kinds
@dataclass(frozen=True, kw_only=True)
class EchoGenSampling(InfinitySampling):
    """Pictures of a text with the subject of a reference.

    Attributes:
        reference: picture of the subject, for published weights on a plain background. Default: none, the text alone.
        cfg: strength of the text against nothing, one number or one per scale.
        cfg_image: strength of text and reference against the text alone, one number or one per scale.
        semantic_encoder: folder with DINOv2's weights in transformers' layout, for published weights.
        content_encoder: folder with the autoencoder of FLUX in diffusers' layout, for published weights.
    """

    reference: Path | None = None
    cfg: tuple[float, ...] = (2.5,)
    cfg_image: tuple[float, ...] = (2.5,)
    semantic_encoder: Path | None = None
    content_encoder: Path | None = None


class EchoGenTask(InfinityTask):
    """The loss of Infinity, with the reference of each scene."""

    model: EchoGen

    def __init__(
        self, config: TrainConfig, networks: Mapping[str, nn.Module], facts: Mapping[str, Any]
    ) -> None:
        super().__init__(config, networks, facts)
        if self.facts.get("base"):
            for parameter in self.model.base_parameters():
                parameter.requires_grad_(False)

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        scenes, references = images.unbind(1)
        with torch.no_grad():
            bits, inputs = self.bits(scenes)
            with torch.autocast(images.device.type, enabled=False):
                reference = small_encoders(references, self.tokenizer)
        names = self.facts["class_names"]
        text = self.text([names[label] for label in labels.tolist()], images.device)
        logits = self.model(inputs, text, reference)
        return bit_loss(logits, bits), {"accuracy": right_bits(logits, bits)}


class EchoGenRecipe(InfinityRecipe):
    """Texts and references to bits, scale by scale."""

    defaults: ClassVar[TrainConfig] = TrainConfig(steps=3000, batch_size=32, lr=2e-3, clip=1.0)
    options: ClassVar[type] = EchoGenOptions
    sampling: ClassVar[type | None] = EchoGenSampling
    task: ClassVar[type[ZooTask]] = EchoGenTask
    movable: ClassVar[tuple[str, ...]] = (*InfinityRecipe.movable, "base")

    def open(self, data: str, shape: Any, options: Any) -> tuple[Any, Any]:
        train, test = open_images(data, shape, options)
        held_out = None if test is None else SubjectScenes(subjects_of(test), "test")
        return SubjectScenes(subjects_of(train)), held_out

    def readers(self, start: Start, options: Any) -> dict[str, nn.Module]:
        if options.base is None:
            return super().readers(start, options)
        return {"tokenizer": _base(options.base)[1]}

    def build(
        self, start: Start, options: Any, networks: Mapping[str, nn.Module], overrides: Mapping[str, Any]
    ) -> nn.Module:
        tokenizer: Any = networks["tokenizer"]
        fields = small_sizes(tokenizer.in_channels, tokenizer.image_size, tokenizer)
        if options.base is None:
            return start.fresh(**self.fields(options, tokenizer), **fields, **overrides)
        base, _ = _base(options.base)
        of_base = {
            entry.name: getattr(base.config, entry.name) for entry in dataclasses.fields(InfinityConfig)
        }
        model: Any = start.fresh(**of_base, **fields, **overrides)
        model.start_from(base)
        return model  # type: ignore[no-any-return]

    def facts(self, options: Any) -> dict[str, Any]:
        return {**super().facts(options), "base": None if options.base is None else str(options.base)}

    def prepare(self, start: Start, options: Any) -> Work:
        if options.flip or options.crop:
            raise ValueError("scenes are composed at random already: leave flip and crop out")
        return super().prepare(start, options)

    def finish(self, checkpoint: Path, out: Path) -> list[str]:
        """Writes a held-out picture, so that there is a reference to draw from."""
        facts, picture = read_meta(checkpoint), out / "reference.png"
        shape = facts["modules"]["tokenizer"]["config"]
        tokenizer: Any = build(facts["modules"]["tokenizer"])
        size: dict[str, Any] = {"image_size": tokenizer.image_size, "channels": shape["in_channels"]}
        source = facts["held_out"] or facts["data"]
        data = open_dataset(source, split="all" if facts["held_out"] else "test", **size)
        if not len(data):
            # Too few pictures to hold any out.
            data = open_dataset(source, split="all", **size)
        image, _ = subjects_of(data)[0]
        channels, height, width = image.shape
        pixels = to_bytes(image).contiguous().numpy().tobytes()
        modes = {1: "L", 3: "RGB"}
        save_picture(
            require("PIL.Image", extra="zoo").frombytes(modes[channels], (width, height), pixels), picture
        )
        words = [
            "arcore",
            "sample",
            str(out),
            "--reference",
            str(picture),
            "--prompt",
            facts["class_names"][0],
        ]
        return [f"draw: {shlex.join([*words, '--out', str(out / 'samples.png')])}"]

    def published(self, preset: str, weights: Path, options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        if options.reference is not None:
            for value, flag in (
                (options.semantic_encoder, "--semantic-encoder FOLDER"),
                (options.content_encoder, "--content-encoder FOLDER"),
            ):
                if value is None:
                    raise ValueError(f"{preset} reads references through published encoders: give {flag} too")
        return super().published(preset, weights, options)

    def sample(
        self,
        networks: Mapping[str, Any],
        facts: Mapping[str, Any],
        options: Any,
        show: Callable[[str], None],
    ) -> Pictures:
        model, tokenizer = networks["model"], networks["tokenizer"]
        text = self.texts(model, facts, options)
        with torch.no_grad():
            reference = model.null_reference(options.num)
            if options.reference is not None:
                weight = model.null_content
                published = options.semantic_encoder is not None and options.content_encoder is not None
                # References of the published models are smaller than what they draw.
                side = reference_side(model.config) if published else tokenizer.image_size
                picture = read_picture(options.reference, side, tokenizer.in_channels)
                images = picture.to(weight.device, weight.dtype).unsqueeze(0)
                if published:
                    found = published_encoders(
                        images, options.semantic_encoder, options.content_encoder, model.config, options.seed
                    )
                else:
                    found = small_encoders(images, tokenizer)
                semantic, content = (
                    None if part is None else part.to(weight).expand(options.num, -1, -1) for part in found
                )
                assert content is not None
                reference = Reference(semantic, content)
            told = model.guided(text, reference)
        drawn = draw_bits(
            model,
            tokenizer,
            told,
            guidance=(options.cfg_image, options.cfg),
            temperature=options.tau,
            top_p=options.top_p,
            guide_at=options.guide_at,
            seed=options.seed,
            progress=drawing(),
        )
        subject = "no reference" if options.reference is None else f"the subject of {options.reference}"
        what = f"{options.num} x {options.prompt!r} with {subject}, seed {options.seed}"
        return Pictures(drawn.images.float().cpu(), what, options.columns)


def _base(path: Path) -> tuple[Infinity, Any]:
    """The model and the tokenizer of a run of Infinity.

    Raises:
        ValueError: it is a run of something else.
    """
    networks, _ = load_checkpoint(checkpoints.find(path))
    model = networks.get("model")
    if not isinstance(model, Infinity) or isinstance(model, EchoGen):
        raise ValueError(
            f"{path} holds no infinity, which EchoGen builds on: train one with arcore train infinity_tiny"
        )
    return model, networks["tokenizer"]


RECIPE = EchoGenRecipe()
