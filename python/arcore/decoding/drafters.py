"""What proposes tokens to be verified: lookups in the text, counted n-grams, another model.

A drafter sees the texts of all rows (`Context`) and returns a chain or a tree of tokens for each (`Draft`). Draft heads
of a model are drafters too; they live with their systems.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from arcore._offers import Offers
from arcore.decoding.sampling import Sampling
from arcore.nn.checks import check_whole
from arcore.nn.kinds import check_kinds
from arcore.nn.protocols import DraftableModel

# Drafts draw from streams of their own: with the numbers of the text itself they would give away what is drawn.
_OWN_STREAM = 0x5DEECE66D


@dataclass
class Context:
    """What a drafter knows before a round.

    Attributes:
        texts: all tokens of each row, prompt included.
        seeds: int64 `[B]`, of the rows.
        round: number of the round, from 0.
        hidden: `[B, C]`, what the target model computed the last token's distribution from; None for models without,
            and in the first round for those that do not give it with the prompt.
        limits: tokens that each row can still take, at least 1.
        device: of the target model.
        states: `[B, N, C]`, the same of all tokens that were read and kept since the last round, each row's from its
            first place on; None where `hidden` is.
        kept: how many states each row has; 0 for rows that have ended.
    """

    texts: list[list[int]]
    seeds: Tensor
    round: int
    limits: list[int]
    device: torch.device
    hidden: Tensor | None = None
    states: Tensor | None = None
    kept: list[int] | None = None


@dataclass
class Draft:
    """Proposed tokens.

    Attributes:
        tokens: int64 `[B, M]`, -1 at padding.
        parents: token i follows token `parents[i] < i`, or the text for -1: `[M]` or `[B, M]`; None for a chain.
        probs: float32 `[B, M, V]`, what tokens were drawn from, as `arcore.ops.verify_tree` takes it; None when they
            were chosen.
        replacement: siblings were drawn independently.
    """

    tokens: Tensor
    parents: Tensor | None = None
    probs: Tensor | None = None
    replacement: bool = False


@runtime_checkable
class Drafter(Protocol, metaclass=Offers):
    """Proposes tokens."""

    @property
    def max_nodes(self) -> int:
        """Most tokens that it proposes at once."""
        ...

    def start(self, model: DraftableModel, batch: int, max_length: int) -> None:
        """A new run begins, of `batch` rows of up to `max_length` tokens, written by `model`."""
        ...

    def propose(self, context: Context) -> Draft:
        """Tokens that may follow the texts. M may differ from round to round, and be 0."""
        ...


@dataclass
class AboveDrafter:
    """Proposes that a row of an image repeats the row above; in the first row, that the last token repeats.

    Attributes:
        width: tokens of a row.
        count: tokens to propose.
    """

    width: int
    count: int = 8

    def __post_init__(self) -> None:
        for name in ("width", "count"):
            check_whole(name, getattr(self, name), 1)

    @property
    def max_nodes(self) -> int:
        return self.count

    def start(self, model: DraftableModel, batch: int, max_length: int) -> None:
        # The first round comes after the prompt and one token.
        self._prompts: list[int] | None = None

    def propose(self, context: Context) -> Draft:
        if self._prompts is None:
            self._prompts = [len(text) - 1 for text in context.texts]
        found = []
        for prompt, text in zip(self._prompts, context.texts, strict=True):
            full = list(text)
            for _ in range(self.count):
                above = len(full) - self.width
                full.append(full[above] if above >= prompt else full[-1])
            found.append(full[len(text) :])
        return _chain(found, context)


@dataclass
class LookupDrafter:
    """Proposes what followed the last tokens when they stood in the text before (prompt lookup).

    The longest suffix that occurred before counts, its latest occurrence first.

    Attributes:
        count: tokens to propose.
        longest: longest suffix that is looked for.
        shortest: shortest one.
    """

    count: int = 8
    longest: int = 4
    shortest: int = 1

    def __post_init__(self) -> None:
        for name in ("count", "longest", "shortest"):
            check_whole(name, getattr(self, name), 1)
        if self.shortest > self.longest:
            raise ValueError(
                "expected count >= 1 and 1 <= shortest <= longest but got "
                f"{self.count}, {self.shortest} and {self.longest}"
            )

    @property
    def max_nodes(self) -> int:
        return self.count

    def start(self, model: DraftableModel, batch: int, max_length: int) -> None:
        # Where each n-gram ended last, by row; the newest place of the suffix itself is not entered yet.
        self._places: list[dict[tuple[int, ...], int]] = [{} for _ in range(batch)]
        self._read = [0] * batch

    def propose(self, context: Context) -> Draft:
        found = []
        for row, text in enumerate(context.texts):
            places = self._places[row]
            for end in range(self._read[row] + 1, len(text)):
                for n in range(self.shortest, min(self.longest, end) + 1):
                    places[tuple(text[end - n : end])] = end
            self._read[row] = len(text) - 1
            for n in range(min(self.longest, len(text)), self.shortest - 1, -1):
                at = places.get(tuple(text[len(text) - n :]))
                if at is not None:
                    found.append(text[at : at + self.count])
                    break
            else:
                found.append([])
        return _chain(found, context)


@check_kinds
@dataclass
class NGramDrafter:
    """Proposes what most often followed the last tokens in other texts.

    Attributes:
        table: for each tuple of up to `order - 1` tokens, what followed it, the likeliest first; from `count`.
        order: tokens of an n-gram.
        count: tokens to propose.
    """

    table: dict[tuple[int, ...], list[int]]
    order: int
    count: int = 8

    @classmethod
    @check_kinds
    def fit(cls, texts: Sequence[Sequence[int]], *, order: int = 3, count: int = 8) -> NGramDrafter:
        """Count the n-grams of texts."""
        if order < 1 or count < 1:
            raise ValueError(f"expected order and count of at least 1 but got {order} and {count}")
        counts: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for text in texts:
            for i, token in enumerate(text):
                for n in range(min(order - 1, i) + 1):
                    counts[tuple(text[i - n : i])][token] += 1
        table = {key: [token for token, _ in found.most_common(16)] for key, found in counts.items()}
        return cls(table, order, count)

    @property
    def max_nodes(self) -> int:
        return self.count

    def start(self, model: DraftableModel, batch: int, max_length: int) -> None: ...

    def propose(self, context: Context) -> Draft:
        found = []
        for text in context.texts:
            tail, drafted = text[max(0, len(text) - self.order) :], []
            for _ in range(self.count):
                token = self._next(tail)
                if token is None:
                    break
                drafted.append(token)
                tail = [*tail, token][-self.order :]
            found.append(drafted)
        return _chain(found, context)

    def _next(self, tail: list[int]) -> int | None:
        for n in range(min(self.order - 1, len(tail)), -1, -1):
            found = self.table.get(tuple(tail[len(tail) - n :]))
            if found:
                return found[0]
        return None


@check_kinds
@dataclass(frozen=True)
class TreeShape:
    """A static tree of ranks: node i is the `ranks[i]`-th likeliest token after node `parents[i]`.

    Attributes:
        parents: -1 for those that follow the text; parents come before their children, depth by depth.
        ranks: from 0.
    """

    parents: tuple[int, ...]
    ranks: tuple[int, ...]

    @classmethod
    @check_kinds
    def from_paths(cls, paths: Sequence[Sequence[int]]) -> TreeShape:
        """The tree that holds these paths of ranks, as Medusa and Hydra write their trees.

        Raises:
            ValueError: a path is there whose parent is not, or there is none.
        """
        wanted = sorted({tuple(path) for path in paths}, key=lambda path: (len(path), path))
        places = {path: i for i, path in enumerate(wanted)}
        if not wanted or any(len(path) > 1 and path[:-1] not in places for path in wanted) or () in places:
            raise ValueError(
                "expected paths of ranks, each with the path that it continues, but got an orphan or none"
            )
        return cls(tuple(places.get(path[:-1], -1) for path in wanted), tuple(path[-1] for path in wanted))

    @classmethod
    def full(cls, *widths: int) -> TreeShape:
        """Every node of depth d has `widths[d]` children."""
        paths: list[tuple[int, ...]] = [()]
        every: list[tuple[int, ...]] = []
        for width in widths:
            paths = [(*path, rank) for path in paths for rank in range(width)]
            every += paths
        return cls.from_paths(every)

    @property
    def depth(self) -> int:
        """Nodes on the longest path."""
        return len(self.levels)

    @property
    def levels(self) -> list[list[int]]:
        """Nodes of each depth."""
        depth: list[int] = []
        for parent in self.parents:
            depth.append(0 if parent < 0 else depth[parent] + 1)
        return [[i for i, d in enumerate(depth) if d == level] for level in range(max(depth, default=-1) + 1)]


@check_kinds
@dataclass
class ModelDrafter:
    """Another, smaller model of the same vocabulary.

    Without `shape` it draws a chain. With a `shape` it proposes its likeliest tokens as a tree, read level by level;
    with `keep` it reads that tree and proposes the `keep` nodes that are likeliest as whole paths, others in each row
    (EAGLE-2, arXiv:2406.16858).

    Attributes:
        model: the model.
        count: tokens of a chain.
        sampling: how a chain is drawn; temperature 0 chooses the likeliest tokens.
        shape: of a tree.
        keep: nodes of a dynamic tree.
    """

    model: DraftableModel
    count: int = 4
    sampling: Sampling = field(default_factory=Sampling)
    shape: TreeShape | None = None
    keep: int | None = None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"expected count >= 1 but got {self.count}")
        if self.keep is not None and (self.shape is None or not 1 <= self.keep <= len(self.shape.parents)):
            raise ValueError(
                "expected keep of at most the nodes of a shape; give shape= with as many or more"
            )

    @property
    def max_nodes(self) -> int:
        if self.shape is None:
            return self.count
        return len(self.shape.parents) if self.keep is None else self.keep

    def start(self, model: DraftableModel, batch: int, max_length: int) -> None:
        if model.vocab_size != self.model.vocab_size:
            raise ValueError(
                f"the drafter has {self.model.vocab_size} tokens but the model {model.vocab_size}: their vocabularies "
                "must be the same"
            )
        nodes = self.count if self.shape is None else len(self.shape.parents)
        self._cache: Any = self.model.make_cache(batch, max_length + nodes + 1)
        self._read: list[list[int]] = [[] for _ in range(batch)]

    @torch.no_grad()
    def propose(self, context: Context) -> Draft:
        logits = self._catch_up(context)
        vocab = self.model.vocab_size
        if self.shape is not None:
            return self._tree(logits[:, :vocab], self.shape)
        tokens: list[Tensor] = []
        probs: list[Tensor] = []
        count = min(self.count, max(context.limits) - 1)
        own = context.seeds ^ _OWN_STREAM
        for i in range(count):
            numbers = torch.full_like(own, context.round * self.count + i)
            drawn = self.sampling.draw(logits[:, :vocab], own, numbers)
            assert isinstance(drawn, Tensor)
            tokens.append(drawn)
            if self.sampling.temperature > 0:
                probs.append(self.sampling.probs(logits[:, :vocab]))
            if i + 1 < count:
                logits = self.model.step(drawn, self._cache)
                for row, token in enumerate(drawn.tolist()):
                    self._read[row].append(token)
        if not tokens:
            return Draft(torch.empty(len(context.texts), 0, dtype=torch.int64, device=context.device))
        # What counts of a row's drafts must not depend on the others.
        limits = torch.tensor(context.limits, device=context.device).unsqueeze(1) - 1
        table = torch.stack(tokens, 1)
        table = table.masked_fill(torch.arange(count, device=context.device) >= limits, -1)
        return Draft(table, probs=torch.stack(probs, 1) if probs else None)

    def _tree(self, logits: Tensor, shape: TreeShape) -> Draft:
        batch, count = len(logits), len(shape.parents)
        tokens = torch.zeros(batch, count, dtype=torch.int64, device=logits.device)
        scores = torch.zeros(batch, count, device=logits.device)
        levels = shape.levels
        after = {-1: logits.log_softmax(-1)}
        for level, nodes in enumerate(levels):
            for parent in sorted({shape.parents[i] for i in nodes}):
                children = [i for i in nodes if shape.parents[i] == parent]
                best = after[parent].topk(max(shape.ranks[i] for i in children) + 1)
                for i in children:
                    tokens[:, i] = best.indices[:, shape.ranks[i]]
                    scores[:, i] = best.values[:, shape.ranks[i]]
                    if parent >= 0:
                        scores[:, i] += scores[:, parent]
            if level + 1 < len(levels):
                # Nodes are in order of depth, so those so far are the first ones.
                so_far = levels[level][-1] + 1
                out = self.model.extend(tokens[:, :so_far], self._cache, shape.parents[:so_far])
                for i in nodes:
                    after[i] = out.logits[:, i, : self.model.vocab_size].log_softmax(-1)
        parents = torch.tensor(shape.parents, device=logits.device)
        if self.keep is None:
            return Draft(tokens, parents)
        # A child's score is at most its parent's, and ties fall to the earlier node, so parents are kept.
        chosen = scores.sort(dim=1, descending=True, stable=True).indices[:, : self.keep].sort(1).values
        place = torch.full((batch, count + 1), -1, dtype=torch.int64, device=logits.device)
        place.scatter_(1, chosen, torch.arange(self.keep, device=logits.device).expand(batch, -1))
        kept = place.gather(1, parents.expand(batch, -1).gather(1, chosen) % (count + 1))
        return Draft(tokens.gather(1, chosen), kept)

    def _catch_up(self, context: Context) -> Tensor:
        """Read what was accepted since, forget what was not; logits after the last token."""
        same = [
            next(
                (i for i, (a, b) in enumerate(zip(read, text, strict=False)) if a != b),
                min(len(read), len(text)),
            )
            for read, text in zip(self._read, context.texts, strict=True)
        ]
        # At least the last token is read anew, for its logits.
        same = [min(n, len(text) - 1) for n, text in zip(same, context.texts, strict=True)]
        self._cache.truncate(same)
        new = [text[n:] for n, text in zip(same, context.texts, strict=True)]
        longest = max(map(len, new))
        if self._cache.length == 0:
            # The prompt, of which only the last logits are wanted.
            ids = [[0] * (longest - len(row)) + row for row in new]
            mask = [[False] * (longest - len(row)) + [True] * len(row) for row in new]
            logits = self.model.prefill(
                torch.tensor(ids, device=context.device),
                self._cache,
                torch.tensor(mask, device=context.device),
            )
        else:
            ids = [row + [0] * (longest - len(row)) for row in new]
            out = self.model.extend(torch.tensor(ids, device=context.device), self._cache)
            self._cache.commit([len(row) for row in new])
            last = torch.tensor([len(row) - 1 for row in new], device=context.device)
            logits = out.logits[torch.arange(len(new), device=context.device), last]
        self._read = [list(text) for text in context.texts]
        return logits


def _chain(found: list[list[int]], context: Context) -> Draft:
    """Chains of several lengths as one table; no longer than the texts may grow."""
    found = [row[: max(limit - 1, 0)] for row, limit in zip(found, context.limits, strict=True)]
    longest = max(map(len, found), default=0)
    table = [row + [-1] * (longest - len(row)) for row in found]
    return Draft(torch.tensor(table, dtype=torch.int64, device=context.device).view(len(found), longest))
