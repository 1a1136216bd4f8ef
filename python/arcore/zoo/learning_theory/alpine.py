"""ALPINE: what a transformer that predicts the next node can know of a graph (Wang et al., arXiv:2405.09220).

Texts are `s t s u1 ... t` and an end: source, target, and a path between them. Which node may follow u on the way to t
is decided by two tables: the edges that were seen, A[u, k], and what was seen on the way to a target, R[t, k], where k
stands on a path to t and is not its source. One attention that reads the target, and one feed-forward network that
reads the current node, hold them: logits are A[u] + R[t]. What is reachable only by joining two paths was never seen
by R, and there the model fails, whatever its size.

`run` trains a small transformer on random acyclic graphs, on a graph of your own, or on Blocksworld, whose states are
nodes and whose moves are edges; and says how many of its paths are valid, of pairs that were trained on, of new pairs
within what was observed, and of the rest.

Nearest neighbour here: `icl_gradient_descent`, the same question asked of regression.

Legend: B texts, L tokens, N nodes, V = N + 1 tokens (the last is the end), C width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore.catalog import System
from arcore.catalog.claims import Claim, at_least, equals, steps
from arcore.catalog.running import Report, check_bounds
from arcore.masks import causal
from arcore.nn import MLP, PreNormBlock, SelfAttention
from arcore.nn.kinds import check_kinds
from arcore.zoo.learning_theory._graphs import Graph, blocksworld, random_graph, read_graph

SYSTEM = System(
    name="alpine",
    title="ALPINE",
    paper="arXiv:2405.09220",
    paper_title="ALPINE: Unveiling the Planning Capability of Autoregressive Learning in Language Models",
    topic="learning_theory",
    kind="theory",
    ops=("block_sparse_attention",),
    summary="Path finding by next tokens: what a transformer learns of adjacency and reachability, and its limit.",
    claim=(
        "Weights built from adjacency and reachability find every path; trained ones find those within observed "
        "reachability and fail on pairs that need two paths joined."
    ),
    checked_on="closed form",
)


class Observed(NamedTuple):
    """What the training texts show.

    Attributes:
        edges: bool `[N, N]`, A: v follows u in some path.
        reach: bool `[N, N]`, R: k stands on a path to t and is not its source.
    """

    edges: Tensor
    reach: Tensor


class Lessons(NamedTuple):
    """A graph's pairs and the texts of training.

    Attributes:
        train, new: pairs (s, t).
        texts: int64 `[B, L]`, padded with the end.
        observed: what they show.
    """

    train: list[tuple[int, int]]
    new: list[tuple[int, int]]
    texts: Tensor
    observed: Observed


def lessons(graph: Graph, *, share: float, paths: int, seed: int) -> Lessons:
    """Split the pairs that are connected, and draw paths for those of training.

    Edges are always trained on; of the other pairs `share`, and at least one pair per target. Paths of acyclic graphs
    go to a random successor from which the target can be reached; those of others are random shortest paths.

    Raises:
        ValueError: no pair is left to test, or none to train on.
    """
    generator = torch.Generator().manual_seed(seed)
    distance = graph.distances()
    pairs = [
        (s, t) for s in range(graph.size) for t in range(graph.size) if s != t and distance[s, t] < torch.inf
    ]
    chosen = (torch.rand(len(pairs), generator=generator) < share).tolist()
    train = [pair for pair, take in zip(pairs, chosen, strict=True) if take or bool(graph.edges[pair])]
    targets = {t for _, t in train}
    for pair in pairs:
        if pair[1] not in targets:
            train.append(pair)
            targets.add(pair[1])
    new = sorted(set(pairs) - set(train))
    if not train:
        raise ValueError("the graph has no edge: there is no path to learn from")
    texts: set[tuple[int, ...]] = {(s, t, s, t) for s, t in train if bool(graph.edges[s, t])}
    for s, t in train:
        texts |= {(s, t, *graph.walk(s, t, distance, generator)) for _ in range(paths)}
    edges = torch.zeros(graph.size, graph.size, dtype=torch.bool)
    reach = torch.zeros_like(edges)
    for _, t, s, *rest in texts:
        for u, v in zip((s, *rest[:-1]), rest, strict=True):
            edges[u, v] = True
            reach[t, v] = True
    return Lessons(train, new, padded(sorted(texts), graph.size), Observed(edges, reach))


def padded(texts: Sequence[Sequence[int]], end: int) -> Tensor:
    """Texts with an end behind each, int64 `[B, L]`, filled up with further ends."""
    longest = max(map(len, texts)) + 1
    return torch.tensor([[*text, *[end] * (longest - len(text))] for text in texts])


class PathModel(nn.Module):
    """A GPT of learned positions; logits by the transposed embedding.

    Args:
        nodes: N.
        length: tokens of the longest text.
        dim: width C.
        num_layers, num_heads: of the transformer; the paper has one of each.
    """

    def __init__(
        self, nodes: int, length: int, *, dim: int = 120, num_layers: int = 1, num_heads: int = 1
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(nodes + 1, dim)
        self.positions = nn.Parameter(0.02 * torch.randn(length, dim))
        self.blocks = nn.ModuleList(
            PreNormBlock(dim, mixer=SelfAttention(dim, num_heads), mlp=MLP(dim, 4 * dim, approximate="none"))
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(dim)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits `[B, L, V]` of ids `[B, L]`."""
        x = self.embedding(ids) + self.positions[: ids.shape[1]]
        mask = causal(ids.shape[1])
        for block in self.blocks:
            x = block(x, mask=mask)
        return F.linear(self.norm(x), self.embedding.weight)


