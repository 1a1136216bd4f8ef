"""What the recipes of models that read images as codes share: a frozen tokenizer, trained first where there is none."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from arcore.catalog import load_checkpoint
from arcore.data import check_source
from arcore.nn.kinds import check_kinds
from arcore.recipes._images import ImageOptions
from arcore.recipes._recipe import Start, ZooTask, recipe_for
from arcore.training import checkpoint
from arcore.training.checks import number
from arcore.training.config import TrainConfig

TOKENIZER_FOLDER = "tokenizer"
# A tokenizer that is trained on the way takes these from its model's run.
SHARED = ("seed", "accelerator", "devices", "num_nodes", "strategy", "oversubscribe", "workers", "logger")


@check_kinds
@dataclass(frozen=True, kw_only=True)
class CodesOptions(ImageOptions):
    """Data and tokenizer of a model of codes.

    Attributes:
        tokenizer: run folder or checkpoint of a trained tokenizer. Default: the preset that fits is trained first, into
            OUT/tokenizer.
        tokenizer_steps: steps of a tokenizer that is trained first. Default: its recipe's.
    """

    tokenizer: Path | None = None
    tokenizer_steps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokenizer_steps is not None:
            number("tokenizer_steps", self.tokenizer_steps, whole=True, least=1)
            if self.tokenizer is not None:
                raise ValueError(
                    "tokenizer_steps means nothing with a trained tokenizer: leave one of them out"
                )


class CodesTask(ZooTask):
    """A task whose tokenizer is frozen."""

    model: Any
    tokenizer: Any

    def __init__(
        self, config: TrainConfig, networks: Mapping[str, nn.Module], facts: Mapping[str, Any]
    ) -> None:
        super().__init__(config, networks, facts)
        self.tokenizer.requires_grad_(False)

    def train(self, mode: bool = True) -> CodesTask:
        super().train(mode)
        self.tokenizer.eval()
        return self


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a run folder or checkpoint.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it holds no tokenizer, or is damaged.
    """
    networks, _ = load_checkpoint(checkpoint.find(path))
    if "tokenizer" not in networks:
        raise ValueError(f"{path} holds no tokenizer but {', '.join(networks)}")
    return networks["tokenizer"]


def train_tokenizer(start: Start, options: CodesOptions, name: str) -> Any:
    """Train the tokenizer preset `name` on the images of a run that needs it, or go on with it."""
    from arcore.recipes._run import train

    out = start.out / TOKENIZER_FOLDER
    settings = {field: getattr(start.config, field) for field in SHARED}
    if options.tokenizer_steps is not None:
        settings["steps"] = options.tokenizer_steps
    steps = settings.get("steps", recipe_for(name).defaults.steps)
    begun = checkpoint.begun(out)
    if options.data is not None:
        check_source(options.data)
    start.say(
        f"{start.preset} reads images as codes: {'going on with' if begun else 'training'} the tokenizer {name} "
        f"first, {steps} steps, into {out}"
    )
    data = {field.name: getattr(options, field.name) for field in dataclasses.fields(ImageOptions)}
    result = train(
        name,
        out=out,
        resume=out if begun else None,
        settings={"steps": steps} if begun else settings,
        show_progress=start.show_progress,
        **({} if begun else data),
    )
    return load_checkpoint(result.checkpoint)[0]["tokenizer"]
