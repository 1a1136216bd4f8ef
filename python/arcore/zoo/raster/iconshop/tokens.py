"""Icons as tokens and back, spans that are cut out, and the grammar of what may come next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from arcore.data.svg import Command, Icon, Point

END, MASK, SPAN_END, MOVE, LINE, CURVE = range(6)
FIRST_POINT = 6
KINDS = {"M": MOVE, "L": LINE, "C": CURVE}
# Points behind each command: a move has where the pen was and where it goes.
COUNTS = {MOVE: 2, LINE: 1, CURVE: 3}


class IconTokenizer:
    """Icons on a grid.

    Args:
        grid: side G of the grid in pixels.

    Raises:
        ValueError: a grid of less than 2 pixels.
    """

    def __init__(self, grid: int) -> None:
        if grid < 2:
            raise ValueError(f"expected a grid of at least 2 pixels but got {grid}")
        self.grid = grid
        self.vocab_size = FIRST_POINT + grid * grid

    def scaled(self, icon: Icon) -> Icon:
        """The icon in the middle of the grid, its longer side as long as the grid; not rounded."""
        left, top, width, height = icon.box
        scale = (self.grid - 1) / max(width, height)
        right = (self.grid - 1 - scale * width) / 2 - scale * left
        down = (self.grid - 1 - scale * height) / 2 - scale * top

        def place(point: Point) -> Point:
            return scale * point[0] + right, scale * point[1] + down

        commands = tuple((kind, tuple(map(place, points))) for kind, points in icon.commands)
        return Icon(commands, (0, 0, self.grid - 1, self.grid - 1), icon.name)

    def point(self, point: Point) -> int:
        """The token of a point; what lies outside of the grid is moved to its border."""
        x, y = (min(max(round(number), 0), self.grid - 1) for number in point)
        return FIRST_POINT + x + self.grid * y

    def encode(self, icon: Icon) -> list[int]:
        """Tokens of an icon, without the end."""
        tokens: list[int] = []
        at: Point = (0.0, 0.0)
        for kind, points in self.scaled(icon).commands:
            tokens.append(KINDS[kind])
            tokens += (
                [self.point(point) for point in (at, *points)] if kind == "M" else map(self.point, points)
            )
            at = points[-1]
        return tokens

    def decode(self, tokens: Sequence[int], name: str = "") -> Icon:
        """The icon of tokens, up to the first end.

        Raises:
            ValueError: the tokens break the grammar.
        """
        commands: list[Command] = []
        names = {token: kind for kind, token in KINDS.items()}
        for token, points in _commands(tokens, self.vocab_size):
            if not commands and token != MOVE:
                raise ValueError(f"expected a drawing that begins with a move but got token {token}")
            places = [((p - FIRST_POINT) % self.grid, (p - FIRST_POINT) // self.grid) for p in points]
            # Where the pen was is known without its token.
            commands.append((names[token], tuple(places[1:] if token == MOVE else places)))
        return Icon(tuple(commands), (0, 0, self.grid - 1, self.grid - 1), name)

    def shifted(self, tokens: Sequence[int], right: int, down: int) -> list[int]:
        """A drawing moved on the grid; what would leave it stays at the border."""
        moved = []
        for token in tokens:
            if token >= FIRST_POINT:
                y, x = divmod(token - FIRST_POINT, self.grid)
                token = self.point((x + right, y + down))
            moved.append(token)
        return moved


def _commands(tokens: Sequence[int], vocab: int) -> list[tuple[int, list[int]]]:
    """Commands with their points, up to the first end.

    Raises:
        ValueError: the tokens break the grammar.
    """
    found: list[tuple[int, list[int]]] = []
    place = 0
    while place < len(tokens) and tokens[place] != END:
        token = tokens[place]
        if token not in COUNTS:
            raise ValueError(f"expected a command at place {place} but got token {token}")
        points = list(tokens[place + 1 : place + 1 + COUNTS[token]])
        if len(points) < COUNTS[token] or not all(FIRST_POINT <= p < vocab for p in points):
            raise ValueError(
                f"expected {COUNTS[token]} points behind the command at place {place} but got {points}"
            )
        found.append((token, points))
        place += 1 + COUNTS[token]
    return found


def cut_span(tokens: Sequence[int], first: int, count: int) -> list[int]:
    """A drawing with a span of commands put behind its end: before MASK after END span SPAN_END.

    Args:
        tokens: a drawing without its end.
        first: number of the span's first command.
        count: commands of the span, at least 1.

    Raises:
        ValueError: there is no such span.
    """
    starts = [i for i, token in enumerate(tokens) if token in COUNTS] + [len(tokens)]
    if first < 0 or count < 1 or first + count > len(starts) - 1:
        raise ValueError(
            f"expected a span inside {len(starts) - 1} commands but got {count} from number {first} on"
        )
    a, b = starts[first], starts[first + count]
    return [*tokens[:a], MASK, *tokens[b:], END, *tokens[a:b], SPAN_END]


def fill_span(tokens: Sequence[int]) -> list[int]:
    """The drawing of what `cut_span` made; without a cut the tokens up to the end.

    Raises:
        ValueError: the cut is not complete.
    """
    tokens = list(tokens)
    if END not in tokens:
        raise ValueError("expected an end behind the drawing")
    end = tokens.index(END)
    if MASK not in tokens[:end]:
        return tokens[:end]
    if SPAN_END not in tokens[end:]:
        raise ValueError("expected the end of the span that belongs to the gap")
    gap = tokens.index(MASK)
    return tokens[:gap] + tokens[end + 1 : tokens.index(SPAN_END, end)] + tokens[gap + 1 : end]


class Grammar:
    """What may come next in the drawing of one row.

    Args:
        vocab_size: tokens of drawings.
        room: tokens that may still come, the end included, at least 4.
        filling: whether a span is drawn, which begins with any command and ends with its own end.
        inside: of a span: whether something stands before it, so that it may begin with a line.
    """

    def __init__(self, vocab_size: int, room: int, *, filling: bool = False, inside: bool = True) -> None:
        self.vocab_size, self.room, self.filling = vocab_size, room, filling
        self.points, self.empty, self.inside, self.done = 0, True, inside, False

    def allowed(self) -> Tensor:
        """bool `[V]`."""
        table = torch.zeros(self.vocab_size, dtype=torch.bool)
        if self.done:
            table[END] = True
        elif self.points:
            table[FIRST_POINT:] = True
        else:
            begun = not self.empty or (self.filling and self.inside)
            for token, count in COUNTS.items():
                # The end must still find room.
                table[token] = (begun or token == MOVE) and self.room >= count + 2
            table[SPAN_END if self.filling else END] = not self.empty or not bool(table.any())
        return table

    def read(self, token: int) -> None:
        """Go on behind a token.

        Raises:
            ValueError: it is not allowed.
        """
        if not (0 <= token < self.vocab_size and bool(self.allowed()[token])):
            raise ValueError(f"the token {token} breaks the grammar of drawings")
        self.room -= 1
        if self.points:
            self.points -= 1
        elif token in COUNTS:
            self.points, self.empty = COUNTS[token], False
        else:
            self.done = True


class GrammarModel:
    """A model that gives no probability to what the grammar forbids. A `TokenModel` (`arcore.nn.protocols`).

    Args:
        model: of drawings.
        grammars: one for each row.
    """

    def __init__(self, model: Any, grammars: Sequence[Grammar]) -> None:
        self.model, self.grammars, self.vocab_size = model, list(grammars), int(model.vocab_size)

    def make_cache(self, batch: int, max_length: int) -> Any:
        """See `TokenModel`."""
        if batch != len(self.grammars):
            raise ValueError(f"expected a grammar for each of {batch} rows but got {len(self.grammars)}")
        return self.model.make_cache(batch, max_length)

    def prefill(self, ids: Tensor, cache: Any, mask: Tensor | None = None) -> Tensor:
        """See `TokenModel`."""
        return self._masked(self.model.prefill(ids, cache, mask))

    def step(self, ids: Tensor, cache: Any) -> Tensor:
        """See `TokenModel`."""
        for grammar, token in zip(self.grammars, ids.tolist(), strict=True):
            if not grammar.done:
                grammar.read(token)
        return self._masked(self.model.step(ids, cache))

    def _masked(self, logits: Tensor) -> Tensor:
        allowed = torch.stack([grammar.allowed() for grammar in self.grammars]).to(logits.device)
        return logits[..., : self.vocab_size].masked_fill(~allowed, -torch.inf)
