"""Properties of random interval masks: conversions, algebra, slices and tile plans against the dense mask."""

from __future__ import annotations

import pickle
from dataclasses import fields

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from arcore import masks
from arcore.masks import IntervalMask, TilePlan, reference_tile_plan
from arcore.masks.tile_plan import compute_tile_plan

LENGTHS = st.sampled_from([0, 1, 2, 15, 16, 17, 63, 64, 65, 127, 680])
SIZES = st.sampled_from([1, 2, 3])
SEEDS = st.integers(0, 2**31 - 1)


def random_ranges(shape: tuple[int, ...], size: int, generator: torch.Generator) -> Tensor:
    """Half-open ranges ``[*shape, 2]`` in [0, size]: empty, of one element, short, long, overlapping and touching."""
    lo = torch.randint(0, size + 1, shape, generator=generator)
    span = torch.randint(0, size + 1, shape, generator=generator)
    short = torch.randint(0, 3, shape, generator=generator)
    kind = torch.randint(0, 4, shape, generator=generator)
    hi = torch.minimum(lo + torch.where(kind == 0, span, short), torch.tensor(size))
    lo, hi = torch.where(kind == 1, 0, lo), torch.where(kind == 2, size, hi)
    return torch.stack([torch.minimum(lo, hi), hi], -1)


def expand(bounds: Tensor, nk: int, key_bounds: Tensor | None) -> Tensor:
    """The dense mask that the definition of IntervalMask gives, by painting range after range."""
    batch, heads, nq, edges = bounds.shape
    key_batch = 1 if key_bounds is None else key_bounds.shape[0]
    dense = torch.zeros(max(batch, key_batch), heads, nq, nk, dtype=torch.bool)
    for b, h, i in ((b, h, i) for b in range(dense.shape[0]) for h in range(heads) for i in range(nq)):
        for lo, hi in bounds[b % batch, h, i].view(edges // 2, 2).tolist():
            dense[b, h, i, lo:hi] = True
    for b, j in ((b, j) for b in range(key_batch) for j in range(nk)) if key_bounds is not None else ():
        lo, hi = key_bounds[b, j].tolist()
        hit = dense[b] if key_batch == dense.shape[0] else dense
        hit[..., :lo, j] = False
        hit[..., hi:, j] = False
    return dense


@st.composite
def interval_masks(
    draw: st.DrawFn,
    nq: int | None = None,
    nk: int | None = None,
    batch: int | None = None,
    heads: int | None = None,
) -> tuple[IntervalMask, Tensor]:
    """A mask and its dense twin."""
    nq = draw(LENGTHS) if nq is None else nq
    nk = draw(LENGTHS) if nk is None else nk
    batch = draw(SIZES) if batch is None else batch
    heads = draw(SIZES) if heads is None else heads
    generator = torch.Generator().manual_seed(draw(SEEDS))
    rows_batch = draw(st.sampled_from([1, batch]))
    ranges = random_ranges((rows_batch, heads, nq, draw(st.sampled_from([1, 2]))), nk, generator)
    keys = draw(st.sampled_from(["none", "padding", "random"]))
    key_bounds = None
    if keys == "padding":
        real = torch.randint(0, nk + 1, (batch, 1), generator=generator)
        hi = torch.where(torch.arange(nk) < real, nq, 0)
        key_bounds = torch.stack([torch.zeros_like(hi), hi], -1)
    elif keys == "random":
        key_bounds = random_ranges((draw(st.sampled_from([1, batch])), nk), nq, generator)
    bounds = ranges.flatten(3)
    return IntervalMask(bounds, nk, key_bounds=key_bounds), expand(bounds, nk, key_bounds)


def runs(dense: Tensor) -> Tensor:
    """Number of runs of True in each row."""
    edge = torch.nn.functional.pad(dense, (1, 0))
    return (edge[..., 1:] & ~edge[..., :-1]).sum(-1)


@given(interval_masks())
def test_dense_mask_and_counts(pair: tuple[IntervalMask, Tensor]) -> None:
    mask, dense = pair
    assert mask.shape == dense.shape
    assert torch.equal(mask.to_bool(), dense)
    assert mask.num_pairs == int(dense.sum())
    assert mask.density == (int(dense.sum()) / dense.numel() if dense.numel() else 0.0)


@given(interval_masks())
def test_normal_form(pair: tuple[IntervalMask, Tensor]) -> None:
    bounds = pair[0].bounds
    lo, hi = bounds[..., 0::2], bounds[..., 1::2]
    empty = lo >= hi
    assert (bounds.unflatten(-1, (-1, 2))[empty] == 0).all()
    if pair[0].num_intervals == 2:
        assert (empty[..., 1] | (hi[..., 0] < lo[..., 1])).all()
        assert (~empty[..., 0] | empty[..., 1]).all()
        assert not empty[..., 1].all()


@given(interval_masks())
def test_round_trip_through_bool(pair: tuple[IntervalMask, Tensor]) -> None:
    mask, dense = pair
    if bool((runs(dense) > 2).any()):
        try:
            masks.from_bool(dense)
        except ValueError as error:
            first = (runs(dense) > 2).nonzero()[0].tolist()
            assert f"row {first[2]} has {int(runs(dense)[tuple(first)])}" in str(error)
        else:
            raise AssertionError("from_bool took a row with more than two ranges")
        return
    again = masks.from_bool(dense)
    assert torch.equal(again.to_bool(), dense)
    if mask.key_bounds is None:
        assert again == mask
        assert hash(again) == hash(mask)


@given(interval_masks())
def test_pickle(pair: tuple[IntervalMask, Tensor]) -> None:
    assert pickle.loads(pickle.dumps(pair[0])) == pair[0]


@st.composite
def pairs_of_masks(draw: st.DrawFn) -> tuple[tuple[IntervalMask, Tensor], tuple[IntervalMask, Tensor]]:
    nq, nk, batch, heads = draw(LENGTHS), draw(LENGTHS), draw(SIZES), draw(SIZES)
    first = draw(interval_masks(nq, nk, draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads]))))
    second = draw(
        interval_masks(nq, nk, draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads])))
    )
    return first, second


