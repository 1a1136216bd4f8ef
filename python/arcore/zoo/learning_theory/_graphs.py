"""Directed graphs for path finding: random ones, files, and the states of Blocksworld."""

from __future__ import annotations

import importlib.util
import itertools
import re
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from arcore._files import read_lines, read_text
from arcore._optional import require


@dataclass(frozen=True)
class Graph:
    """A directed graph.

    Attributes:
        edges: bool `[N, N]`.
        names: of the nodes, for people.
        acyclic: whether it has no cycle; paths of others are shortest ones.
        asked: a pair (s, t) that a problem asks for, or None.
    """

    edges: Tensor
    names: tuple[str, ...]
    acyclic: bool = True
    asked: tuple[int, int] | None = None

    @property
    def size(self) -> int:
        """Nodes N."""
        return len(self.edges)

    def distances(self) -> Tensor:
        """Edges of the shortest path between each two nodes, float32 `[N, N]`, inf where there is none."""
        found = torch.full((self.size, self.size), torch.inf)
        found.fill_diagonal_(0.0)
        front, step = torch.eye(self.size, dtype=torch.bool), 0
        while bool(front.any()):
            step += 1
            front = (front.float() @ self.edges.float() > 0) & found.isinf()
            found[front] = step
        return found

    def walk(self, s: int, t: int, distance: Tensor, generator: torch.Generator) -> tuple[int, ...]:
        """A random path from s to t; on graphs with cycles a random shortest one."""
        path = [s]
        while path[-1] != t:
            here = path[-1]
            onward = distance[:, t] < torch.inf if self.acyclic else distance[:, t] == distance[here, t] - 1
            options = (self.edges[here] & onward).nonzero().flatten()
            path.append(int(options[torch.randint(len(options), (), generator=generator)]))
        return tuple(path)


def random_graph(nodes: int, density: float, seed: int) -> Graph:
    """Edges from each node to each later one with a probability."""
    generator = torch.Generator().manual_seed(seed)
    edges = (torch.rand(nodes, nodes, generator=generator) < density).triu(1)
    return Graph(edges, tuple(map(str, range(nodes))))


