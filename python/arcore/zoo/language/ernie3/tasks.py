"""Texts, triples, and the five tasks made of them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from arcore._files import read_lines
from arcore.data.text import load_text

CLS, SEP, MASK, RELATION = 256, 257, 258, 260
VOCAB = 288
IGNORED = -100
# Triples of a relation beyond which it is not drawn oftener.
MOST = 120
# Orders of up to three pieces: 1 + 2 + 6.
ORDERS = [order for count in (1, 2, 3) for order in itertools.permutations(range(count))]

# What is read as a triple in English such as the Bible's.
PATTERNS = {
    "begat": r"\b([A-Z]\w+) begat ([A-Z]\w+)",
    "son of": r"\b([A-Z]\w+),? the son of ([A-Z]\w+)",
    "daughter of": r"\b([A-Z]\w+),? the daughter of ([A-Z]\w+)",
    "wife of": r"\b([A-Z]\w+),? (?:the )?wife of ([A-Z]\w+)",
    "brother of": r"\b([A-Z]\w+),? (?:the )?brother of ([A-Z]\w+)",
    "father of": r"\b([A-Z]\w+),? the father of ([A-Z]\w+)",
    "king of": r"\b([A-Z]\w+),? (?:the )?king of ([A-Z]\w+)",
}


@dataclass(frozen=True)
class Triple:
    """A piece of knowledge and a sentence that says it.

    Attributes:
        head, relation, tail: the knowledge.
        text: the sentence.
    """

    head: str
    relation: str
    tail: str
    text: str


def find_triples(text: str) -> list[Triple]:
    """Triples that the patterns find, each with its sentence or what of it is near."""
    found = []
    for relation, pattern in PATTERNS.items():
        for match in re.finditer(pattern, text):
            start = max(text.rfind(".", 0, match.start()) + 1, match.start() - 40)
            stop = text.find(".", match.end())
            stop = min(stop if stop >= 0 else len(text), match.end() + 30)
            found.append(Triple(match[1], relation, match[2], " ".join(text[start:stop].split())))
    return found


def read_triples(path: Path, text: str) -> list[Triple]:
    """Triples of a table: head, relation, tail with tabs between them, and a sentence as fourth column if there is one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is no triple or no UTF-8, or there are more relations than tokens for them; names file and
            line.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"--kg {path} does not exist: give a table of head, relation, tail with tabs between them"
        )
    found = []
    relations: set[str] = set()
    for number, line in read_lines(path):
        if not line.strip() or line.startswith("#"):
            continue
        parts = [part.strip() for part in line.split("\t")]
        if len(parts) not in (3, 4) or not all(parts):
            raise ValueError(
                f"{path}:{number}: expected head, relation and tail with tabs between them but got {line!r}"
            )
        relations.add(parts[1])
        if len(relations) > VOCAB - RELATION:
            raise ValueError(
                f"{path}:{number}: {parts[1]!r} is one relation more than the {VOCAB - RELATION} that there may be"
            )
        sentence = parts[3] if len(parts) == 4 else _sentence(text, parts[0], parts[2])
        found.append(Triple(parts[0], parts[1], parts[2], sentence))
    if not found:
        raise ValueError(f"{path} holds no triple")
    return found


def _sentence(text: str, head: str, tail: str) -> str:
    """The first sentence of a text with both names, or none."""
    match = re.search(rf"[^.]*\b{re.escape(head)}\b[^.]*\b{re.escape(tail)}\b[^.]*", text)
    return " ".join(match[0].split())[:120] if match else ""


def with_names(triple: Triple, head: str, tail: str) -> Triple:
    """The same relation of other names, exchanged in the triple and as whole words in its sentence."""
    names = {triple.tail: tail, triple.head: head}
    pattern = "|".join(rf"(?<!\w){re.escape(name)}(?!\w)" for name in sorted(names, key=len, reverse=True))
    text = re.sub(pattern, lambda match: names[match[0]], triple.text)
    return Triple(names[triple.head], triple.relation, names[triple.tail], text)


