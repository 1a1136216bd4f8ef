"""Tile plans of known masks, and how masks keep them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from arcore import masks
from arcore.masks import TilePlan, reference_tile_plan


def test_causal_plan_by_hand() -> None:
    plan = masks.causal(5).plan(2, 2)
    assert plan.row_ptr.tolist() == [[[0, 1, 3, 6]]]
    assert plan.col_idx.tolist() == [0, 0, 1, 0, 1, 2]
    assert plan.full.tolist() == [0, 1, 0, 1, 1, 1]  # the last tile is one pair, and allowed
    assert plan.order.tolist() == [[[2, 1, 0]]]
    assert plan.col_ptr.tolist() == [[[0, 3, 5, 6]]]
    assert plan.row_idx.tolist() == [0, 1, 2, 1, 2, 2]
    assert plan.col_full.tolist() == [0, 1, 1, 0, 1, 1]
    assert plan.col_order.tolist() == [[[0, 1, 2]]]
    assert repr(plan) == "TilePlan(2x2, 6 of 9 tiles, 4 full)"


def test_equal_lengths_keep_their_order() -> None:
    assert masks.documents([2, 2, 4, 2]).plan(2, 2).order.tolist() == [[[3, 0, 1, 2, 4]]]


def test_aligned_blocks_need_no_element_mask() -> None:
    plan = masks.skip_causal(4, 256).plan(128, 128)
    assert (plan.num_tiles, int(plan.full.sum())) == (80, 80)


@pytest.mark.parametrize(
    ("scales", "markov", "full", "held"),
    [
        ((1, 2, 3, 4, 5, 6, 8, 10, 13, 16), False, 19, 28),
        ((1, 2, 3, 4, 5, 6, 8, 10, 13, 16), True, 5, 20),
        ((1, 2, 3, 4, 6, 9, 13, 18, 24, 32), False, 202, 222),
        ((1, 2, 3, 4, 6, 9, 13, 18, 24, 32), True, 84, 120),
    ],
)
def test_known_tile_counts(scales: tuple[int, ...], markov: bool, full: int, held: int) -> None:
    mask = masks.next_scale_markov(scales) if markov else masks.next_scale(scales)
    plan = mask.plan(128, 128)
    assert (int(plan.full.sum()), plan.num_tiles) == (full, held)


def test_plan_of_680_tokens_with_padding() -> None:
    mask = masks.next_scale((1, 2, 3, 4, 5, 6, 8, 10, 13, 16)).with_padding([680, 333, 1, 0])
    for tile in ((64, 64), (96, 256), (13, 17)):
        found, wanted = mask.plan(*tile), reference_tile_plan(mask, *tile)
        for field in dataclasses.fields(TilePlan):
            a, b = getattr(found, field.name), getattr(wanted, field.name)
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_a_tile_whose_only_pairs_are_ruled_out_by_key_bounds_is_left_out() -> None:
    """Rows 2 and 3 see key 0 by their ranges, but key 0 is gone from row 2 on."""
    mask = masks.full(4, 1).with_key_bounds(torch.tensor([[0, 2]]))
    plan = mask.plan(2, 1)
    assert plan.row_ptr.tolist() == [[[0, 1, 1]]]
    assert plan.full.tolist() == [1]


@pytest.mark.parametrize(("nq", "nk"), [(0, 0), (0, 5), (5, 0)])
def test_plan_without_pairs(nq: int, nk: int) -> None:
    plan = masks.full(nq, nk).plan(2, 2)
    assert plan.row_ptr.tolist() == [[[0] * (-(-nq // 2) + 1)]]
    assert plan.col_ptr.tolist() == [[[0] * (-(-nk // 2) + 1)]]
    assert plan.num_tiles == 0
    assert all(getattr(plan, name).dtype == torch.int32 for name in ("row_ptr", "col_idx", "full", "order"))


def test_plan_is_computed_once() -> None:
    mask = masks.causal(9)
    assert mask.plan(4, 4) is mask.plan(4, 4)
    assert mask.plan(4, 4) is not mask.plan(4, 2)


def test_plan_is_frozen() -> None:
    plan = masks.causal(9).plan(4, 4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.tile_q = 3


@pytest.mark.parametrize(("tile_q", "tile_k"), [(0, 4), (4, -1)])
def test_bad_tiles(tile_q: int, tile_k: int) -> None:
    with pytest.raises(ValueError, match=r"IntervalMask\.plan: expected tile_[qk] to be at least 1"):
        masks.causal(9).plan(tile_q, tile_k)


def test_planner_includes_no_torch_header() -> None:
    root = Path(__file__).resolve().parents[2] / "csrc"
    for name in ("module.cpp", "common/tile_plan.h"):
        includes = [line for line in (root / name).read_text().splitlines() if line.startswith("#include")]
        assert includes
        assert not [line for line in includes if "torch" in line or "ATen" in line or "c10" in line]