class TwoTables(nn.Module):
    """The paper's simplified transformer: attention reads the target alone, logits are `M[u] + V[t]`.

    Args:
        observed: tables that the weights are built from; None starts from zero.
        nodes: N, without tables.
        scale: of built weights.
    """

    def __init__(self, observed: Observed | None = None, *, nodes: int = 0, scale: float = 10.0) -> None:
        super().__init__()
        if observed is None:
            self.current, self.target = (nn.Parameter(torch.zeros(nodes + 1, nodes + 1)) for _ in range(2))
            return
        # A node needs both tables; the end wins where no node has both.
        tables = [F.pad(scale * table.float(), (0, 1, 0, 1)) for table in observed]
        tables[0][:, -1] = 1.5 * scale
        self.current, self.target = (nn.Parameter(table) for table in tables)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits `[B, L, V]` of ids `[B, L]`, from the third token on."""
        return self.current[ids] + self.target[ids[:, 1]].unsqueeze(1)


@torch.no_grad()
def valid(model: nn.Module, graph: Graph, pairs: Sequence[tuple[int, int]], length: int) -> Tensor:
    """Which pairs get a path from s to t whose edges all exist, by the likeliest tokens; bool `[pairs]`."""
    if not pairs:
        return torch.zeros(0, dtype=torch.bool)
    ids = write(model, pairs, length)
    rows = torch.arange(len(pairs))
    s, t, end = ids[:, 0], ids[:, 1], graph.size
    fine, here, done = ids[:, 2] == s, ids[:, 2].clone(), torch.zeros(len(pairs), dtype=torch.bool)
    for place in range(3, length):
        token = ids[:, place]
        stop = token == end
        fine &= done | torch.where(
            stop, here == t, graph.edges[here.clamp(max=end - 1), token.clamp(max=end - 1)]
        )
        here, done = torch.where(stop | done, here, token), done | stop
    assert len(rows) == len(fine)
    return fine & done


@torch.no_grad()
def write(model: nn.Module, pairs: Sequence[tuple[int, int]], length: int) -> Tensor:
    """Texts `[pairs, length]` of the likeliest tokens behind `s t s`."""
    ids = torch.tensor([(s, t, s) for s, t in pairs])
    for _ in range(length - 3):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], 1)
    return ids


def within(graph: Graph, observed: Observed, pairs: Sequence[tuple[int, int]]) -> Tensor:
    """Whether some node after s was seen on the way to t, bool `[pairs]`."""
    if not pairs:
        return torch.zeros(0, dtype=torch.bool)
    s, t = torch.tensor(pairs).T
    return (observed.edges[s] & observed.reach[t]).any(1) | observed.edges[s, t]


def fit(model: nn.Module, texts: Tensor, *, count: int, batch: int, lr: float, seed: int) -> None:
    """Train by AdamW on random texts; source and target are given, not predicted."""
    generator = torch.Generator().manual_seed(seed)
    end = int(texts.max())
    targets = texts[:, 1:].clone()
    targets[:, 0] = -100
    # Only the first end counts.
    targets[:, 1:][(texts[:, 1:-1] == end) & (texts[:, 2:] == end)] = -100
    targets[:, 1] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=count, pct_start=0.1)
    for _ in steps(count, "training on paths"):
        rows = torch.randint(len(texts), (batch,), generator=generator)
        logits = model(texts[rows, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), targets[rows].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()


@check_kinds
@dataclass(frozen=True, kw_only=True)
class Options:
    """A transformer trained on paths of a graph.

    Attributes:
        graph: random; blocksworld; or a file: one edge `from to` a line, or .gml or .graphml.
        nodes: of a random graph.
        density: probability of each edge of a random graph.
        problem: PDDL problem of blocksworld. Default: the first of four blocks in the package pddlgym.
        share: of the pairs that are no edge, the share trained on.
        paths: drawn per pair.
        dim: width C of the transformer.
        layers: of the transformer.
        heads: of its attention.
        steps: training steps.
        batch: texts per step.
        lr: peak learning rate.
        seed: decides graph, paths and weights.
    """

    graph: str = "random"
    nodes: int = 40
    density: float = 0.12
    problem: Path | None = None
    share: float = 0.5
    paths: int = 20
    dim: int = 80
    layers: int = 1
    heads: int = 1
    steps: int = 1500
    batch: int = 256
    lr: float = 3e-3
    seed: int = 0

    def __post_init__(self) -> None:
        check_bounds(self, above={"lr": 0})
        for name in ("nodes", "paths", "dim", "layers", "heads", "steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1 but got {getattr(self, name)}")
        for name in ("density", "share"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"--{name} must lie between 0 and 1 but got {getattr(self, name)}")
        if self.dim % self.heads:
            raise ValueError(f"--heads must divide --dim but got {self.heads} and {self.dim}")
        if self.problem is not None and self.graph != "blocksworld":
            raise ValueError("--problem is for --graph blocksworld")


@dataclass(frozen=True)
class Found:
    """Shares of valid paths, and how many pairs they are of.

    Attributes:
        train: of pairs trained on.
        observed: of new pairs with a node that was seen on the way to the target.
        unobserved: of the other new pairs.
        counts: pairs of the three kinds.
        example: a text of a new pair by the model, for people.
    """

    train: float
    observed: float
    unobserved: float
    counts: tuple[int, int, int]
    example: str


def learn(options: Options) -> tuple[Found, Graph, Lessons]:
    """Train on a graph and count valid paths."""
    torch.manual_seed(options.seed)
    if options.graph == "random":
        graph = random_graph(options.nodes, options.density, options.seed)
    elif options.graph == "blocksworld":
        graph = blocksworld(options.problem)
    else:
        graph = read_graph(Path(options.graph))
    known = lessons(graph, share=options.share, paths=options.paths, seed=options.seed)
    length = max(known.texts.shape[1], graph.size + 4 if graph.acyclic else known.texts.shape[1] + 4)
    model = PathModel(graph.size, length, dim=options.dim, num_layers=options.layers, num_heads=options.heads)
    fit(model, known.texts, count=options.steps, batch=options.batch, lr=options.lr, seed=options.seed)
    inside = within(graph, known.observed, known.new)
    groups = [
        known.train,
        [pair for pair, yes in zip(known.new, inside.tolist(), strict=True) if yes],
        [pair for pair, yes in zip(known.new, inside.tolist(), strict=True) if not yes],
    ]
    shares = [float(valid(model, graph, pairs, length).float().mean()) for pairs in groups]
    show = graph.asked or (known.new or known.train)[-1]
    text = write(model, [show], length)[0].tolist()
    nodes = text[2 : text.index(graph.size)] if graph.size in text else text[2:]
    return (
        Found(*shares, tuple(map(len, groups)), " -> ".join(graph.names[node] for node in nodes)),  # type: ignore[arg-type, call-arg]
        graph,
        known,
    )


def _figure(found: Found) -> Any:
    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        kinds = ("trained", "new, observed", "new, not observed")
        bars = axes.bar(
            kinds,
            [0 if share != share else share for share in (found.train, found.observed, found.unobserved)],
        )
        axes.bar_label(bars, [f"n = {count}" for count in found.counts])
        axes.set(ylabel="share of valid paths", ylim=(0, 1.1))

    return draw


def run(options: Options) -> Report:
    """Valid paths by kind of pair."""
    found, graph, known = learn(options)
    lines = [
        f"{graph.size} nodes, {int(graph.edges.sum())} edges, {len(known.texts)} texts",
        *(
            f"{name:<38}{share:6.3f}  ({count} pairs)"
            for name, share, count in zip(
                ("pairs trained on", "new pairs within observed reachability", "other new pairs"),
                (found.train, found.observed, found.unobserved),
                found.counts,
                strict=True,
            )
            if count
        ),
        f"{'the problem, solved by the model' if graph.asked else 'a path by the model'}: {found.example}",
    ]
    values = {
        "train": found.train,
        "observed": found.observed if found.counts[1] else None,
        "unobserved": found.unobserved if found.counts[2] else None,
        "pairs": list(found.counts),
        "path": found.example,
    }
    return Report("\n".join(lines), values, _figure(found))


def _tables_learned(seed: int) -> tuple[float, Graph, TwoTables]:
    """Of the simplified transformer after training: least of an observed entry of M less the largest of another."""
    graph = random_graph(12, 0.3, seed)
    known = lessons(graph, share=0.5, paths=20, seed=seed)
    model = TwoTables(nodes=graph.size)
    fit(model, known.texts, count=400, batch=len(known.texts), lr=0.1, seed=seed)
    current = model.current.detach()[:-1, :-1]
    # Rows of nodes from which no path went on were never trained.
    rows = known.observed.edges.any(1)
    seen = known.observed.edges[rows]
    lowest = torch.where(seen, current[rows], torch.inf).amin(1)
    highest = torch.where(seen, -torch.inf, current[rows]).amax(1)
    return float((lowest - highest).min()), graph, model


def claim(*, quick: bool) -> Claim:
    """Weights built from both tables; in full, a trained transformer on three kinds of pairs, and Blocksworld."""
    graph = random_graph(20 if quick else 100, 0.15 if quick else 0.1, 0)
    pairs = [
        (s, t)
        for s in range(graph.size)
        for t in range(graph.size)
        if s != t and graph.distances()[s, t] < torch.inf
    ]
    complete = Observed(graph.edges, (graph.distances() < torch.inf).T.clone())
    built = valid(TwoTables(complete), graph, pairs, graph.size + 4)
    known = lessons(graph, share=0.3, paths=2, seed=0)
    partly = valid(TwoTables(known.observed), graph, known.new, graph.size + 4)
    outside = ~within(graph, known.observed, known.new)
    margin, _, _ = _tables_learned(0)
    rows = [
        equals("valid paths by weights built from complete reachability, share", built.float().mean(), 1.0),
        equals("valid paths by weights built from observed reachability, of pairs outside it",
               int(partly[outside].sum()), 0),
        at_least("trained table of edges: least of an observed one less the largest of another", margin, 0.0),
    ]  # fmt: skip
    if quick:
        share = float(partly[~outside].float().mean()) if bool((~outside).any()) else 0.0
        empty = Found(1.0, share, 0.0, (len(known.train), int((~outside).sum()), int(outside.sum())), "")
        return Claim(tuple(rows), draw=_figure(empty))
    found, _, _ = learn(Options())
    rows += [
        at_least("valid paths of trained pairs", found.train, 0.97),
        at_least("of new pairs within observed reachability", found.observed, 0.9),
        at_least("the same less that of other new pairs", found.observed - found.unobserved, 0.2),
    ]
    return Claim(tuple(rows), draw=_figure(found))