def read_graph(path: Path) -> Graph:
    """An acyclic graph of a file: `.gml`, `.graphml`, or text with an edge `from to` a line (# starts a remark).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is no edge, the file is damaged, or the graph has a cycle; the message names file and line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--graph {path}: expected random, blocksworld or an existing file of edges")
    if path.suffix in (".gml", ".graphml"):
        networkx = require("networkx", extra="zoo")
        try:
            loaded = (networkx.read_gml if path.suffix == ".gml" else networkx.read_graphml)(path)
        except Exception as error:
            raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
        if not loaded.is_directed():
            raise ValueError(f"{path}: the graph is undirected; paths need directed edges")
        pairs = [(str(u), str(v), 0) for u, v in loaded.edges()]
    else:
        pairs = []
        for number, line in read_lines(path):
            words = line.partition("#")[0].split()
            if words and len(words) != 2:
                raise ValueError(
                    f"{path}:{number}: expected an edge as two names, from and to, but got {line!r}"
                )
            if words:
                pairs.append((words[0], words[1], number))
    if not pairs:
        raise ValueError(f"{path} holds no edge")
    names = sorted({name for u, v, _ in pairs for name in (u, v)}, key=lambda name: (len(name), name))
    place = {name: i for i, name in enumerate(names)}
    edges = torch.zeros(len(names), len(names), dtype=torch.bool)
    for u, v, _ in pairs:
        edges[place[u], place[v]] = True
    if cycle := _cycle(edges):
        around = [names[node] for node in cycle]
        number = next(line for u, v, line in pairs if (u, v) == (around[0], around[1 % len(around)]))
        where = f"{path}:{number}" if number else str(path)
        raise ValueError(
            f"{where}: the graph is not acyclic: {' -> '.join([*around, around[0]])}; remove one of these edges"
        )
    return Graph(edges, tuple(names))


def _cycle(edges: Tensor) -> list[int]:
    """Nodes of some cycle in order, or nothing."""
    left = edges.clone()
    alive = torch.ones(len(edges), dtype=torch.bool)
    while bool(alive.any()):
        sinks = alive & ~(left & alive).any(1)
        if not bool(sinks.any()):
            break
        alive &= ~sinks
    if not bool(alive.any()):
        return []
    # Every node that is left has a successor that is left.
    seen: list[int] = [int(alive.nonzero()[0])]
    while True:
        step = int((edges[seen[-1]] & alive).nonzero()[0])
        if step in seen:
            return seen[seen.index(step) :]
        seen.append(step)


State = frozenset[tuple[str, ...]]


def blocksworld(problem: Path | None = None) -> Graph:
    """All arrangements of a problem's blocks in towers, and the moves of one block between them.

    Args:
        problem: PDDL file; None takes the first problem of four blocks in the package pddlgym.

    Returns:
        A graph with `asked`: the initial state, and the nearest one that satisfies the goal.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: the package is missing.
        ValueError: the file is no problem of Blocksworld, or has more than five blocks.
    """
    path = _packaged_problem() if problem is None else problem
    if not path.is_file():
        raise FileNotFoundError(f"--problem {path} does not exist")
    blocks, start, goal = _read_problem(path)
    if len(blocks) > 5:
        raise ValueError(
            f"{path}: {len(blocks)} blocks have too many arrangements for one token each; give at most 5"
        )
    first = _state(start, blocks, path)
    states, place, front = [first], {first: 0}, deque([first])
    arcs = []
    while front:
        here = front.popleft()
        for there in _moves(here):
            if there not in place:
                place[there] = len(states)
                states.append(there)
                front.append(there)
            arcs.append((place[here], place[there]))
    edges = torch.zeros(len(states), len(states), dtype=torch.bool)
    edges[tuple(torch.tensor(arcs).T)] = True
    # Breadth first, so the first state that fits the goal is a nearest one.
    wanted = next((i for i, state in enumerate(states) if i and _holds(state, goal)), None)
    if wanted is None:
        raise ValueError(f"{path}: no arrangement of the blocks other than the first satisfies the goal")
    names = tuple(" ".join("/".join(tower) for tower in sorted(state)) for state in states)
    return Graph(edges, names, acyclic=False, asked=(0, wanted))


def _packaged_problem() -> Path:
    spec = importlib.util.find_spec("pddlgym")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            "this needs the package 'pddlgym', which is not installed: run `pip install --no-deps pddlgym`, or give "
            "--problem FILE",
            name="pddlgym",
        )
    folder = Path(next(iter(spec.submodule_search_locations))) / "pddl"
    for path in sorted(folder.glob("blocks*/*.pddl")):
        if len(_read_problem(path)[0]) == 4:
            return path
    raise FileNotFoundError(f"{folder} holds no Blocksworld problem of four blocks")


def _read_problem(path: Path) -> tuple[list[str], list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Blocks, facts at the start, and facts of the goal."""
    text = re.sub(r";.*", "", read_text(path)).lower()
    parts = {name: text.find(f"(:{name}") for name in ("objects", "init", "goal")}
    if min(parts.values()) < 0:
        raise ValueError(f"{path}: expected a PDDL problem with :objects, :init and :goal")
    objects = re.search(r"\(:objects([^)]*)\)", text)
    assert objects is not None
    words = re.sub(r"-\s*\w+", " ", objects[1]).split()
    ends = sorted([*parts.values(), len(text)])
    facts = {}
    for name in ("init", "goal"):
        section = text[parts[name] : ends[ends.index(parts[name]) + 1]]
        found = re.findall(r"\((on|ontable|on-table|clear|holding)\s+([^()]*)\)", section)
        facts[name] = [(kind, *(word.partition(":")[0] for word in rest.split())) for kind, rest in found]
    blocks_of = {"on": 2, "ontable": 1, "on-table": 1, "clear": 1, "holding": 1}
    for kind, *named in (*facts["init"], *facts["goal"]):
        if len(named) != blocks_of[kind]:
            raise ValueError(
                f"{path}: expected {blocks_of[kind]} of the blocks in a fact ({kind} ...) but got "
                f"({' '.join([kind, *named])})"
            )
    blocks = sorted(
        {word.partition(":")[0] for word in words} & {block for fact in facts["init"] for block in fact[1:]}
    )
    if not blocks:
        raise ValueError(
            f"{path}: its facts (on, ontable, clear) name none of its objects: it is no Blocksworld problem"
        )
    return blocks, facts["init"], facts["goal"]


def _state(facts: list[tuple[str, ...]], blocks: list[str], path: Path) -> State:
    """Towers, each from the bottom up."""
    above = {fact[2]: fact[1] for fact in facts if fact[0] == "on"}
    towers = []
    for bottom in (fact[1] for fact in facts if fact[0] in ("ontable", "on-table")):
        tower = [bottom]
        # A block that stands on itself, over others, would go on for ever.
        while tower[-1] in above and len(tower) <= len(blocks):
            tower.append(above[tower[-1]])
        towers.append(tuple(tower))
    if sorted(itertools.chain(*towers)) != blocks:
        raise ValueError(f"{path}: its :init does not put every block into one place")
    return frozenset(towers)


def _moves(state: State) -> list[State]:
    """States after the top block of a tower was put on the table or on another tower."""
    found = []
    for tower in state:
        rest = state - {tower}
        left = {tower[:-1]} if len(tower) > 1 else set()
        if left:
            found.append(frozenset({*rest, *left, tower[-1:]}))
        for other in rest:
            found.append(frozenset({*(rest - {other}), *left, (*other, tower[-1])}))
    return sorted(found, key=sorted)


def _holds(state: State, goal: list[tuple[str, ...]]) -> bool:
    true = {("ontable", tower[0]) for tower in state} | {("clear", tower[-1]) for tower in state}
    on = {("on", b, a) for tower in state for a, b in itertools.pairwise(tower)}
    return all((fact if fact[0] != "on-table" else ("ontable", fact[1])) in true | on for fact in goal)
