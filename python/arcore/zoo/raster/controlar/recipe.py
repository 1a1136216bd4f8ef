"""How a model with control is trained and drawn from."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from arcore._optional import require
from arcore.catalog import load_checkpoint
from arcore.data.edges import canny
from arcore.nn.kinds import check_kinds
from arcore.recipes._pictures import Pictures
from arcore.recipes._recipe import Start, ZooTask
from arcore.recipes.raster import DROP, Raster, RasterOptions, RasterSampling, RasterTask
from arcore.training import checkpoint
from arcore.training.checkpoint import read_meta


@check_kinds
@dataclass(frozen=True, kw_only=True)
class ControlOptions(RasterOptions):
    """Data, tokenizer and control.

    Attributes:
        control: canny (the edges of the images).
        base: run folder of a model without control to start from, e.g. of `arcore train llamagen_tiny`; its tokenizer
            is taken too. Default: random weights.
    """

    control: Literal["canny"] = "canny"
    base: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.control != "canny":
            raise ValueError(f"--control {self.control}: choose canny")
        if self.base is not None and self.tokenizer is not None:
            raise ValueError("--base brings its tokenizer: leave --tokenizer out")


@check_kinds
@dataclass(frozen=True, kw_only=True)
class ControlSampling(RasterSampling):
    """Pictures of a class that follow a control image.

    Attributes:
        control: picture of edges, bright on dark, of the size of the model's images.
        strength: of the control; 0 is none.
    """

    control: Path | None = None
    strength: float = 1.0


class ControlTask(RasterTask):
    """Cross entropy of the codes given class and edges, both dropped together one time in ten while training."""

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            codes = self.tokenizer.encode(images)
            control = canny(images)
        if self.training:
            dropped = torch.rand(len(labels), device=labels.device) < DROP
            labels = torch.where(dropped, self.model.null_class, labels)
            control = torch.where(dropped[:, None, None, None], 0.0, control)
        logits = self.model(codes, labels, control)
        hits = (logits.argmax(-1) == codes).float().mean()
        return cross_entropy(logits.flatten(0, 1), codes.flatten()), {"accuracy": hits}


class Controlled(Raster):
    """Codes row by row, with a control image."""

    options: ClassVar[type] = ControlOptions
    sampling: ClassVar[type | None] = ControlSampling
    task: ClassVar[type[ZooTask]] = ControlTask
    movable: ClassVar[tuple[str, ...]] = ("data", "held_out", "tokenizer", "base")

    def readers(self, start: Start, options: Any) -> dict[str, nn.Module]:
        if options.base is None:
            return super().readers(start, options)
        return {"tokenizer": _base(options.base)[1]}

    def build(
        self, start: Start, options: Any, networks: Mapping[str, nn.Module], overrides: Mapping[str, Any]
    ) -> nn.Module:
        tokenizer: Any = networks["tokenizer"]
        fields = {"patch": tokenizer.config.factor, **overrides}
        if options.base is None:
            return super().build(start, options, networks, fields)
        base, _ = _base(options.base)
        fields |= {name: getattr(base.config, name) for name in type(base.config).__dataclass_fields__}
        model: Any = start.fresh(**fields)
        model.start_from(base)
        return model  # type: ignore[no-any-return]

    def facts(self, options: Any) -> dict[str, Any]:
        return {"control": options.control}

    def finish(self, checkpoint: Path, out: Path) -> list[str]:
        """Writes the edges of a few held-out images, so that there is something to draw from."""
        facts = read_meta(checkpoint)
        label = str(facts["class_names"][0])
        words = ["arcore", "sample", str(out), "--class", label, "--control", "edge.png", "-n", "16"]
        return [f"draw images: {shlex.join(words)}"]

    def check_sampling(self, options: Any) -> None:
        super().check_sampling(options)
        if options.control is None:
            raise ValueError("this model follows a control image: give one with --control FILE")
        if not options.control.is_file():
            raise FileNotFoundError(f"the control image {options.control} does not exist")

    def sample(
        self,
        networks: Mapping[str, Any],
        facts: Mapping[str, Any],
        options: Any,
        show: Callable[[str], None],
    ) -> Pictures:
        model = networks[self.trained]
        control = read_control(options.control, model.image_size).to(next(model.parameters()).device)
        several = control.expand(options.num, -1, -1, -1)
        with torch.no_grad():
            bound = model.controlled(several, options.strength)
        drawn: Pictures = super().sample({**networks, self.trained: bound}, facts, options, show)
        return drawn


def read_control(path: Path, size: int) -> Tensor:
    """A picture of edges as float32 `[1, 1, size, size]`, 1 on edges and -1 elsewhere.

    Raises:
        ValueError: the file is no picture, or has another size.
    """
    image_module = require("PIL.Image", extra="zoo")
    numpy = require("numpy", extra="zoo")
    try:
        with image_module.open(path) as picture:
            values = torch.from_numpy(numpy.array(picture.convert("L")))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"the control image {path} cannot be read: {error}") from error
    if tuple(values.shape) != (size, size):
        raise ValueError(
            f"the control image {path} has {values.shape[1]} x {values.shape[0]} pixels but the model's images have "
            f"{size} x {size}: scale it"
        )
    return (values >= 128).float()[None, None] * 2 - 1


def _base(path: Path) -> tuple[Any, Any]:
    """Model and tokenizer of a run without control."""
    networks, _ = load_checkpoint(checkpoint.find(path))
    if "tokenizer" not in networks or not hasattr(networks.get("model"), "prompt"):
        raise ValueError(f"{path} holds no raster image model: train one with `arcore train llamagen_tiny`")
    return networks["model"], networks["tokenizer"]


RECIPE = Controlled()
