"""IconShop's claim: icons as tokens and back, drawings that parse, gaps that are filled."""

from __future__ import annotations

from typing import Any

import torch

from arcore.catalog import create_model
from arcore.catalog.claims import Claim, at_least, at_most, equals, shaken, steps
from arcore.data.svg import Icon, load_icons, parse_path
from arcore.zoo.raster.iconshop.model import icon_loss
from arcore.zoo.raster.iconshop.tokens import COUNTS, END, IconTokenizer, cut_span, fill_span


def grid_error(icon: Icon, tokenizer: IconTokenizer) -> float:
    """Largest distance in pixels of the grid of a point from where its token puts it.

    What an icon has outside of its frame is put onto the border; the distance is that from the border.
    """
    back, last = tokenizer.decode(tokenizer.encode(icon)), tokenizer.grid - 1
    worst = 0.0
    for (kind, points), (other, places) in zip(tokenizer.scaled(icon).commands, back.commands, strict=True):
        if kind != other:
            return float("inf")
        for (x, y), (u, v) in zip(points, places, strict=True):
            x, y = (min(max(number, 0.0), float(last)) for number in (x, y))
            worst = max(worst, ((x - u) ** 2 + (y - v) ** 2) ** 0.5)
    return worst


def parses(icon: Icon) -> bool:
    """Whether an icon's path is read back, by another program, as the commands it has."""
    try:
        found = parse_path(icon.path())
    except ValueError:
        return False
    # A closing line that is not there already is added by the other program.
    left = list(found)
    for command in icon.commands:
        while left and left[0] != command and left[0][0] == "L":
            left.pop(0)
        if not left or left.pop(0) != command:
            return False
    return all(kind == "L" for kind, _ in left)


def _overfit(icons: list[Icon], count: int) -> tuple[Any, float]:
    """A small model that has seen sixteen icons for a while, and its cross entropy of them."""
    words = tuple(f"icon{i}" for i in range(len(icons)))
    model: Any = create_model("iconshop_tiny", words=words)
    rows = [
        [*model.prompt([word]), *model.tokenizer.encode(icon), END]
        for word, icon in zip(words, icons, strict=True)
    ]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [-1] * (longest - len(row)) for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in steps(count, "learning sixteen icons"):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / count)
        _, drawing = icon_loss(model, ids)
        optimizer.zero_grad()
        drawing.backward()
        optimizer.step()
    return model.eval(), float(drawing.detach())


def claim(*, quick: bool) -> Claim:
    """Real icons there and back, drawings of random weights, gaps; in full also sixteen icons learned by heart."""
    tokenizer = IconTokenizer(100)
    icons = load_icons()[:: 20 if quick else 1]
    error = max(grid_error(icon, tokenizer) for icon in icons)
    wrong = 0
    generator = torch.Generator().manual_seed(0)
    for icon in icons[: 100 if quick else 1000]:
        tokens = tokenizer.encode(icon)
        commands = sum(token in COUNTS for token in tokens)
        first = int(torch.randint(commands, (), generator=generator))
        count = int(torch.randint(1, commands - first + 1, (), generator=generator))
        wrong += fill_span(cut_span(tokens, first, count)) != tokens
    model: Any = shaken(create_model("iconshop_tiny", max_length=60)).eval()
    count = 20 if quick else 200
    drawn = model.draw([model.prompt([])] * count, seed=1)
    whole = model.tokenizer.encode(icons[0])
    some = whole[: _whole(whole, 24)]
    filled = model.fill([], some, 1, 2, num=count, seed=2)
    kept = [command for i, command in enumerate(model.tokenizer.decode(some).commands) if i not in (1, 2)]
    around = sum(
        list(icon.commands[:1]) + list(icon.commands[len(icon.commands) - len(kept) + 1 :]) == kept
        for icon in filled
    )
    rows = [
        at_most(f"largest error of a point of {len(icons)} icons on a grid of 100, in pixels", error, 1.0),
        equals("cut icons that do not come back when their gap is filled with the span", wrong, 0),
        equals("share of drawings of random weights that parse", sum(map(parses, drawn)) / count, 1),
        equals("share of filled gaps whose icon parses", sum(map(parses, filled)) / count, 1),
        equals("share of filled gaps that keep what stands around them", around / count, 1),
    ]
    if not quick:
        short = [icon for icon in icons if len(model.tokenizer.encode(icon)) <= 100][::40][:16]
        learned, entropy = _overfit(short, 400)
        again = learned.draw(
            [learned.prompt([word]) for word in learned.config.words], seed=3, temperature=0.0
        )
        same = sum(
            drawn_again.commands == learned.tokenizer.decode(learned.tokenizer.encode(icon)).commands
            for drawn_again, icon in zip(again, short, strict=True)
        )
        rows += [
            at_most("cross entropy of sixteen icons learned by heart", entropy, 0.05),
            at_least("of these, drawn again from their word", same, 14),
        ]
    return Claim(tuple(rows))


def _whole(tokens: list[int], most: int) -> int:
    """Where the last whole command within the first `most` tokens ends."""
    starts = [i for i, token in enumerate(tokens) if token in COUNTS] + [len(tokens)]
    return max(place for place in starts if place <= most)
