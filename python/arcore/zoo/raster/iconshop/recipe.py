"""How a model of icons is trained and drawn from."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from arcore._files import atomic_path
from arcore.catalog import get_config
from arcore.data.identity import place
from arcore.data.svg import Icon, draw_icons, load_icons, read_icon
from arcore.nn.kinds import check_kinds
from arcore.recipes._recipe import Recipe, Start, Work, ZooTask
from arcore.training.checkpoint import read_meta
from arcore.training.config import TrainConfig
from arcore.zoo.raster.iconshop.model import icon_loss
from arcore.zoo.raster.iconshop.tokens import COUNTS, END, IconTokenizer, cut_span

# Words of a name that are read.
WORDS = 6
# Shares of training icons whose words change places, and that have a gap.
SHUFFLED, CUT = 0.8, 0.5
# Every so many-th icon is held out.
HELD_OUT = 10


@check_kinds
@dataclass(frozen=True, kw_only=True)
class IconOptions:
    """Icons.

    Attributes:
        data: icons (those of the package fontawesomefree), or a folder of *.svg files, whose names are the words.
        skip_bad: leave out files that cannot be read.
        shift: pixels of the grid by which training icons move at most. Default: 3 of 100.
    """

    data: str = "icons"
    skip_bad: bool = False
    shift: int | None = None


@check_kinds
@dataclass(frozen=True, kw_only=True)
class IconSampling:
    """Icons of words, or an icon with a part drawn anew.

    Attributes:
        text: words of the icon, such as "arrow up".
        num: how many.
        out: file of the sheet (.png); the icons stand beside it as .svg files.
        seed: decides all random draws.
        temperature: above 1 draws more varied icons, below 1 likelier ones.
        top_k: keep the K likeliest tokens of each draw. Default: all.
        top_p: keep the smallest set of tokens with this much probability, 0 to 1.
        fill: SVG file of which a span of commands is drawn anew.
        first: number of that span's first command.
        count: commands of that span. Default: a third of the icon, from its first third on.
    """

    text: str | None = None
    num: int = field(default=8, metadata={"aliases": ("-n",)})
    out: Path = Path("icons.png")
    seed: int = 0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = 0.5
    fill: Path | None = None
    first: int | None = None
    count: int | None = None

    def __post_init__(self) -> None:
        if self.num < 1:
            raise ValueError(f"-n must be at least 1 but got {self.num}")
        if self.fill is None and (self.first is not None or self.count is not None):
            raise ValueError(
                "--first and --count say which part of an icon is drawn anew: name it with --fill FILE"
            )


class IconData(Dataset[tuple[Tensor, int]]):
    """Word numbers `[WORDS]` and tokens `[T]` of icons in one row, -1 where there is none."""

    def __init__(self, rows: Sequence[tuple[list[int], list[int]]], length: int) -> None:
        self.table = torch.full((len(rows), WORDS + length), -1)
        for row, (words, tokens) in zip(self.table, rows, strict=True):
            row[: len(words)] = torch.tensor(words, dtype=torch.int64)
            row[WORDS : WORDS + len(tokens)] = torch.tensor(tokens)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.table[index], 0


def words_of(name: str) -> list[str]:
    """The words of an icon's file name."""
    return [word for word in name.lower().replace("_", "-").split("-") if word][:WORDS]


class IconTask(ZooTask):
    """Cross entropy of words and drawings; training icons are moved, cut, and have their words shuffled."""

    model: Any

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        rows = [self._row(row) for row in images.tolist()]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [-1] * (longest - len(row)) for row in rows], device=images.device)
        total, drawing = icon_loss(self.model, ids)
        return total, {"drawing": drawing.detach()}

    def _row(self, row: list[int]) -> list[int]:
        words = [word for word in row[:WORDS] if word >= 0]
        tokens = [token for token in row[WORDS:] if token >= 0]
        model, shift = self.model, self.facts["shift"]
        if self.training:
            if torch.rand(()) < SHUFFLED:
                words = [words[i] for i in torch.randperm(len(words)).tolist()]
            right, down = torch.randint(-shift, shift + 1, (2,)).tolist()
            tokens = model.tokenizer.shifted(tokens, right, down)
        commands = sum(token in COUNTS for token in tokens)
        drawing = [*tokens, END]
        if self.training and commands > 1 and torch.rand(()) < CUT:
            first = int(torch.randint(commands - 1, ()))
            drawing = cut_span(tokens, first, int(torch.randint(1, commands - first + 1, ())))
        numbers = [model.draw_start + 1 + word for word in words]
        return [model.text_start, *numbers, model.draw_start, *drawing]