class Lesson(NamedTuple):
    """Rows of one task.

    Attributes:
        ids: int64 `[B, L]`.
        targets: int64 `[B, L]` of tokens, or `[B]` of classes; `IGNORED` where nothing is predicted.
        before: int64 `[B, L]`, the segment before, of documents; or None.
    """

    ids: Tensor
    targets: Tensor
    before: Tensor | None = None


class Material:
    """A text and triples, from which lessons are drawn.

    Args:
        text: English.
        triples: knowledge.
        length: tokens L of a row.
        seed: decides all draws.
        rename: share of the triples with a sentence that are drawn under other names (`with_names`), so that what is
            learnt is how a sentence says a relation, and not who stood in it.

    Attributes:
        relations: names, in the order of their tokens from `RELATION` on.

    Raises:
        ValueError: the text is too short, or there are too many relations.
    """

    def __init__(
        self, text: str, triples: Sequence[Triple], length: int, seed: int, rename: float = 0.0
    ) -> None:
        self.bytes = torch.tensor(list(text.encode("ascii", errors="replace")), dtype=torch.uint8)
        if len(self.bytes) < 8 * length:
            raise ValueError(
                f"a text of {len(self.bytes)} bytes is too short for rows of {length}: give more text"
            )
        self.words = [
            match.span() for match in re.finditer(r"\w+", text.encode("ascii", errors="replace").decode())
        ]
        self.relations = sorted({triple.relation for triple in triples})
        if len(self.relations) > VOCAB - RELATION:
            raise ValueError(f"{len(self.relations)} relations are too many: at most {VOCAB - RELATION}")
        self.triples, self.length, self.rename = list(triples), length, rename
        self.by_relation = [[one for one in triples if one.relation == name] for name in self.relations]
        self.names = sorted({name for one in triples for name in (one.head, one.tail)})
        self.generator = torch.Generator().manual_seed(seed)

    def _below(self, limit: int) -> int:
        return int(torch.randint(max(limit, 1), (), generator=self.generator))

    def _pieces(self, count: int, length: int) -> Tensor:
        starts = torch.randint(len(self.bytes) - length, (count, 1), generator=self.generator)
        return self.bytes[starts + torch.arange(length)].long()

    def hidden_words(self, count: int) -> Lesson:
        """Pieces of text in which about 15 % of the bytes are hidden, as whole words and runs of up to three."""
        ids = torch.full((count, self.length), CLS)
        targets = torch.full_like(ids, IGNORED)
        for row in range(count):
            first = self._below(len(self.words) - self.length)
            start = self.words[first][0]
            piece = self.bytes[start : start + self.length - 1].long()
            ids[row, 1 : 1 + len(piece)] = piece
            spans = []
            while first < len(self.words) and self.words[first][1] - start < self.length - 1:
                spans.append((self.words[first][0] - start + 1, self.words[first][1] - start + 1))
                first += 1
            budget = round(0.15 * self.length)
            for _ in range(20):
                if budget <= 0 or not spans:
                    break
                place, run = self._below(len(spans)), 1 + self._below(3)
                chosen = spans[place : place + run]
                begin, end = chosen[0][0], chosen[-1][1]
                if bool((targets[row, begin:end] != IGNORED).any()) or end - begin > 2 * budget + 4:
                    continue
                targets[row, begin:end] = ids[row, begin:end]
                budget -= end - begin
        return Lesson(torch.where(targets == IGNORED, ids, MASK), targets)

    def documents(self, count: int) -> Lesson:
        """Pieces and the tokens that follow each of theirs, with the segment before."""
        pieces = self._pieces(count, 2 * self.length + 1)
        middle = self.length
        return Lesson(pieces[:, middle:-1], pieces[:, middle + 1 :], pieces[:, :middle])

    def orders(self, count: int) -> Lesson:
        """Pieces cut into up to three, shuffled; the class is the permutation."""
        size = (self.length - 4) // 3
        pieces = self._pieces(count, 3 * size)
        ids = torch.full((count, self.length), SEP)
        ids[:, 0] = CLS
        targets = torch.randint(len(ORDERS), (count,), generator=self.generator)
        for row, kind in enumerate(targets.tolist()):
            order = ORDERS[kind]
            width = 3 * size // len(order)
            at = 1
            for part in order:
                ids[row, at : at + width] = pieces[row, part * width : (part + 1) * width]
                at += width + 1
        return Lesson(ids, targets)

    def distances(self, count: int) -> Lesson:
        """Two pieces: neighbours (0), of one neighbourhood (1), or from anywhere (2)."""
        size = (self.length - 3) // 2
        targets = torch.randint(3, (count,), generator=self.generator)
        near = self._pieces(count, 10 * size)
        second = torch.where((targets == 0).unsqueeze(1), near[:, size : 2 * size], near[:, 9 * size :])
        second = torch.where((targets == 2).unsqueeze(1), self._pieces(count, size), second)
        ids = torch.full((count, self.length), SEP)
        ids[:, 0] = CLS
        ids[:, 1 : 1 + size], ids[:, 2 + size : 2 + 2 * size] = near[:, :size], second
        return Lesson(ids, targets)

    def knowledge(self, triples: Sequence[Triple], *, words: bool = False, text: bool = True) -> Lesson:
        """Triples before their sentences, with the relation hidden, or words of the sentence.

        Args:
            triples: which.
            words: hide words of the sentence and not the relation.
            text: give the sentence.
        """
        ids = torch.full((len(triples), self.length), SEP)
        targets = torch.full_like(ids, IGNORED)
        for row, triple in enumerate(triples):
            number = RELATION + self.relations.index(triple.relation)
            head, tail = (
                list(part.encode("ascii", errors="replace"))[:16] for part in (triple.head, triple.tail)
            )
            sentence = list(triple.text.encode("ascii", errors="replace")) if text else []
            tokens = [CLS, *head, SEP, MASK, SEP, *tail, SEP, *sentence][: self.length]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            place = len(head) + 2
            if not words:
                targets[row, place] = number
                continue
            ids[row, place] = number
            start = len(head) + len(tail) + 5
            spans = [match.span() for match in re.finditer(r"\w+", triple.text)]
            spans = [(a + start, b + start) for a, b in spans if b + start <= self.length]
            if spans:
                a, b = spans[self._below(len(spans))]
                targets[row, a:b] = ids[row, a:b]
                ids[row, a:b] = MASK
        return Lesson(ids, targets)

    def pick(self, count: int, *, text: bool = True) -> list[Triple]:
        """Triples at random, of no relation as if there were more than `MOST`; some renamed where `text` is given."""
        shares = torch.tensor([float(min(len(group), MOST)) for group in self.by_relation])
        picked = []
        for which in torch.multinomial(shares, count, replacement=True, generator=self.generator).tolist():
            one = self.by_relation[which][self._below(len(self.by_relation[which]))]
            if text and one.text and float(torch.rand((), generator=self.generator)) < self.rename:
                head, tail = (self.names[self._below(len(self.names))] for _ in range(2))
                one = with_names(one, head, tail)
            picked.append(one)
        return picked

    def draw(self, task: str, count: int) -> Lesson:
        """Rows of a task: words, document, order, distance or knowledge."""
        if task == "knowledge":
            return self.knowledge(self.pick(count), words=self._below(2) == 1)
        makers = {
            "words": self.hidden_words,
            "document": self.documents,
            "order": self.orders,
            "distance": self.distances,
        }
        return makers[task](count)


TASKS = ("words", "document", "order", "distance", "knowledge")


def text_of(source: str) -> tuple[str, str]:
    """Text to train on and text that is held out, as for language models."""
    text = load_text(source)
    return text.train, text.test
