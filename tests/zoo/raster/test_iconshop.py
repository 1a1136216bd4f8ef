"""IconShop: paths, tokens and back, gaps, the grammar, the loss by hand, files that are broken, the command line."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import arcore
from arcore.catalog.claims import shaken
from arcore.cli import main
from arcore.data.svg import Icon, draw_icons, load_icons, parse_path, read_icon
from arcore.decoding import generate
from arcore.zoo.raster.iconshop.claim import parses
from arcore.zoo.raster.iconshop.model import icon_loss
from arcore.zoo.raster.iconshop.tokens import (
    COUNTS,
    CURVE,
    END,
    LINE,
    MASK,
    MOVE,
    SPAN_END,
    Grammar,
    GrammarModel,
    IconTokenizer,
    cut_span,
    fill_span,
)

pytest.importorskip("fontTools")
SQUARE = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 20 10"><path d="M2 2h6v6H2z"/></svg>'


class Protocol:
    """Words and drawings token by token."""

    def __init__(self, preset: str) -> None:
        self.total = arcore.create_model(preset).total
        self.ids = torch.randint(self.total, (3, 24))

    def forward(self, model: Any) -> Tensor:
        return model(self.ids)

    def expected_shape(self) -> tuple[int, ...]:
        return (3, 24, self.total)

    def loss(self, model: Any) -> Tensor:
        return F.cross_entropy(self.forward(model)[:, :-1].flatten(0, 1), self.ids[:, 1:].flatten())

    def stepwise(self, model: Any) -> tuple[Tensor, Tensor]:
        cache = model.make_cache(3, 24)
        steps = [model.prefill(self.ids[:, :6], cache)]
        steps += [model.step(self.ids[:, i], cache) for i in range(6, 24)]
        return self.forward(model)[:, 5:], torch.stack(steps, dim=1)

    def generate(self, model: Any, rows: list[int]) -> tuple[list[Tensor], Tensor]:
        prompts = [self.ids[r, : 3 + 4 * r].tolist() for r in rows]
        grammars = [Grammar(model.vocab_size, 20) for _ in rows]
        seeds = [7 + r for r in rows]
        out = generate(GrammarModel(model, grammars), prompts, max_new_tokens=20, eos=END, seed=seeds)
        whole = [model(torch.tensor([[*p, *new]])) for p, new in zip(prompts, out.rows(), strict=True)]
        return [F.pad(out.ids, (0, 20 - out.ids.shape[1]))], torch.stack(
            [x[0, -1].softmax(-1) for x in whole]
        )


def random_drawing(grid: int, chance: random.Random) -> list[int]:
    tokens: list[int] = []
    for number in range(chance.randint(1, 12)):
        command = MOVE if number == 0 else chance.choice([MOVE, LINE, CURVE])
        points = [6 + chance.randrange(grid * grid) for _ in range(COUNTS[command])]
        if command == MOVE:
            # Where the pen was, as an icon's encoding has it.
            points[0] = tokens[-1] if tokens else 6
        tokens += [command, *points]
    return tokens


def test_paths_as_lines_and_cubic_curves() -> None:
    assert parse_path("M1 2h3v4H1z") == (
        ("M", ((1, 2),)), ("L", ((4, 2),)), ("L", ((4, 6),)), ("L", ((1, 6),)), ("L", ((1, 2),))
    )  # fmt: skip
    (_, (_, curve)) = parse_path("M0 0Q3 6 6 0")
    assert curve == (pytest.approx((2, 4)), pytest.approx((4, 4)), (6, 0))
    # A half circle of radius 5: all points of the curves are 5 away from its centre.
    commands = parse_path("M0 0A5 5 0 0 1 10 0")
    at = (0.0, 0.0)
    for kind, points in commands[1:]:
        assert kind == "C"
        for s in (0.25, 0.5, 0.75):
            weights = ((1 - s) ** 3, 3 * s * (1 - s) ** 2, 3 * s**2 * (1 - s), s**3)
            x, y = (sum(w * p[i] for w, p in zip(weights, (at, *points), strict=True)) for i in (0, 1))
            assert ((x - 5) ** 2 + y**2) ** 0.5 == pytest.approx(5, abs=0.01)
        at = points[-1]
    assert at == pytest.approx((10, 0))


def test_tokens_there_and_back_on_random_drawings() -> None:
    chance, tokenizer = random.Random(0), IconTokenizer(50)
    for _ in range(1000):
        tokens = random_drawing(50, chance)
        icon = tokenizer.decode([*tokens, END, 7])
        assert tokenizer.encode(icon) == tokens
        commands = sum(token in COUNTS for token in tokens)
        first = chance.randrange(commands)
        cut = cut_span(tokens, first, chance.randint(1, commands - first))
        assert cut.count(MASK) == 1 and cut[-1] == SPAN_END
        assert fill_span(cut) == tokens
        assert parses(icon)


def test_every_icon_of_the_package_is_read_within_a_pixel() -> None:
    from arcore.zoo.raster.iconshop.claim import grid_error

    icons = load_icons()[::40]
    assert len(icons) > 40
    assert max(grid_error(icon, IconTokenizer(64)) for icon in icons) <= 2**-0.5 + 1e-6


def test_the_grammar_ends_in_time() -> None:
    chance = random.Random(1)
    for filling in (False, True):
        for room in (4, 5, 9, 30):
            grammar, row = Grammar(60, room, filling=filling), []
            while not grammar.done:
                row.append(chance.choice(grammar.allowed().nonzero()[:, 0].tolist()))
                grammar.read(row[-1])
            assert len(row) <= room
            assert row[-1] == (SPAN_END if filling else END)
    grammar = Grammar(60, 30)
    assert grammar.allowed().nonzero()[:, 0].tolist() == [MOVE]
    for bad in (LINE, END, 7, 60):
        with pytest.raises(ValueError, match=f"the token {bad} breaks the grammar"):
            grammar.read(bad)


def test_drawings_of_random_weights_parse_and_gaps_are_filled() -> None:
    model: Any = shaken(arcore.create_model("iconshop_tiny", words=("arrow", "up"), max_length=50)).eval()
    icons = model.draw([model.prompt(["arrow"]), model.prompt(["up", "arrow"])], seed=3)
    assert all(map(parses, icons))
    assert model.draw([model.prompt(["arrow"])], seed=3)[0] == icons[0]
    tokens = random_drawing(32, random.Random(5))
    commands = model.tokenizer.decode(tokens).commands
    icon = model.fill(["up"], tokens, 1, 1, seed=4)[0]
    assert icon.commands[0] == commands[0]
    assert parses(icon)
    with pytest.raises(ValueError, match="does not know the word 'arow': did you mean arrow"):
        model.prompt(["arow"])
    with pytest.raises(ValueError, match="a span inside"):
        model.fill([], tokens, 0, 99)
    with pytest.raises(ValueError, match="leaves no room"):
        model.fill([], [MOVE, 6, 7] * 15, 0, 1)


def test_loss_by_hand() -> None:
    model: Any = shaken(arcore.create_model("iconshop_tiny", words=("a", "b", "c"), grid=4)).eval()
    rows = [[*model.prompt(["a", "c"]), MOVE, 6, 9, END], [*model.prompt([]), MOVE, 8, 7, LINE, 6, END]]
    ids = torch.tensor([row + [-1] * (8 - len(row)) for row in rows])
    words, drawing = [], []
    for row in rows:
        logits = model(torch.tensor([row]))[0].double()
        for place, target in enumerate(row[1:]):
            split = model.vocab_size
            part = logits[place, split:] if target >= split else logits[place, :split]
            (words if target >= split else drawing).append(
                -part.log_softmax(-1)[target % split if target >= split else target]
            )
    expected = (torch.stack(words).mean() + 7 * torch.stack(drawing).mean()) / 8
    total, alone = icon_loss(model, ids)
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert alone.item() == pytest.approx(torch.stack(drawing).mean().item(), rel=1e-5)


def test_broken_files(tmp_path: Path) -> None:
    for name, text, said in (
        ("xml", "<svg", "is no SVG file"),
        ("frame", "<svg><path d='M0 0'/></svg>", "has no frame"),
        ("empty", "<svg viewBox='0 0 0 9'/>", "has an empty frame"),
        ("path", "<svg viewBox='0 0 9 9'><g/></svg>", "has no path"),
        ("grammar", "<svg viewBox='0 0 9 9'><path d='M0 0 L1'/></svg>", "breaks the grammar of SVG"),
        ("start", "<svg viewBox='0 0 9 9'><path d='L1 1'/></svg>", "begins with M"),
    ):
        (tmp_path / f"{name}.svg").write_text(text)
        with pytest.raises(ValueError, match=said):
            read_icon(tmp_path / f"{name}.svg")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_icon(tmp_path / "none.svg")
    with pytest.raises(ValueError, match="no usable"):
        load_icons(tmp_path, skip_bad=True)
    (tmp_path / "good.svg").write_text(SQUARE)
    with pytest.warns(UserWarning, match="6 bad icons are left out: empty"):
        assert [icon.name for icon in load_icons(tmp_path, skip_bad=True)] == ["good"]
    with pytest.raises(ValueError, match="expected a command at place 3"):
        IconTokenizer(4).decode([MOVE, 6, 7, 9])
    with pytest.raises(ValueError, match="begins with a move"):
        IconTokenizer(4).decode([LINE, 6])
    with pytest.raises(ValueError, match="the end of the span"):
        fill_span([MASK, END, MOVE, 6, 6])


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "icons"
    folder.mkdir()
    for name in ("box-open", "box", "wide-box"):
        (folder / f"{name}.svg").write_text(SQUARE)
    run, sheet = str(tmp_path / "run"), tmp_path / "a.png"
    quick = ["--steps", "2", "--batch-size", "4"]
    assert main(["train", "iconshop_tiny", "--data", str(folder), "--out", run, *quick]) == 0
    assert main(["sample", run, "--text", "wide box", "-n", "2", "--out", str(sheet)]) == 0
    assert sheet.is_file()
    written = read_icon(tmp_path / "a_01.svg")
    assert written.box == (0, 0, 31, 31)
    fill = ["sample", run, "--fill", str(folder / "box.svg"), "--first", "1", "--count", "2", "-n", "1"]
    assert main([*fill, "--out", str(tmp_path / "b.png")]) == 0
    kept = IconTokenizer(32).decode(IconTokenizer(32).encode(read_icon(folder / "box.svg")))
    assert read_icon(tmp_path / "b_01.svg").commands[0] == kept.commands[0]
    capsys.readouterr()
    for words, said in (
        (["--text", "bix"], "does not know the word 'bix': did you mean box"),
        (["--text", "box", "--out", "a.jpg"], "must end in .png"),
        (["--text", "box", "--first", "1"], "name it with --fill FILE"),
        ([], 'say what to draw with --text "WORDS"'),
    ):
        assert main(["sample", run, *words]) == 2
        assert said in capsys.readouterr().err
    assert main(["train", "iconshop_tiny", "--data", str(tmp_path / "none"), "--out", run + "2", *quick]) == 2
    assert "neither a data set nor a folder" in capsys.readouterr().err


def test_a_sheet_of_no_commands(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw_icons([Icon((), (0, 0, 9, 9))], tmp_path / "a.png")
    assert (tmp_path / "a.png").is_file()
    assert Icon((), (0, 0, 9, 9)).path() == ""