class Icons(Recipe):
    """Icons command by command."""

    defaults: ClassVar[TrainConfig] = TrainConfig(steps=1000, batch_size=16, lr=2e-3, clip=1.0)
    options: ClassVar[type] = IconOptions
    sampling: ClassVar[type | None] = IconSampling

    def prepare(self, start: Start, options: Any) -> Work:
        icons = load_icons(options.data, skip_bad=options.skip_bad)
        model: Any = start.networks.get("model")
        config: Any = model.config if model is not None else get_config(start.preset, **start.changes)
        tokenizer = IconTokenizer(config.grid)
        # Start of words, words, start of the drawing, and what a cut adds.
        room = config.max_length - WORDS - 5
        coded = [(icon.name, tokenizer.encode(icon)) for icon in icons]
        fitting = [one for one in coded if 0 < len(one[1]) <= room]
        start.say(f"{options.data}: {len(icons)} icons, of which {len(fitting)} take at most {room} tokens")
        if len(fitting) < 2:
            raise ValueError(
                f"{options.data} holds {len(fitting)} icons of at most {room} tokens: too few to train on"
            )
        digest = hashlib.sha256(repr(coded).encode()).hexdigest()[:16]
        if start.facts and start.facts.get("content") != digest:
            raise ValueError(
                f"the icons in {options.data!r} are no longer those of the run in {start.source}"
            )
        test = fitting[::HELD_OUT] if len(fitting) >= 2 * HELD_OUT else []
        train = [one for i, one in enumerate(fitting) if not test or i % HELD_OUT]
        if model is None:
            known = sorted({word for name, _ in train for word in words_of(name)})
            model = start.fresh(words=tuple(known))
        numbers = {word: i for i, word in enumerate(model.config.words)}
        parts = [
            IconData(
                [([numbers[w] for w in words_of(name) if w in numbers], tokens) for name, tokens in part],
                room,
            )
            for part in (train, test)
        ]
        shift = options.shift if options.shift is not None else max(1, 3 * config.grid // 100)
        facts = {"preset": start.preset, "data": place(options.data), "content": digest, "shift": shift}
        return Work(IconTask(start.config, {"model": model}, facts), parts[0], parts[1] if test else None)

    def finish(self, checkpoint: Path, out: Path) -> list[str]:
        words = read_meta(checkpoint)["modules"]["model"]["config"]["words"]
        text = "arrow" if "arrow" in words else words[0]
        call = ["arcore", "sample", str(out), "--text", text, "-n", "8", "--out", str(out / "icons.png")]
        return [f"draw icons: {shlex.join(call)}"]

    def check_sampling(self, options: Any) -> None:
        if options.text is None and options.fill is None:
            raise ValueError('this is a model of icons: say what to draw with --text "WORDS", or --fill FILE')
        if options.out.suffix.lower() != ".png":
            raise ValueError(f"{options.out} must end in .png; the icons are written beside it as .svg files")

    def sample(
        self,
        networks: Mapping[str, Any],
        facts: Mapping[str, Any],
        options: Any,
        show: Callable[[str], None],
    ) -> Drawn:
        model = networks["model"]
        settings = {"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p}
        words = (options.text or "").lower().split()
        if options.fill is None:
            icons = model.draw([model.prompt(words)] * options.num, seed=options.seed, **settings)
            return Drawn(icons, f"{options.num} x {' '.join(words)!r}, seed {options.seed}")
        given = read_icon(options.fill)
        tokens = model.tokenizer.encode(given)
        commands = sum(token in COUNTS for token in tokens)
        first = commands // 3 if options.first is None else options.first
        count = max(commands // 3, 1) if options.count is None else options.count
        known = set(model.config.words)
        words = words or [word for word in words_of(given.name) if word in known]
        icons = model.fill(words, tokens, first, count, num=options.num, seed=options.seed, **settings)
        what = f"{given.name} and {options.num} x its commands {first} to {first + count - 1} drawn anew"
        return Drawn([model.tokenizer.decode(tokens), *icons], f"{what}, seed {options.seed}")


@dataclass(frozen=True)
class Drawn:
    """Icons that were drawn."""

    icons: list[Icon]
    what: str

    def save(self, path: Path) -> list[str]:
        """Write a sheet, and each icon beside it."""
        draw_icons(self.icons, path)
        for number, icon in enumerate(self.icons):
            with atomic_path(path.with_name(f"{path.stem}_{number:02d}.svg")) as temporary:
                temporary.write_text(icon.svg(), encoding="utf-8")
        last = f"{path.stem}_{len(self.icons) - 1:02d}.svg"
        return [f"{path}: {self.what}; as files {path.stem}_00.svg to {last} beside it"]


RECIPE = Icons()
