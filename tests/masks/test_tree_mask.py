"""TreeMask against ancestors found by walking up, and as a value."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from arcore import masks
from arcore.masks import TreeMask


def walk(parents: list[int], prefix: int, nk: int) -> Tensor:
    """Dense mask of a tree, by walking from each node up to its root."""
    dense = torch.zeros(len(parents), nk, dtype=torch.bool)
    dense[:, :prefix] = True
    for i in range(len(parents)):
        node = i
        while node >= 0:
            dense[i, prefix + node] = True
            node = parents[node]
    return dense


@st.composite
def trees(draw: st.DrawFn) -> tuple[list[list[int]], list[int]]:
    batch, nodes = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 7, 31, 63, 64, 65, 130]))
    parents = [[draw(st.integers(-1, i - 1)) for i in range(nodes)] for _ in range(batch)]
    return parents, [draw(st.integers(0, 20)) for _ in range(batch)]


@given(trees())
def test_ancestors(tree: tuple[list[list[int]], list[int]]) -> None:
    parents, prefix = tree
    mask = masks.tree(parents, prefix)
    nodes = len(parents[0])
    assert mask.shape == (len(parents), 1, nodes, max(prefix) + nodes)
    dense = torch.stack([walk(p, c, mask.nk) for p, c in zip(parents, prefix, strict=True)]).unsqueeze(1)
    assert torch.equal(mask.to_bool(), dense)
    assert mask.num_pairs == int(dense.sum())
    assert mask.density == int(dense.sum()) / dense.numel()
    assert mask.parents.tolist() == parents
    own = torch.tensor(prefix).view(-1, 1)
    assert torch.equal(mask.depth, dense[:, 0].sum(-1) - own - 1)
    assert TreeMask(mask.words, mask.prefix) == mask
    assert pickle.loads(pickle.dumps(mask)) == mask


def test_the_64th_node_is_the_sign_bit() -> None:
    mask = masks.tree([-1, *range(63)], 2)  # a chain
    assert mask.words[0, 63] == -1
    assert torch.equal(mask.to_bool(), masks.causal(64, offset=2).to_bool())


def test_one_tree_serves_a_batch_of_prefixes() -> None:
    mask = masks.tree([-1, 0, 0], [1, 4])
    assert mask.words.shape == (1, 3)
    assert mask.shape == (2, 1, 3, 7)
    for b, prefix in enumerate((1, 4)):
        assert torch.equal(mask.to_bool()[b, 0], walk([-1, 0, 0], prefix, 7))


def test_value() -> None:
    mask = masks.tree([-1, 0, 0, 1], 5)
    assert mask == masks.tree(torch.tensor([-1, 0, 0, 1]), torch.tensor(5))
    assert hash(mask) == hash(masks.tree([-1, 0, 0, 1], [5]))
    others = {mask, masks.tree([-1, 0, 0, 1], 6), masks.tree([-1, 0, 0, 2], 5), masks.tree([-1, 0, 0], 5)}
    assert len(others) == 4
    assert mask != masks.causal(4, 5)
    assert copy.deepcopy(mask) is mask
    assert mask.to("cpu") is mask
    assert mask.to("meta").nk == mask.nk
    with pytest.raises(AttributeError, match="TreeMask is immutable"):
        mask.prefix = torch.tensor([1])


def test_repr() -> None:
    assert repr(masks.tree([-1, 0, 0, 1], 5)) == "TreeMask(nodes=4, prefix=5, depth=3, density=0.778)"
    several = masks.tree([[-1, 0], [-1, -1]], [2, 3])
    assert repr(several) == "TreeMask(nodes=2, prefix=[2, 3], batch=2, depth=2, density=0.75)"


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (
            lambda: masks.tree([0], 1),
            ValueError,
            "node 0 of batch 0 has parent 0; list parents before children",
        ),
        (lambda: masks.tree([-1, 0, 3], 1), ValueError, "node 2 of batch 0 has parent 3"),
        (lambda: masks.tree([-1, -2], 1), ValueError, "-1 <= parents"),
        (lambda: masks.tree([[-1, 0], [-1, 1]], 1), ValueError, "node 1 of batch 1 has parent 1"),
        (lambda: masks.tree([], 1), ValueError, r"with 1 to 4096 nodes but got \(1, 0\)"),
        (lambda: masks.tree([-1] * 4097, 1), ValueError, r"with 1 to 4096 nodes but got \(1, 4097\)"),
        (lambda: masks.tree([[-1, 0], [-1]], 1), TypeError, "expected parents to be made of integers"),
        (lambda: masks.tree([-1.0], 1), TypeError, "expected parents of an integer dtype but got float32"),
        (lambda: masks.tree([-1], -1), ValueError, "expected prefix lengths from 0"),
        (lambda: masks.tree([-1], 1.5), TypeError, "expected prefix of an integer dtype"),
        (lambda: masks.tree([[-1], [-1]], [1, 2, 3]), ValueError, r"one per batch entry \(2\) but got 3"),
        (
            lambda: TreeMask(torch.tensor([1, 1]), 0),
            ValueError,
            "node 1 has 0x1; build the mask with arcore.masks.tree",
        ),
        (lambda: TreeMask(torch.tensor([3, 2]), 0), ValueError, "node 0 has 0x3"),
        (lambda: TreeMask(torch.tensor([1, 2, 7]), 0), ValueError, "node 2 has 0x7"),
        (lambda: TreeMask(torch.tensor([[1, 3], [1, 1]]), 0), ValueError, "batch 1, node 1 has 0x1"),
        (lambda: TreeMask(torch.ones(2), 0), TypeError, "expected words of an integer dtype but got float32"),
    ],
)
def test_bad_arguments(build: Callable[[], object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        build()
