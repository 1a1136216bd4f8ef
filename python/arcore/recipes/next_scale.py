"""Next-scale prediction: a model on the codes of a frozen multi-scale tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from arcore.catalog import create_model, describe, get_config, list_models, load_checkpoint
from arcore.catalog.lookup import find, load
from arcore.data._pictures import picture_size, read_picture
from arcore.decoding import Kept, generate_next_scale
from arcore.nn.kinds import check_kinds
from arcore.objectives import next_scale_loss
from arcore.recipes._images import PictureOptions, PictureRecipe
from arcore.recipes._progress import drawing
from arcore.recipes._recipe import Start, ZooTask, recipe_for
from arcore.recipes._tokenizers import CodesOptions, CodesTask, load_tokenizer, train_tokenizer
from arcore.training import checkpoint
from arcore.training.config import TrainConfig

# What model and tokenizer must agree on, and what of it follows the size of the images.
CODES = ("vocab_size", "z_channels")
SCALES = "patch_nums"


@check_kinds
@dataclass(frozen=True, kw_only=True)
class NextScaleSampling(PictureOptions):
    """Pictures of a class, drawn code by code.

    Attributes:
        cfg: strength of classifier-free guidance at the finest scale; 0 turns it off.
        temperature: above 1 draws more varied codes, below 1 likelier ones.
        top_k: keep the K likeliest codes of each draw. Default: all.
        top_p: keep the smallest set of codes with this much probability, 0 to 1. Default: all.
        tokenizer: weights of the tokenizer, for a model with published weights.
        smooth: feed on mixtures of codes, for smoother pictures (the authors' more_smooth).
        redraw: draw the least certain codes of a scale anew, given the others, by a model with a second branch (hmar).
        edit: a picture to change: the codes of what is kept stay, the rest is drawn anew. Class none draws it without
            a class.
        box: left, top, right and bottom of the part that is drawn anew, as shares of the picture. Default: the middle,
            0.25 0.25 0.75 0.75.
        outside: draw anew what is outside the box, and keep its inside.
        mask: picture instead of a box: white is drawn anew, black stays.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    tokenizer: Path | None = field(default=None, metadata={"aliases": ("--vae",)})
    smooth: bool = False
    redraw: bool = False
    edit: Path | None = None
    box: tuple[float, float, float, float] | None = None
    outside: bool = False
    mask: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.redraw and self.smooth:
            raise ValueError("--redraw keeps the codes it is sure of and --smooth mixes them: choose one")
        if self.edit is None and (self.box or self.outside or self.mask):
            raise ValueError(
                "--box, --outside and --mask say what of a picture changes: name it with --edit FILE"
            )
        if self.mask is not None and (self.box or self.outside):
            raise ValueError("--mask says already what is drawn anew: leave --box and --outside out")
        if self.box is not None:
            left, top, right, bottom = self.box
            if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
                raise ValueError(
                    "--box: expected left < right and top < bottom, shares of the picture from 0 to 1, but got "
                    + " ".join(map(str, self.box))
                )


@check_kinds
@dataclass(frozen=True, kw_only=True)
class NextScaleOptions(CodesOptions):
    """Data and tokenizer of a next-scale model.

    Attributes:
        refine: run of the first stage of a model that has a second one, such as hmar: its second branch is trained, all
            else stays as it is.
    """

    refine: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.refine is not None and self.tokenizer is not None:
            raise ValueError("refine has a tokenizer already: leave tokenizer out")


class NextScaleTask(CodesTask):
    """Cross entropy of all codes of all scales in one pass; of a second stage, the model's own objective."""

    def __init__(
        self, config: TrainConfig, networks: Mapping[str, nn.Module], facts: Mapping[str, Any]
    ) -> None:
        super().__init__(config, networks, facts)
        if self.facts.get("second_stage"):
            self.model.requires_grad_(False)
            for parameter in self.model.refinement_parameters():
                parameter.requires_grad_(True)

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        # Codes are the same whatever the precision of the model's own arithmetic.
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            indices = self.tokenizer.encode(images)
            inputs = self.tokenizer.scale_inputs(indices)
        if self.facts.get("second_stage"):
            return self.model.refinement_loss(self.tokenizer, indices, labels), {}
        logits = self.model(inputs, labels)
        # A model may have published weights of its scales.
        loss = next_scale_loss(logits, indices, scale_weights=getattr(self.model, "scale_weights", None))
        hits = logits.argmax(-1) == torch.cat(list(indices), dim=1)
        return loss, {"accuracy": hits.float().mean()}


class NextScale(PictureRecipe):
    """Codes scale by scale."""

    defaults: ClassVar[TrainConfig] = TrainConfig(steps=1000, batch_size=64, lr=1e-3)
    options: ClassVar[type] = NextScaleOptions
    sampling: ClassVar[type | None] = NextScaleSampling
    task: ClassVar[type[ZooTask]] = NextScaleTask
    movable: ClassVar[tuple[str, ...]] = ("data", "held_out", "tokenizer", "refine")
    halved: ClassVar[bool] = True

    def readers(self, start: Start, options: Any) -> dict[str, nn.Module]:
        if options.refine is not None:
            return {"tokenizer": _first_stage(start, options)[1]}
        wanted = get_config(start.preset, **start.changes)
        if options.tokenizer is not None:
            tokenizer = load_tokenizer(options.tokenizer)
            _check_codes(tokenizer.config, wanted, start.preset, options.tokenizer)
            return {"tokenizer": tokenizer}
        name = _fitting_tokenizer(start.preset, wanted)
        return {"tokenizer": train_tokenizer(start, options, name)}

    def build(
        self, start: Start, options: Any, networks: Mapping[str, nn.Module], overrides: Mapping[str, Any]
    ) -> nn.Module:
        if options.refine is not None:
            return _first_stage(start, options)[0].second_stage()
        codes: Any = networks["tokenizer"].config
        return start.fresh(**{SCALES: getattr(codes, SCALES), **overrides})

    def facts(self, options: Any) -> dict[str, Any]:
        return {"second_stage": options.refine is not None}

    def published(self, preset: str, weights: Path, options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        if options.tokenizer is None:
            raise ValueError(
                f"{preset} draws codes: give the weights of their tokenizer too, with --tokenizer FILE"
            )
        name = _fitting_tokenizer(preset, get_config(preset))
        networks = {
            "tokenizer": create_model(name, weights=options.tokenizer),
            "model": create_model(preset, weights=weights),
        }
        return networks, {}

    def draw(self, networks: Mapping[str, Any], labels: Tensor, options: Any) -> Tensor:
        kept = _kept(networks["tokenizer"], options, labels) if options.edit is not None else None
        if options.redraw:
            model = networks["model"]
            if not getattr(model.config, "refinement", False):
                raise ValueError(
                    "--redraw needs a model with a second branch, such as hmar after arcore train ... --refine RUN"
                )
            settings = {name: getattr(options, name) for name in ("top_k", "top_p", "temperature", "seed")}
            again: Tensor = model.draw_again(
                networks["tokenizer"], labels, cfg_scale=options.cfg, kept=kept, **settings
            ).images
            return again
        return generate_next_scale(
            networks["model"],
            networks["tokenizer"],
            labels,
            cfg_scale=options.cfg,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed,
            smooth=options.smooth,
            kept=kept,
            progress=drawing(),
        ).images


def _first_stage(start: Start, options: Any) -> tuple[Any, Any]:
    """Model and tokenizer of the run that `--refine` names.

    Raises:
        ValueError: the model has no second stage, or settings are changed that the run decides.
    """
    networks, _ = load_checkpoint(checkpoint.find(options.refine))
    model = networks.get("model")
    if model is None or not hasattr(model, "second_stage") or "tokenizer" not in networks:
        raise ValueError(
            f"{options.refine} holds no first stage of a model that has a second one: train one with "
            "arcore train hmar_tiny"
        )
    if find(start.preset).entry.system.name != describe(model)["system"]:
        raise ValueError(
            f"{options.refine} is no run of {start.preset}'s system but of {describe(model)['system']}"
        )
    if start.changes or start.init_from is not None:
        raise ValueError("the run that --refine names decides the model: leave --set and --init-from out")
    return model, networks["tokenizer"]


def _kept(tokenizer: Any, options: NextScaleSampling, labels: Tensor) -> Kept:
    """Codes of the picture that is changed, and what of it stays."""
    assert options.edit is not None
    size, channels = tokenizer.image_size, tokenizer.in_channels
    weight = next(tokenizer.parameters())
    picture = read_picture(options.edit, size, channels).to(weight.device, weight.dtype)
    if options.mask is not None:
        shapes = [picture_size(path) for path in (options.edit, options.mask)]
        if shapes[0] != shapes[1]:
            (width, height), (across, down) = shapes
            raise ValueError(
                f"--mask {options.mask}: expected a picture of {width} x {height} pixels like {options.edit} but got "
                f"{across} x {down}"
            )
        region = read_picture(options.mask, size, 1)[0] <= 0
    else:
        left, top, right, bottom = (round(share * size) for share in options.box or (0.25, 0.25, 0.75, 0.75))
        region = torch.ones(size, size, dtype=torch.bool)
        region[top:bottom, left:right] = False
        region = region ^ options.outside
    codes = tokenizer.encode(picture.unsqueeze(0))
    return Kept([part.expand(len(labels), -1) for part in codes], region)


def _fitting_tokenizer(preset: str, wanted: Any) -> str:
    """The tokenizer preset that a model was made for."""
    name = load(find(preset).entry.presets[preset], preset).preset.tokenizer
    if name is None or _codes(get_config(name)) != _codes(wanted):
        fitting = [name for name in list_models() if _is_tokenizer(name, wanted)]
        if not fitting:
            shown = ", ".join(f"{field}={value}" for field, value in _codes(wanted).items())
            raise ValueError(
                f"no tokenizer preset fits {preset} ({shown}): train one and give it with --tokenizer"
            )
        name = fitting[0]
    return name


def _is_tokenizer(name: str, wanted: Any) -> bool:
    config = get_config(name)
    return recipe_for(name).trained == "tokenizer" and _codes(config) == _codes(wanted)


def fitting_preset(preset: str) -> str:
    """The tokenizer preset that a preset names.

    Raises:
        ValueError: it names none.
    """
    name = load(find(preset).entry.presets[preset], preset).preset.tokenizer
    if name is None:
        raise ValueError(f"no tokenizer preset is known for {preset}: train one and give it with --tokenizer")
    return str(name)


def _codes(config: Any) -> dict[str, Any]:
    return {name: getattr(config, name, None) for name in CODES}


def _check_codes(found: Any, wanted: Any, preset: str, path: Path) -> None:
    if _codes(found) != _codes(wanted):
        there, here = (
            ", ".join(f"{name}={value}" for name, value in _codes(config).items())
            for config in (found, wanted)
        )
        raise ValueError(
            f"the tokenizer in {path} does not fit {preset}: it has {there} but the model needs {here}"
        )


RECIPE = NextScale()
