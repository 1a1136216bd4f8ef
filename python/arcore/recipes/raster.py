"""Raster order: a model on the codes of a frozen image tokenizer, row by row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from arcore.catalog import create_model, get_config, load_checkpoint
from arcore.catalog.lookup import find, load
from arcore.decoding import (
    AboveDrafter,
    Drafter,
    SpeculativeOutput,
    copy_above,
    generate,
    jacobi,
    relaxed,
    speculative_tree,
)
from arcore.nn.kinds import check_kinds
from arcore.ops.speculative import codebook_neighbours
from arcore.recipes._images import PictureOptions, PictureRecipe
from arcore.recipes._pictures import Pictures
from arcore.recipes._recipe import Start, ZooTask
from arcore.recipes._tokenizers import CodesOptions, CodesTask, load_tokenizer, train_tokenizer
from arcore.training import checkpoint
from arcore.training.config import TrainConfig

# Labels are dropped this often in training, so that the model also learns the images of no class, for guidance.
DROP = 0.1


# Steps of a tokenizer that is trained on the way: a single map of codes is learned sooner than several scales.
TOKENIZER_STEPS = 300


@check_kinds
@dataclass(frozen=True, kw_only=True)
class RasterOptions(CodesOptions):
    """Data and tokenizer of a raster model.

    Attributes:
        tokenizer_steps: steps of a tokenizer that is trained first. Default: 300.
    """


@check_kinds
@dataclass(frozen=True, kw_only=True)
class RasterSampling(PictureOptions):
    """Pictures of a class, drawn code by code.

    Attributes:
        cfg: strength s of classifier-free guidance, none + s (class - none); 1 turns it off.
        temperature: above 1 draws more varied codes, below 1 likelier ones.
        top_k: keep the K likeliest codes of each draw. Default: all.
        top_p: keep the smallest set of codes with this much probability, 0 to 1. Default: all.
        vq: weights of the tokenizer, for a model with published weights.
        decoder: `plain` (a code per call of the model), jacobi (a window of guesses, same law; SJD) or lantern (drafts
            that also stand for their neighbours in the codebook; faster, another law).
        window: codes that a call reads with jacobi and lantern.
        delta: lantern: most probability that a draft takes from its neighbours; 0 keeps the law.
        neighbours: lantern: codes that a draft may stand for.
        bound: lantern: additive, or multiplicative (LANTERN++), by which delta counts in the draft's own probability.
        drafter: lantern: run folder of a trained drafter. Default: drafts repeat the code of the row above.
    """

    cfg: float = 2.0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    vq: Path | None = None
    decoder: Literal["plain", "jacobi", "lantern"] = "plain"
    window: int = 16
    delta: float = 0.1
    neighbours: int = 1000
    bound: Literal["additive", "multiplicative"] = "additive"
    drafter: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decoder not in ("plain", "jacobi", "lantern"):
            raise ValueError(f"--decoder {self.decoder}: choose plain, jacobi or lantern")
        if self.bound not in ("additive", "multiplicative"):
            raise ValueError(f"--bound {self.bound}: choose additive or multiplicative")
        if self.window < 2:
            raise ValueError(f"--window must be at least 2 but got {self.window}")
        if not self.delta >= 0 or self.neighbours < 0:
            raise ValueError(
                f"--delta and --neighbours must be at least 0 but got {self.delta} and {self.neighbours}"
            )
        if self.drafter is not None and self.decoder != "lantern":
            raise ValueError("--drafter is for --decoder lantern: leave it out, or add that")


class RasterTask(CodesTask):
    """Cross entropy of the codes, with labels dropped one time in ten while training."""

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        # Codes are the same whatever the precision of the model's own arithmetic.
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            codes = self.tokenizer.encode(images)
        if self.training:
            dropped = torch.rand(len(labels), device=labels.device) < DROP
            labels = torch.where(dropped, self.model.null_class, labels)
        logits = self.model(codes, labels)
        hits = (logits.argmax(-1) == codes).float().mean()
        return cross_entropy(logits.flatten(0, 1), codes.flatten()), {"accuracy": hits}


class Raster(PictureRecipe):
    """Codes row by row."""

    defaults: ClassVar[TrainConfig] = TrainConfig(steps=800, batch_size=32, lr=2e-3, clip=1.0)
    options: ClassVar[type] = RasterOptions
    sampling: ClassVar[type | None] = RasterSampling
    task: ClassVar[type[ZooTask]] = RasterTask
    movable: ClassVar[tuple[str, ...]] = ("data", "held_out", "tokenizer")

    def readers(self, start: Start, options: Any) -> dict[str, nn.Module]:
        if options.tokenizer is None:
            wanted = dataclasses.replace(options, tokenizer_steps=options.tokenizer_steps or TOKENIZER_STEPS)
            return {"tokenizer": train_tokenizer(start, wanted, tokenizer_for(start.preset))}
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
        return start.fresh(vocab_size=tokenizer.vocab_size, side=tokenizer.side, **overrides)

    def published(self, preset: str, weights: Path, options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        if options.vq is None:
            raise ValueError(f"{preset} draws codes: give the weights of their tokenizer too, with --vq FILE")
        name = tokenizer_for(preset)
        tokenizer: Any = get_config(name)
        side = getattr(get_config(preset), "side", tokenizer.side)
        networks = {
            "tokenizer": create_model(name, weights=options.vq, image_size=side * tokenizer.factor),
            "model": create_model(preset, weights=weights),
        }
        return networks, {}

    def sample(
        self,
        networks: Mapping[str, Any],
        facts: Mapping[str, Any],
        options: Any,
        show: Callable[[str], None],
    ) -> Pictures:
        labels, what = self.labels(networks, facts, options)
        codes, calls = self.codes(networks, labels, options)
        images = networks["tokenizer"].decode(codes).cpu()
        count = codes.shape[1]
        return Pictures(images, f"{what}, {calls:.1f} calls of the model for {count} codes", options.columns)

    def draw(self, networks: Mapping[str, Any], labels: Tensor, options: Any) -> Tensor:
        codes, _ = self.codes(networks, labels, options)
        images: Tensor = networks["tokenizer"].decode(codes)
        return images

    def codes(self, networks: Mapping[str, Any], labels: Tensor, options: Any) -> tuple[Tensor, float]:
        """Codes of these classes, int64 `[N, S * S]`, and calls of the model per image."""
        model = networks[self.trained]
        guided = model if options.cfg == 1 else model.guided(options.cfg)
        return draw_codes(guided, model.prompt(labels), networks["tokenizer"], options)


def draw_codes(
    model: Any, prompt: Tensor, tokenizer: Any, options: RasterSampling, mask: Tensor | None = None
) -> tuple[Tensor, float]:
    """The codes of images by the decoder of the options, int64 `[N, S * S]`, and calls of the model per image.

    Args:
        model: of the codes, also under guidance.
        prompt: int64 `[N, L]`, what stands before the codes.
        tokenizer: of the codes.
        options: decoder, seed and sampling.
        mask: bool `[N, L]`, False at padding in front of prompts.
    """
    length = tokenizer.side**2
    settings: dict[str, Any] = {
        "max_new_tokens": length,
        "mask": mask,
        # Picture n of a seed is the same whatever the count is.
        "seed": [options.seed + n for n in range(len(prompt))],
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
    }
    if options.decoder == "plain":
        return generate(model, prompt, **settings).ids, float(length)
    out: SpeculativeOutput
    if options.decoder == "jacobi":
        out = jacobi(model, prompt, window=options.window, initialiser=copy_above(tokenizer.side), **settings)
    else:
        codebook = tokenizer.codebook()
        near = codebook_neighbours(codebook, min(options.neighbours, len(codebook) - 1))
        drafter: Drafter = AboveDrafter(tokenizer.side, count=options.window - 1)
        if options.drafter is not None:
            drafter = load_drafter(options.drafter, model, options.window - 1)
        verify = relaxed(near, delta=options.delta, bound=options.bound)
        out = speculative_tree(model, drafter, prompt, verify=verify, **settings)
    assert out.rounds is not None
    return out.ids, float(out.rounds.float().mean())


def load_drafter(path: Path, model: Any, count: int) -> Drafter:
    """A trained drafter for a model.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the folder holds no drafter, or one for another model.
    """
    networks, _ = load_checkpoint(checkpoint.find(path))
    network: Any = networks.get("model")
    make = getattr(network, "drafter", None)
    if make is None:
        raise ValueError(
            f"{path} holds no drafter: expected a run whose model has a method drafter; leave --drafter out for drafts "
            "that repeat the code of the row above"
        )
    drafter: Drafter = make(getattr(model, "model", model), count)
    return drafter


def tokenizer_for(preset: str) -> str:
    """The tokenizer preset that a preset was made for.

    Raises:
        ValueError: it names none.
    """
    facts = load(find(preset).entry.presets[preset], preset).preset
    if facts.tokenizer is None:
        raise ValueError(f"{preset} names no tokenizer: train one and give it with --tokenizer FOLDER")
    return str(facts.tokenizer)


RECIPE = Raster()
