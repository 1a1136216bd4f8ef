"""`TokenCache`: rows of different lengths against a list of tensors per row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from arcore.nn import TokenCache

LAYERS, BATCH, HEADS, DIM = 2, 3, 2, 4


def make(max_length: int = 12, **kwargs: object) -> TokenCache:
    return TokenCache(
        num_layers=LAYERS, batch=BATCH, num_heads=HEADS, max_length=max_length, head_dim=DIM, **kwargs
    )


def tokens(count: int) -> Tensor:
    return torch.randn(LAYERS, BATCH, HEADS, count, DIM)


def stage(cache: TokenCache, new: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [cache.stage(layer, new[layer], -new[layer]) for layer in range(LAYERS)]


class Rows:
    """What the cache should hold, one tensor `[LAYERS, H, n, D]` per row."""

    def __init__(self) -> None:
        self.rows = [torch.empty(LAYERS, HEADS, 0, DIM) for _ in range(BATCH)]

    def add(self, new: Tensor, places: list[list[int]]) -> None:
        self.rows = [
            torch.cat([row, new[:, b][:, :, place]], dim=2)
            for b, (row, place) in enumerate(zip(self.rows, places, strict=True))
        ]

    def check(self, cache: TokenCache) -> None:
        assert cache.lengths == tuple(row.shape[2] for row in self.rows)
        assert cache.length == max(cache.lengths)
        views = stage(cache, torch.zeros(LAYERS, cache.batch, HEADS, 0, DIM))
        for layer, (keys, values) in enumerate(views):
            for b, row in enumerate(self.rows):
                assert torch.equal(keys[b, :, : row.shape[2]], row[layer])
                assert torch.equal(values[b, :, : row.shape[2]], -row[layer])


def test_rows_keep_different_numbers_of_staged_tokens() -> None:
    cache, rows = make(), Rows()
    for counts in ([2, 2, 2], [3, 0, 1], [1, 1, 1], [0, 2, 0]):
        new = tokens(3)
        stage(cache, new)
        cache.commit(counts)
        rows.add(new, [list(range(n)) for n in counts])
        rows.check(cache)
    assert cache.ragged


def test_a_path_through_a_tree_is_moved_together() -> None:
    cache, rows = make(), Rows()
    for path in ([[0, 1], [0, 1], [0, 1]], [[0, 2, 3], [], [3]], [[1, 2], [0, 3], [0, 1, 2, 3]]):
        new = tokens(4)
        stage(cache, new)
        longest = max(map(len, path))
        cache.keep(torch.tensor([row + [-1] * (longest - len(row)) for row in path]))
        rows.add(new, path)
        rows.check(cache)


def test_what_is_staged_and_not_kept_is_written_over() -> None:
    cache, rows = make(), Rows()
    stage(cache, tokens(5))
    new = tokens(2)
    stage(cache, new)
    cache.commit(2)
    rows.add(new, [[0, 1]] * 3)
    rows.check(cache)


def test_a_snapshot_brings_lengths_back_unless_a_deeper_cut_came_between() -> None:
    cache, rows = make(), Rows()
    new = tokens(4)
    stage(cache, new)
    cache.commit([4, 2, 3])
    rows.add(new, [[0, 1, 2, 3], [0, 1], [0, 1, 2]])
    point = cache.snapshot()
    stage(cache, tokens(2))
    cache.commit(2)
    cache.restore(point)
    rows.check(cache)
    cache.truncate([4, 1, 3])
    stage(cache, tokens(2))
    cache.commit(2)
    with pytest.raises(ValueError, match="older than a cut"):
        cache.restore(point)
    with pytest.raises(ValueError, match="of another cache"):
        make().restore(point)


def test_fork_and_select_copy_rows() -> None:
    cache, rows = make(), Rows()
    new = tokens(3)
    stage(cache, new)
    cache.commit([3, 1, 2])
    rows.add(new, [[0, 1, 2], [0], [0, 1]])
    other = cache.fork([2, 0, 0])
    forked = Rows()
    forked.rows = [rows.rows[2], rows.rows[0], rows.rows[0]]
    stage(other, tokens(1))
    other.commit(1)
    rows.check(cache)
    other.truncate([2, 3, 3])
    forked.check(other)
    cache.select([2, 0, 0])
    forked.check(cache)


def test_absent_layers_take_no_memory() -> None:
    cache = make(absent=[0])
    assert cache.nbytes * 2 == make().nbytes
    new = tokens(1)
    cache.stage(1, new[1], new[1])
    with pytest.raises(ValueError, match="layer 0 has no keys"):
        cache.stage(0, new[0], new[0])


def test_refuses_what_does_not_fit() -> None:
    cache = make(max_length=4)
    with pytest.raises(ValueError, match="expected keys and values of shape"):
        cache.stage(0, torch.zeros(BATCH, HEADS, 1, DIM + 1), torch.zeros(BATCH, HEADS, 1, DIM + 1))
    with pytest.raises(ValueError, match="5 more do not fit into max_length=4"):
        stage(cache, tokens(5))
    stage(cache, tokens(3))
    with pytest.raises(ValueError, match="expected counts from 0 to 3"):
        cache.commit([1, 4, 0])
    with pytest.raises(ValueError, match="for each of 3 rows but got 2"):
        cache.commit([1, 1])
    with pytest.raises(ValueError, match="row 1 has"):
        cache.keep([[0], [1, 0], []])
    cache.commit(2)
    with pytest.raises(ValueError, match="expected lengths from 0"):
        cache.truncate(3)
    with pytest.raises(ValueError, match="not all"):
        make(absent=[0, 1])
    assert "length=2/4" in repr(cache)
