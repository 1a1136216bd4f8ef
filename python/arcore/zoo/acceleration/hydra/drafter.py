"""What the heads propose: static trees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from arcore.decoding import Context, Draft, TreeShape
from arcore.nn.kinds import check_kinds
from arcore.zoo.acceleration.hydra.heads import HydraHeads

# Widths 10, 28, 23 and 2 over four depths, 63 nodes: the shape of the published tree for 7 B models, by rank products.
DEPTH_WIDTHS = (10, 28, 23, 2)


def published_shape(widths: Sequence[int] = DEPTH_WIDTHS) -> TreeShape:
    """A tree with so many nodes per depth: of all paths whose parent is there, those whose ranks are likeliest to hit.

    A rank's chance falls like 1 / (rank + 1)^2, which orders paths as counted acceptances do.
    """
    frontier: list[tuple[int, ...]] = [()]
    paths: list[tuple[int, ...]] = []
    for width in widths:
        options = [(*path, rank) for path in frontier for rank in range(10)]
        options.sort(key=lambda path: (_cost(path), path))
        frontier = options[:width]
        paths += frontier
    return TreeShape.from_paths(paths)


def _cost(path: Sequence[int]) -> int:
    cost = 1
    for rank in path:
        cost *= (rank + 1) ** 2
    return cost


class HydraDrafter:
    """Proposes a static tree from the heads; a `Drafter` of `arcore.decoding`.

    Args:
        heads: the heads.
        shape: of the tree, no deeper than there are heads; the published one, cut to their number, when None.
        base: the model that the heads were trained for, where the one that is decoded is a mix with others.

    Raises:
        ValueError: the tree is deeper than there are heads.
    """

    @check_kinds
    def __init__(self, heads: HydraHeads, shape: TreeShape | None = None, *, base: Any = None) -> None:
        count = heads.config.num_heads
        self.heads = heads
        self.shape = published_shape(DEPTH_WIDTHS[:count]) if shape is None else shape
        if self.shape.depth > count:
            raise ValueError(
                f"the tree is {self.shape.depth} tokens deep but there are {count} heads; give a tree of their depth"
            )
        self.model: Any = base
        self._given = base

    @property
    def max_nodes(self) -> int:
        return len(self.shape.parents)

    def start(self, model: Any, batch: int, max_length: int) -> None:
        self.model = model if self._given is None else self._given
        self.heads.check(self.model)
        self._last_layer = self.heads.last_layer(self.model) if self.heads.lm_heads is None else None
        prefix = self.heads.prefix
        self._cache = None if prefix is None else prefix.make_cache(batch, max_length + self.max_nodes + 1)
        self._plan = _plan(self.shape, self.heads.config.kind == "medusa", self.model.embedding.weight.device)

    @torch.no_grad()
    def propose(self, context: Context) -> Draft:
        batch = len(context.texts)
        hidden = context.hidden if self._cache is None else self._prefixed(context)
        if hidden is None:
            return Draft(torch.empty(batch, 0, dtype=torch.int64, device=context.device))
        tokens = torch.zeros(batch, len(self.shape.parents), dtype=torch.int64, device=context.device)
        last = torch.tensor([text[-1] for text in context.texts], device=context.device)
        # The embeddings on the path to each node of the level before, at first to the text's end: [B, nodes, depth, C].
        paths = self.model.embedding(last).unsqueeze(1).unsqueeze(1)
        for depth, level in enumerate(self._plan):
            asked = paths[:, level.asked]
            state = hidden.unsqueeze(1).expand(-1, asked.shape[1], -1)
            best = (
                self.heads.head(depth, state, asked, self.model, self._last_layer).topk(level.widest).indices
            )
            if self.heads.draft_tokens is not None:
                best = self.heads.draft_tokens[best]
            new = best[:, level.rows, level.ranks]
            tokens[:, level.nodes] = new
            if depth + 1 < len(self._plan):
                embedded = self.model.embedding(new).unsqueeze(2)
                paths = torch.cat([paths[:, level.parents], embedded], dim=2)
        return Draft(tokens, torch.tensor(self.shape.parents, device=context.device))

    def _prefixed(self, context: Context) -> Tensor:
        """What the prefix layer makes of the last token that the model has read, `[B, C]`."""
        assert self.heads.prefix is not None
        assert self._cache is not None
        states, kept = context.states, context.kept
        if states is None or kept is None:
            # A mix of models does not give the states of its prompt; the model that heads were trained for reads it.
            kept = [len(text) - 1 for text in context.texts]
            ids = [text[:-1] + [0] * (max(kept) - n) for text, n in zip(context.texts, kept, strict=True)]
            states = self.model.hidden(torch.tensor(ids, device=context.device))
        assert states is not None
        out = self.heads.prefix(states, self._cache)
        self._cache.commit(kept)
        places = [max(n - 1, 0) for n in kept]
        found: Tensor = out[torch.arange(len(places), device=out.device), places]
        return found


class _Level(NamedTuple):
    """Where the nodes of a depth stand, as indices.

    Attributes:
        nodes: in the tree.
        parents: of each node, in the level before.
        asked: nodes of the level before whose children a head is asked for.
        rows: of each node, which of `asked` is its parent.
        ranks: of each node.
        widest: most children that are looked at.
    """

    nodes: Tensor
    parents: Tensor
    asked: Tensor
    rows: Tensor
    ranks: Tensor
    widest: int


def _plan(shape: TreeShape, medusa: bool, device: torch.device) -> list[_Level]:
    """The levels of a tree; Medusa's heads say the same whatever the path is and are asked once per level."""
    plan, before = [], [-1]
    for nodes in shape.levels:
        parents = [before.index(shape.parents[i]) for i in nodes]
        asked = [0] if medusa else sorted(set(parents))
        rows = [0 if medusa else asked.index(parent) for parent in parents]
        ranks = [shape.ranks[i] for i in nodes]
        tables = [torch.tensor(x, device=device) for x in (nodes, parents, asked, rows, ranks)]
        plan.append(_Level._make([*tables, max(ranks) + 1]))
        before = nodes
    return plan