@given(pairs_of_masks())
def test_algebra_is_that_of_dense_masks_or_an_error(
    pair: tuple[tuple[IntervalMask, Tensor], tuple[IntervalMask, Tensor]],
) -> None:
    (a, dense_a), (b, dense_b) = pair
    for combine, dense in ((lambda: a & b, dense_a & dense_b), (lambda: a | b, dense_a | dense_b)):
        try:
            combined = combine()
        except ValueError as error:
            assert "at most 2 key ranges" in str(error)
            # Without key bounds, an error means that the result really does not fit.
            if a.key_bounds is None and b.key_bounds is None:
                assert (runs(dense) > 2).any()
        else:
            assert torch.equal(combined.to_bool(), dense)


@given(interval_masks(), st.data())
def test_slices(pair: tuple[IntervalMask, Tensor], data: st.DataObject) -> None:
    mask, dense = pair
    start = data.draw(st.integers(0, mask.nq))
    stop = data.draw(st.integers(start, mask.nq))
    assert torch.equal(mask[start:stop].to_bool(), dense[:, :, start:stop])
    nk = data.draw(st.integers(0, mask.nk))
    kept, cut = dense[:, :, start:stop, :nk], dense[:, :, start:stop, nk:]
    if cut.any():
        row = int(cut.any(-1).flatten().nonzero()[0]) % (stop - start) + start
        try:
            mask.rows(start, stop, nk=nk)
        except ValueError as error:
            assert f"row {row} sees key" in str(error)
        else:
            raise AssertionError("rows that see keys beyond the cache were taken")
    else:
        assert torch.equal(mask.rows(start, stop, nk=nk).to_bool(), kept)


def same_plan(a: TilePlan, b: TilePlan) -> bool:
    def same(x: object, y: object) -> bool:
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            return x.dtype == y.dtype and torch.equal(x, y)
        return x == y

    return all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(TilePlan))


TILES = st.sampled_from([(1, 1), (16, 16), (64, 32), (32, 64), (7, 5), (128, 128), (1, 64), (64, 1)])


@given(interval_masks(), TILES)
@settings(max_examples=120)
def test_plan_is_that_of_the_dense_mask(pair: tuple[IntervalMask, Tensor], tile: tuple[int, int]) -> None:
    assert same_plan(compute_tile_plan(pair[0], *tile), reference_tile_plan(pair[0], *tile))


@given(interval_masks(), TILES)
def test_plan_covers_exactly_the_tiles_that_hold_a_pair(
    pair: tuple[IntervalMask, Tensor], tile: tuple[int, int]
) -> None:
    """Tile by tile, without the reference."""
    mask, dense = pair
    assume(dense.numel() < 3000 * tile[0] * tile[1])
    plan = mask.plan(*tile)
    rows, columns = -(-mask.nq // tile[0]), -(-mask.nk // tile[1])
    listed: dict[tuple[int, int, int, int], int] = {}
    for b in range(mask.batch):
        for h in range(mask.heads):
            for m in range(rows):
                at = slice(int(plan.row_ptr[b, h, m]), int(plan.row_ptr[b, h, m + 1]))
                for n, full in zip(plan.col_idx[at].tolist(), plan.full[at].tolist(), strict=True):
                    listed[b, h, m, n] = full
    assert len(listed) == plan.num_tiles
    expected = {}
    for b in range(mask.batch):
        for h in range(mask.heads):
            for m in range(rows):
                for n in range(columns):
                    part = dense[b, h, m * tile[0] : (m + 1) * tile[0], n * tile[1] : (n + 1) * tile[1]]
                    if part.any():
                        expected[b, h, m, n] = int(part.all())
    assert listed == expected
