"""Built weights, what was observed, graphs of files and of Blocksworld, and `arcore run`."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from arcore.cli import main
from arcore.zoo.learning_theory._graphs import blocksworld, random_graph, read_graph
from arcore.zoo.learning_theory.alpine import (
    Observed,
    Options,
    PathModel,
    TwoTables,
    _tables_learned,
    lessons,
    valid,
    within,
    write,
)

PROBLEM = """
(define (problem two) (:domain blocks)
  (:objects a b c - block)  ; three
  (:init (clear c) (on c a) (ontable a) (ontable b) (clear b) (handempty))
  (:goal (and (on a b) (on b c))))
"""


def test_distances_are_networkxs():
    networkx = pytest.importorskip("networkx")
    graph = random_graph(15, 0.2, 3)
    theirs = networkx.DiGraph(graph.edges.nonzero().tolist())
    theirs.add_nodes_from(range(15))
    found = graph.distances()
    lengths = dict(networkx.all_pairs_shortest_path_length(theirs))
    for s, t in itertools.product(range(15), repeat=2):
        assert found[s, t] == lengths[s].get(t, torch.inf)


def test_walks_end_at_the_target_on_edges():
    graph = random_graph(20, 0.4, 1)
    distance, generator = graph.distances(), torch.Generator().manual_seed(0)
    s, t = (
        (distance.masked_fill(distance.isinf(), -1) == distance[distance < torch.inf].max())
        .nonzero()[0]
        .tolist()
    )
    walks = {graph.walk(s, t, distance, generator) for _ in range(30)}
    assert len(walks) > 1
    for walk in walks:
        assert (walk[0], walk[-1]) == (s, t)
        assert all(graph.edges[u, v] for u, v in itertools.pairwise(walk))


def test_what_texts_show():
    graph = random_graph(12, 0.3, 0)
    known = lessons(graph, share=0.5, paths=5, seed=0)
    edges, reach = set(), set()
    for text in known.texts.tolist():
        s, t, *path = text[: text.index(12)]
        assert path[0] == s
        assert path[-1] == t
        edges |= set(itertools.pairwise(path))
        reach |= {(t, k) for k in path[1:]}
    assert set(map(tuple, known.observed.edges.nonzero().tolist())) == edges
    assert set(map(tuple, known.observed.reach.nonzero().tolist())) == reach
    assert not set(known.train) & set(known.new)
    inside = within(graph, known.observed, known.new)
    for (s, t), yes in zip(known.new, inside.tolist(), strict=True):
        assert yes == any((s, k) in edges and (t, k) in reach for k in range(12))


def test_built_weights_find_paths_and_the_check_finds_mistakes():
    graph = random_graph(15, 0.25, 2)
    connected = graph.distances() < torch.inf
    pairs = [(s, t) for s, t in connected.nonzero().tolist() if s != t]
    model = TwoTables(Observed(graph.edges, connected.T.clone()))
    assert valid(model, graph, pairs, 19).all()
    text = write(model, pairs[:1], 19)[0].tolist()
    s, t = pairs[0]
    assert text[:3] == [s, t, s]
    assert text[text.index(15) - 1] == t
    # An edge that is not there makes exactly the paths over it wrong.
    wrong = graph.edges.clone()
    u, v = text[2], text[3]
    wrong[u, v] = False
    other = type(graph)(wrong, graph.names)
    assert not valid(model, other, pairs[:1], 19)[0]
    assert not valid(PathModel(15, 19, dim=16), graph, pairs, 19).all()


def test_training_learns_the_table_of_edges():
    margin, graph, model = _tables_learned(1)
    assert margin > 0
    assert model.current.shape == (graph.size + 1, graph.size + 1)


def test_blocksworld(tmp_path: Path):
    path = tmp_path / "three.pddl"
    path.write_text(PROBLEM)
    graph = blocksworld(path)
    # Lah numbers: sets of lists of three and of four labelled things.
    assert graph.size == 13
    assert graph.names[0] == "a/c b"
    assert graph.names[graph.asked[1]] == "c/b/a"
    assert torch.equal(graph.edges, graph.edges.T)
    assert (graph.distances() < torch.inf).all()


def test_blocksworld_of_the_package():
    pytest.importorskip("importlib.util").find_spec("pddlgym") or pytest.skip("pddlgym is not installed")
    assert blocksworld().size == 73


def test_bad_files(tmp_path: Path):
    path = tmp_path / "edges.txt"
    with pytest.raises(FileNotFoundError, match="expected random, blocksworld or an existing file"):
        read_graph(path)
    for text, message in [
        ("a b\nb c # fine\nc a\n", r"edges\.txt:1: the graph is not acyclic: a -> b -> c -> a"),
        ("a b\nb b\n", r"edges\.txt:2: the graph is not acyclic: b -> b"),
        ("a b\nb c d\n", r"edges\.txt:2: expected an edge as two names"),
        ("# nothing\n", "holds no edge"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_graph(path)
    problem = tmp_path / "bad.pddl"
    problem.write_text("(define (problem x))")
    with pytest.raises(ValueError, match="expected a PDDL problem with :objects, :init and :goal"):
        blocksworld(problem)
    problem.write_text(PROBLEM.replace("(ontable b)", ""))
    with pytest.raises(ValueError, match="does not put every block into one place"):
        blocksworld(problem)
    with pytest.raises(ValueError, match="--share must lie between 0 and 1"):
        Options(share=1.0)
    with pytest.raises(ValueError, match="--problem is for --graph blocksworld"):
        Options(problem=problem)


def test_files_of_networkx(tmp_path: Path):
    networkx = pytest.importorskip("networkx")
    chain = networkx.DiGraph([("a", "b"), ("b", "c")])
    networkx.write_gml(chain, tmp_path / "chain.gml")
    assert read_graph(tmp_path / "chain.gml").names == ("a", "b", "c")
    networkx.write_gml(chain.to_undirected(), tmp_path / "loose.gml")
    with pytest.raises(ValueError, match="the graph is undirected"):
        read_graph(tmp_path / "loose.gml")


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    edges = tmp_path / "edges.txt"
    edges.write_text("\n".join(f"n{i} n{j}" for i in range(8) for j in range(i + 1, min(i + 3, 8))))
    where = ["--json", str(tmp_path / "found.json"), "--figure", str(tmp_path / "figure.png")]
    small = ["--graph", str(edges), "--steps", "150", "--dim", "32", "--batch", "64"]
    assert main(["run", "alpine", *small, *where]) == 0
    assert "pairs trained on" in capsys.readouterr().out
    assert json.loads((tmp_path / "found.json").read_text())["train"] > 0.8
    assert (tmp_path / "figure.png").stat().st_size > 5000
