"""Texts with blanks: tokens, targets and the two positions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

IGNORED = -100


class Blanked(NamedTuple):
    """A text with blanks, or a batch of them with a dimension in front.

    Attributes:
        ids: int64 `[L]`.
        targets: int64 `[L]`, `IGNORED` where nothing is predicted.
        positions: int64 `[2, L]`.
        prefix: tokens of part A, int64 `[]`.
    """

    ids: Tensor
    targets: Tensor
    positions: Tensor
    prefix: Tensor


@dataclass(frozen=True)
class Specials:
    """Tokens that are no text.

    Attributes:
        pad, start, token_mask, span_mask, end_mask, sop, eop: padding; before a text; the masks of single tokens, of
            spans, and of the span at the end; start and end of a span.
    """

    pad: int
    start: int
    token_mask: int
    span_mask: int
    end_mask: int
    sop: int
    eop: int


@dataclass(frozen=True)
class Vocabulary:
    """Symbols and special tokens.

    Attributes:
        name: `protein` or `bytes`.
        symbols: of the first tokens behind the padding.
        size: V, with room to spare.
    """

    name: str
    symbols: str
    size: int

    @property
    def specials(self) -> Specials:
        """The tokens behind the symbols."""
        n = 1 + len(self.symbols)
        return Specials(0, n + 3, n, n + 2, n + 1, n + 4, n + 5)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text; bytes are those of UTF-8."""
        if self.name == "bytes":
            return [1 + byte for byte in text.encode()]
        return [1 + self.symbols.index(letter) for letter in text]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens; special ones are left out."""
        inner = [i - 1 for i in ids if 0 < i <= len(self.symbols)]
        if self.name == "bytes":
            return bytes(inner).decode(errors="replace")
        return "".join(self.symbols[i] for i in inner)


RESIDUES = "LAGVSERTIDPKQNFYMHWCXBUZO.-"
VOCABULARIES = {
    "protein": Vocabulary("protein", RESIDUES, 128),
    "bytes": Vocabulary("bytes", "".join(map(chr, range(256))), 264),
}


def blank(
    tokens: Sequence[int], spans: Sequence[tuple[int, int]], *, mask: int, sop: int, eop: int
) -> Blanked:
    """Replace spans by masks and append them.

    Args:
        tokens: of the text.
        spans: half-open ranges that do not touch, in the order in which they are appended.
        mask, sop, eop: special tokens.

    Returns:
        Targets are `IGNORED` in part A.

    Raises:
        ValueError: spans are empty, touch, or reach out of the text.
    """
    ordered = sorted(spans)
    edges = [0, *(edge for span in ordered for edge in span), len(tokens)]
    touching = any(b[0] <= a[1] for a, b in itertools.pairwise(ordered))
    if touching or any(start >= stop for start, stop in ordered) or edges != sorted(edges):
        raise ValueError(
            f"expected spans in {len(tokens)} tokens that are not empty and do not touch but got {spans}"
        )
    ids: list[int] = []
    places: dict[tuple[int, int], int] = {}
    last = 0
    for span in ordered:
        ids += tokens[last : span[0]]
        places[span] = len(ids)
        ids.append(mask)
        last = span[1]
    ids += tokens[last:]
    prefix = len(ids)
    targets, first, second = [IGNORED] * prefix, list(range(prefix)), [0] * prefix
    for start, stop in spans:
        inside = list(tokens[start:stop])
        ids += [sop, *inside]
        targets += [*inside, eop]
        first += [places[start, stop]] * (len(inside) + 1)
        second += range(1, len(inside) + 2)
    return Blanked(
        torch.tensor(ids), torch.tensor(targets), torch.tensor([first, second]), torch.tensor(prefix)
    )


def draw_spans(
    length: int, generator: torch.Generator, *, share: float = 0.15, mean: float = 3.0, longest: int = 39
) -> list[tuple[int, int]]:
    """Spans of Poisson lengths that hold `share` of a text's tokens, do not touch, and come in random order."""
    budget, lengths = max(1, round(share * length)), [0]
    while sum(lengths) < budget:
        drawn = int(torch.poisson(torch.tensor(mean), generator=generator))
        lengths.append(min(max(drawn, 1), longest, budget - sum(lengths)))
    lengths = lengths[1:]
    # With distinct places among the tokens that stay, at least one token stands between two spans.
    left = length - sum(lengths)
    while len(lengths) > left + 1:
        lengths.pop()
        left = length - sum(lengths)
    places = torch.randperm(left + 1, generator=generator)[: len(lengths)].sort().values.tolist()
    spans, moved = [], 0
    for place, size in zip(places, lengths, strict=True):
        spans.append((place + moved, place + moved + size))
        moved += size
    return [spans[i] for i in torch.randperm(len(spans), generator=generator).tolist()]


def masked_tokens(
    tokens: Sequence[int], specials: Specials, size: int, generator: torch.Generator
) -> Blanked:
    """Understanding: 15 % of the tokens are predicted where they stand; of these 80 % are masked, 10 % replaced."""
    ids = torch.tensor(tokens)
    chosen = torch.rand(len(ids), generator=generator) < 0.15
    chosen[int(torch.randint(len(ids), (), generator=generator))] = True
    kind = torch.rand(len(ids), generator=generator)
    other = torch.randint(1, 1 + size, ids.shape, generator=generator)
    changed = torch.where(kind < 0.8, specials.token_mask, torch.where(kind < 0.9, other, ids))
    targets = torch.where(chosen, ids, IGNORED)
    places = torch.arange(len(ids))
    positions = torch.stack([places, torch.zeros_like(places)])
    return Blanked(torch.where(chosen, changed, ids), targets, positions, torch.tensor(len(ids)))


def lesson(
    tokens: Sequence[int],
    vocabulary: Vocabulary,
    generator: torch.Generator,
    weights: Sequence[float] = (0.2, 0.5, 0.3),
) -> Blanked:
    """A text as one of the three tasks: masked tokens, spans, or a span at the end; drawn by their weights."""
    specials = vocabulary.specials
    task = int(torch.multinomial(torch.tensor(weights, dtype=torch.float32), 1, generator=generator))
    if task == 0:
        return masked_tokens(tokens, specials, len(vocabulary.symbols), generator)
    if task == 1:
        spans = draw_spans(len(tokens), generator)
        return blank(tokens, spans, mask=specials.span_mask, sop=specials.sop, eop=specials.eop)
    kept = int(torch.randint(0, max(1, 3 * len(tokens) // 4), (), generator=generator))
    span = [(kept, len(tokens))]
    return blank(tokens, span, mask=specials.end_mask, sop=specials.sop, eop=specials.eop)


def padded(text: Blanked, length: int) -> Blanked:
    """A text with padding behind it, which nothing before it sees."""
    more = length - len(text.ids)
    if more < 0:
        raise ValueError(f"a text of {len(text.ids)} tokens does not fit into {length}")
    fill = torch.nn.functional.pad
    targets = fill(text.targets, (0, more), value=IGNORED)
    return Blanked(fill(text.ids, (0, more)), targets, fill(text.positions, (0, more)), text.prefix)
