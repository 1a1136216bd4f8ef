"""`arcore run diffusion_forcing`: ways through a maze with the released planner's weights, or with trained ones."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arcore._files import atomic_path
from arcore.catalog import create_model
from arcore.catalog.running import Report
from arcore.nn.kinds import check_kinds
from arcore.zoo.dynamics.diffusion_forcing.plan import RELEASED_ROWS, plan, replan

MAZE = "diffusion_forcing_maze2d_medium"


@check_kinds
@dataclass(frozen=True, kw_only=True)
class Options:
    """Plans from a start to a goal.

    Attributes:
        weights: file of the released planner, or a checkpoint of a run.
        preset: which model the file of weights is of.
        start: position, its values in the units of the data.
        goal: likewise.
        horizon: positions after the start. Default: as many as the model plans.
        replan: plan anew after so many positions, from where the way has led. Default: one plan.
        guidance: strength of the pull to the goal; 0 goes anywhere. Default: the released planner's.
        steps: of the sampler.
        num: ways to draw.
        seed: decides all random draws.
        out: .csv file for the ways, one row per position.
    """

    weights: Path
    start: tuple[float, ...]
    goal: tuple[float, ...]
    preset: str = MAZE
    horizon: int | None = None
    replan: int | None = None
    guidance: float = 2.0 / RELEASED_ROWS
    steps: int = 50
    num: int = 1
    seed: int = 0
    out: Path | None = None

    def __post_init__(self) -> None:
        for name in ("horizon", "replan", "steps", "num"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1 but got {value}")
        if self.out is not None and self.out.suffix.lower() != ".csv":
            raise ValueError(f"--out must be a .csv file but got {self.out}")


def run(options: Options) -> Report:
    """Draw ways and say how near to the goal they come."""
    # A checkpoint of arcore says which model it is.
    name = "diffusion_forcing" if options.weights.is_dir() else options.preset
    model: Any = create_model(name, weights=options.weights).eval()
    size = model.config.in_channels
    for flag, place in (("start", options.start), ("goal", options.goal)):
        if len(place) != size or not all(map(math.isfinite, place)):
            raise ValueError(
                f"--{flag} must be {size} finite numbers, as the model's positions, but got {place}"
            )
    start, goal = (torch.tensor([place] * options.num) for place in (options.start, options.goal))
    drawn: dict[str, Any] = {"horizon": options.horizon, "guidance": options.guidance, "steps": options.steps}
    seeds = [options.seed + row for row in range(options.num)]
    if options.replan is None:
        ways = plan(model, start, goal, seed=seeds, **drawn)
    else:
        # The way follows its plan to the place: what carries it out is not known here.
        ways = replan(
            model, lambda here, there: there, start, goal, every=options.replan, seed=seeds, **drawn
        )
    distances = (ways - goal[:, None]).norm(dim=-1)
    nearest, ends = distances.min(dim=1).values, distances[:, -1]
    lines = [
        f"way {row}: {ways.shape[1]} positions, ends {ends[row]:.3g} from the goal, comes within {nearest[row]:.3g}"
        for row in range(options.num)
    ]
    if options.out is not None:
        _write(ways, options.out)
        lines.append(f"wrote {options.out}")
    values = {"ways": ways.tolist(), "ends": ends.tolist(), "nearest": nearest.tolist()}
    return Report("\n".join(lines), values, lambda figure: _draw(figure, ways, start[0], goal[0]))


def _write(ways: Tensor, path: Path) -> None:
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["way", "position", *(f"x{i}" for i in range(ways.shape[2]))])
        for row, way in enumerate(ways.tolist()):
            for position, place in enumerate(way, start=1):
                writer.writerow([row, position, *(f"{value:.9g}" for value in place)])


def _draw(figure: Any, ways: Tensor, start: Tensor, goal: Tensor) -> None:
    axes = figure.subplots()
    for way in ways.tolist():
        axes.plot([place[0] for place in way], [place[1] for place in way], linewidth=0.8)
    for place, marker, label in ((start, "o", "start"), (goal, "*", "goal")):
        axes.plot(float(place[0]), float(place[1]), marker, color="black", label=label)
    axes.set_aspect("equal")
    axes.legend()
