"""Training LifeGPT on an automaton, and running it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from arcore.nn.kinds import check_kinds
from arcore.recipes._pictures import Pictures, image_format
from arcore.recipes._recipe import Recipe, Start, Work, ZooTask
from arcore.training.config import TrainConfig
from arcore.training.stream import derive_seed
from arcore.zoo.dynamics.lifegpt.model import (
    HEAD,
    IGNORED,
    MIDDLE,
    TAIL,
    hide,
    lessons,
    next_state,
    parse_rule,
    random_states,
)


class Lessons(Dataset[tuple[Tensor, Tensor]]):
    """Pairs of states, one per number.

    Args:
        rule, height, width: of the automaton.
        count: how many.
        seed: decides them.
    """

    def __init__(self, rule: str, height: int, width: int, count: int, seed: int) -> None:
        self.rule, self.height, self.width, self.count, self.seed = rule, height, width, count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "state", index))
        ids, targets = lessons(random_states(1, self.height, self.width, generator), self.rule)
        return ids[0], targets[0]


@check_kinds
@dataclass(frozen=True, kw_only=True)
class LifeOptions:
    """The automaton.

    Attributes:
        rule: life, a rule such as B36/S23, or the number of an elementary one such as 110.
        height: rows of cells; 1 for an elementary rule.
        width: cells of a row.
        pairs: pairs of states to train on.
    """

    rule: str = "110"
    height: int = 1
    width: int = 16
    pairs: int = 100_000

    def __post_init__(self) -> None:
        kind, _ = parse_rule(self.rule)
        for name in ("height", "width", "pairs"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1 but got {getattr(self, name)}")
        if kind == "elementary" and self.height != 1:
            raise ValueError(f"--rule {self.rule} is of one dimension: give --height 1, not {self.height}")
        if kind == "life" and min(self.height, self.width) < 3:
            raise ValueError(
                f"--rule {self.rule} needs --height and --width of at least 3 (each cell has eight neighbours) but got "
                f"{self.height} and {self.width}"
            )


@check_kinds
@dataclass(frozen=True, kw_only=True)
class LifeSampling:
    """States that follow each other.

    Attributes:
        state: the first state as rows of 0 and 1 with / between them, e.g. 010/001/111. Default: a random one.
        frames: states to write.
        num: how many runs, from random states.
        out: file: .gif runs them, another picture shows all states; of one dimension, time goes down.
        seed: decides the first state and all draws.
        temperature: 0 takes the likeliest cell.
    """

    state: str | None = None
    frames: int = 20
    num: int = field(default=1, metadata={"aliases": ("-n",)})
    out: Path = Path("life.gif")
    seed: int = 0
    temperature: float = 0.0

    def __post_init__(self) -> None:
        for name, flag in (("frames", "--frames"), ("num", "-n")):
            if getattr(self, name) < 1:
                raise ValueError(f"{flag} must be at least 1 but got {getattr(self, name)}")
        image_format(self.out)


class LifeTask(ZooTask):
    """Cross entropy of the next state; tokens are hidden at random in training."""

    model: Any

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if self.training:
            logits = self.model.forward_hiding(images, hide(images, self.model.config.forget))
        else:
            logits = self.model(images)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        right = ((logits.argmax(-1) == labels) | (labels == IGNORED)).all(1).float().mean()
        return loss, {"right_states": right}


class LifeRecipe(Recipe):
    """Automata as text."""

    defaults: ClassVar[TrainConfig] = TrainConfig(steps=1000, batch_size=96, lr=2e-3, clip=0.5)
    options: ClassVar[type] = LifeOptions
    sampling: ClassVar[type | None] = LifeSampling
    movable: ClassVar[tuple[str, ...]] = ()

    def prepare(self, start: Start, options: Any) -> Work:
        cells = options.height * options.width
        length = len(HEAD + MIDDLE + TAIL) + 2 * cells
        model: Any = start.networks["model"] if start.networks else start.fresh()
        if length > model.max_length:
            raise ValueError(
                f"{options.height} x {options.width} cells make texts of {length} tokens but the model is made for "
                f"{model.max_length}: give a smaller --height or --width, or --model.max-length {length}"
            )
        facts = {
            "preset": start.preset,
            "rule": options.rule,
            "height": options.height,
            "width": options.width,
        }
        train, test = (
            Lessons(options.rule, options.height, options.width, count, seed)
            for count, seed in (
                (options.pairs, start.config.seed),
                (200, derive_seed(start.config.seed, "held out")),
            )
        )
        return Work(LifeTask(start.config, {"model": model}, facts), train, test)

    def finish(self, checkpoint: Path, out: Path) -> list[str]:
        return [f"run the automaton: arcore sample {out} --frames 20 --out life.gif"]

    def sample(
        self, networks: Mapping[str, Any], facts: Mapping[str, Any], options: Any, show: Callable[[str], None]
    ) -> Pictures:
        if "rule" not in facts:
            raise ValueError(
                "these weights do not say which automaton they are of: train one with `arcore train`"
            )
        height, width = facts["height"], facts["width"]
        if options.state is None:
            generator = torch.Generator().manual_seed(options.seed)
            first = random_states(options.num, height, width, generator)
        else:
            first = _read_state(options.state, height, width)
        found, formed = networks["model"].roll_out(
            first, options.frames, temperature=options.temperature, seed=options.seed
        )
        right, unformed = 0, int((~formed).sum())
        for turn in range(options.frames):
            right += int(
                (next_state(found[:, turn], facts["rule"]) == found[:, turn + 1]).flatten(1).all(1).sum()
            )
        what = f"{right} of {options.frames * len(first)} states follow rule {facts['rule']}"
        if unformed:
            what += f"; {unformed} were not written as a state"
        picture = 1.0 - 2.0 * found.unsqueeze(2).float()  # living cells are black
        if height == 1:
            return Pictures(picture[:, :, :, 0].transpose(1, 2), what)
        return Pictures(picture, what)


def _read_state(text: str, height: int, width: int) -> Tensor:
    rows = text.split("/")
    if len(rows) != height or any(not re.fullmatch("[01]*", row) or len(row) != width for row in rows):
        raise ValueError(
            f"--state: expected {height} rows of {width} cells, 0 or 1, with / between them, but got {text!r}"
        )
    return torch.tensor([[[int(cell) for cell in row] for row in rows]])


RECIPE = LifeRecipe()
