"""IntervalMask as a value: normal form, checks, equality, copies, slices, algebra, conversions."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from arcore import masks
from arcore.masks import IntervalMask, Labels, Segment
from arcore.ops import reference_block_sparse_attention


def rows(*ranges: list[int]) -> Tensor:
    return torch.tensor(ranges)


def checkerboard(n: int) -> Tensor:
    i = torch.arange(n)
    return (i[:, None] + i[None, :]) % 2 == 0


def test_attributes() -> None:
    mask = masks.skip_causal(3, 2)
    assert mask.bounds.dtype == torch.int32
    assert mask.bounds.shape == (1, 1, 12, 4)
    assert mask.bounds.is_contiguous()
    assert mask.key_bounds is None
    assert (mask.nq, mask.nk, mask.batch, mask.heads, mask.num_intervals) == (12, 12, 1, 1, 2)
    assert mask.shape == (1, 1, 12, 12)
    assert mask.device == torch.device("cpu")


def test_ranges_are_brought_into_normal_form() -> None:
    mask = IntervalMask(
        rows([4, 6, 0, 2], [2, 4, 0, 2], [1, 5, 2, 3], [3, 3, 0, 0], [2, 2, 1, 4], [0, 3, 2, 6]), 6
    )
    expected = rows([0, 2, 4, 6], [0, 4, 0, 0], [1, 5, 0, 0], [0, 0, 0, 0], [1, 4, 0, 0], [0, 6, 0, 0])
    assert torch.equal(mask.bounds[0, 0], expected.int())


def test_a_second_range_that_no_row_needs_is_not_stored() -> None:
    assert IntervalMask(rows([0, 2, 2, 4], [1, 3, 1, 2]), 4).num_intervals == 1


def test_a_mask_does_not_share_memory_with_its_arguments() -> None:
    bounds, key_bounds = rows([0, 2], [0, 2]).int().view(1, 1, 2, 2), rows([0, 2], [0, 2]).int().view(1, 2, 2)
    mask = IntervalMask(bounds, 2, key_bounds=key_bounds)
    bounds.zero_()
    key_bounds.zero_()
    assert mask.to_bool().all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_any_integer_dtype(dtype: torch.dtype) -> None:
    assert IntervalMask(rows([0, 1], [0, 2]).to(dtype), 2) == masks.causal(2)


@pytest.mark.parametrize(
    ("bounds", "nk", "key_bounds", "error", "text"),
    [
        ([[0, 1]], 1, None, TypeError, "expected bounds to be an integer tensor but got list"),
        (torch.zeros(2, 2), 1, None, TypeError, "expected bounds of an integer dtype but got float32"),
        (
            torch.zeros(2, 2, dtype=torch.bool),
            1,
            None,
            TypeError,
            "expected key ranges but got a bool mask; call from_bool",
        ),
        (rows([0, 1, 2]), 3, None, ValueError, r"expected bounds of shape \[Nq, 2 or 4\].* but got \(1, 3\)"),
        (torch.zeros(1, 2, 2).int(), 3, None, ValueError, r"but got \(1, 2, 2\)"),
        (torch.zeros(0, 1, 2, 2).int(), 3, None, ValueError, r"but got \(0, 1, 2, 2\)"),
        (rows([0, 1], [0, 5]), 4, None, ValueError, r"0 <= lo <= hi <= nk=4 but row 1 has \[0, 5\]"),
        (rows([0, 1], [3, 2]), 4, None, ValueError, r"row 1 has \[3, 2\]"),
        (rows([-1, 1]), 4, None, ValueError, r"row 0 has \[-1, 1\]"),
        (torch.tensor([[[[0, 1]]], [[[0, 9]]]]), 4, None, ValueError, r"batch 1, row 0 has \[0, 9\]"),
        (rows([0, 1]), -1, None, ValueError, "expected nk to be at least 0 but got -1"),
        (rows([0, 1]), 1.0, None, TypeError, "expected nk to be an integer"),
        (
            rows([0, 1]),
            2,
            rows([0, 1]),
            ValueError,
            r"key_bounds of shape \[2, 2\] or \[Bm, 2, 2\] but got \(1, 2\)",
        ),
        (
            rows([0, 1]),
            1,
            torch.zeros(1, 2),
            TypeError,
            "expected key_bounds of an integer dtype but got float32",
        ),
        (rows([0, 1]), 1, rows([0, 2]), ValueError, r"hi <= nq=1 but key 0 of batch 0 has \[0, 2\]"),
        (
            torch.zeros(2, 1, 1, 2).int(),
            1,
            torch.zeros(3, 1, 2).int(),
            ValueError,
            r"one batch size \(or 1\) but got 2 and 3",
        ),
    ],
)
def test_bad_arguments(
    bounds: Tensor, nk: int, key_bounds: Tensor | None, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        IntervalMask(bounds, nk, key_bounds=key_bounds)


def test_a_mask_cannot_be_changed() -> None:
    mask = masks.causal(3)
    with pytest.raises(AttributeError, match="IntervalMask is immutable: cannot set 'nk'"):
        mask.nk = 4
    with pytest.raises(AttributeError, match="cannot set 'anything'"):
        mask.anything = 4
    with pytest.raises(AttributeError, match="cannot delete 'bounds'"):
        del mask.bounds
    with pytest.raises(AttributeError):
        mask.nq = 4


DIFFERENT = [
    masks.causal(4),
    masks.causal(3),
    masks.causal(3, 1),
    masks.full(4, 4),
    masks.causal(4).with_padding([4]),
    masks.causal(4).with_padding([3]),
    masks.causal(4).with_padding([3, 3]),
    IntervalMask(masks.causal(4).bounds, 5),
    IntervalMask(masks.causal(4).bounds.repeat(2, 1, 1, 1), 4),
    IntervalMask(masks.causal(4).bounds.repeat(1, 2, 1, 1), 4),
    masks.skip_causal(2, 1),
]


def test_equality_and_hash_go_by_content() -> None:
    for a, b in itertools.combinations(DIFFERENT, 2):
        assert a != b
    assert len(set(DIFFERENT)) == len(DIFFERENT)
    again = [IntervalMask(m.bounds.clone(), m.nk, key_bounds=m.key_bounds) for m in DIFFERENT]
    assert again == DIFFERENT
    assert [hash(m) for m in again] == [hash(m) for m in DIFFERENT]
    assert masks.causal(4) != "causal"
    assert masks.causal(2) == IntervalMask(rows([0, 1], [0, 2]), 2, labels=Labels((), ()))


def test_a_plan_does_not_change_the_value() -> None:
    used, fresh = masks.causal(9).with_padding([7]), masks.causal(9).with_padding([7])
    before = pickle.dumps(used)
    used.plan(4, 4)
    _ = used.density, repr(used), hash(used)
    assert used == fresh
    assert hash(used) == hash(fresh)
    assert pickle.dumps(used) == before


@pytest.mark.parametrize("mask", DIFFERENT, ids=repr)
def test_pickle_and_copy(mask: IntervalMask) -> None:
    restored = pickle.loads(pickle.dumps(mask))
    assert restored == mask
    assert hash(restored) == hash(mask)
    assert restored.labels == mask.labels
    assert copy.copy(mask) is mask
    assert copy.deepcopy([mask])[0] is mask


def test_to() -> None:
    mask = masks.causal(3).with_padding([2])
    assert mask.to("cpu") is mask
    assert mask.to(torch.device("cpu")) is mask
    moved = mask.to("meta")
    assert moved.bounds.device.type == moved.key_bounds.device.type == moved.device.type == "meta"
    assert (moved.nq, moved.nk, moved.labels) == (mask.nq, mask.nk, mask.labels)
    assert mask.to("meta") is moved
    assert moved != mask


@pytest.mark.cuda
def test_on_cuda() -> None:
    mask = masks.skip_causal(3, 5).with_padding([30, 17])
    moved = mask.to("cuda")
    assert moved.to("cuda:0") is moved
    assert moved != mask
    assert hash(moved) == hash(mask)
    assert torch.equal(moved.to_bool().cpu(), mask.to_bool())
    assert moved.density == mask.density
    assert moved.plan(4, 4).col_idx.is_cuda
    assert torch.equal(moved.plan(4, 4).col_idx.cpu(), mask.plan(4, 4).col_idx)
    assert (moved & moved).to("cpu") == mask
    assert moved[3:9].to("cpu") == mask[3:9]
    assert pickle.loads(pickle.dumps(moved)) == moved


def test_masks_made_in_inference_mode_train() -> None:
    with torch.inference_mode():
        mask = (masks.causal(4) | masks.causal(4)).with_padding([3])[0:4]
        tensors = [mask.bounds, mask.key_bounds, mask.plan(2, 2).col_idx, masks.tree([-1], 2).words]
    assert not any(t.is_inference() for t in tensors)


def test_repr() -> None:
    assert repr(masks.causal(4)) == "IntervalMask(nq=4, nk=4, intervals=1, density=0.625)"
    padded = IntervalMask(masks.causal(4).bounds.repeat(1, 3, 1, 1), 4).with_padding([4, 0])
    assert (
        repr(padded) == "IntervalMask(nq=4, nk=4, batch=2, heads=3, intervals=1, key_bounds, density=0.312)"
    )


def test_density_counts_pairs() -> None:
    assert masks.causal(4).num_pairs == 10
    assert masks.causal(4).density == 10 / 16
    assert masks.full(0, 0).density == 0.0
    assert masks.full(3, 0).density == 0.0
    assert masks.causal(4).with_padding([2, 4]).num_pairs == 7 + 10
    # Every key has a range of its own: causal, written by keys.
    key = torch.arange(3000)
    by_key = masks.full(3000, 3000).with_key_bounds(torch.stack([key, torch.full_like(key, 3000)], -1))
    assert by_key.num_pairs == 3000 * 3001 // 2


@pytest.mark.parametrize("at_once", [1, 40])
def test_long_masks_are_worked_on_in_parts(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arcore.masks.interval_mask._PIECES_AT_ONCE", at_once)
    mask = masks.sliding_window(30, 9, 2).with_padding([30, 25, 3])
    dense = mask.to_bool()
    assert mask.num_pairs == int(dense.sum())
    assert torch.equal((mask | masks.causal(30)).to_bool(), dense | masks.causal(30).to_bool())
    with pytest.raises(ValueError, match="batch 0, row 27 sees key 27"):
        mask.rows(20, 30, nk=27)
    holes = torch.zeros(30, 2, dtype=torch.int64)
    holes[::2] = torch.tensor([20, 30])  # rows from 20 on see every other key
    with pytest.raises(ValueError, match=r"\| of masks with different key_bounds: .* row 20 has 15"):
        _ = masks.full(30, 30).with_key_bounds(holes) | masks.causal(30)


def test_padding() -> None:
    real = torch.tensor([5, 3, 0])
    right = masks.causal(5).with_padding(real)
    left = masks.causal(5).with_padding([5, 3, 0], side="left")
    causal = masks.causal(5).to_bool()
    key = torch.arange(5)
    assert right.shape == left.shape == (3, 1, 5, 5)
    assert torch.equal(right.to_bool(), causal & (key < real[:, None])[:, None, None])
    assert torch.equal(left.to_bool(), causal & (key >= 5 - real[:, None])[:, None, None])


def test_padding_twice_keeps_both() -> None:
    twice = masks.full(2, 6).with_padding([4]).with_padding([5], side="left")
    assert torch.equal(twice.to_bool()[0, 0, 0], torch.tensor([False, True, True, True, False, False]))


def test_deleted_tokens() -> None:
    """Token 1 is deleted at row 3: rows from 3 on no longer see it."""
    causal = masks.causal(5).to_bool()[0, 0]
    mask = masks.causal(5).with_key_bounds(torch.tensor([[0, 5], [1, 3], [0, 5], [0, 5], [0, 5]]))
    expected = causal.clone()
    expected[3:, 1] = False
    assert torch.equal(mask.to_bool()[0, 0], expected)


@pytest.mark.parametrize(
    ("lengths", "side", "error", "text"),
    [
        ([3, 6], "right", ValueError, r"expected lengths from 0 to nk=5 but got \[3, 6\]"),
        ([-1], "right", ValueError, "expected lengths from 0 to nk=5"),
        ([], "right", ValueError, r"expected lengths of shape \[B\] but got \(0,\)"),
        ([[1]], "right", ValueError, r"expected lengths of shape \[B\] but got \(1, 1\)"),
        ([1.5], "right", TypeError, "expected lengths of an integer dtype but got float32"),
        ("long", "right", TypeError, "expected lengths to be made of integers but got 'long'"),
        ([3], "middle", ValueError, "expected side to be 'right' or 'left' but got 'middle'"),
    ],
)
def test_bad_padding(lengths: list[int], side: str, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        masks.causal(5).with_padding(lengths, side=side)


def test_slices_are_rows() -> None:
    mask = masks.skip_causal(3, 2)
    dense = mask.to_bool()
    for start, stop in itertools.combinations_with_replacement(range(13), 2):
        assert torch.equal(mask[start:stop].to_bool(), dense[:, :, start:stop])
    assert mask[:] == mask
    assert torch.equal(mask[-4:].to_bool(), dense[:, :, -4:])
    assert torch.equal(mask[2:4, :4].to_bool(), dense[:, :, 2:4, :4])
    assert torch.equal(mask[2:4, :-6].to_bool(), dense[:, :, 2:4, :-6])


def test_slices_of_key_bounds() -> None:
    mask = masks.causal(6).with_key_bounds(torch.tensor([[0, 6], [1, 3], [0, 0], [3, 4], [4, 6], [5, 6]]))
    for start, stop in itertools.combinations_with_replacement(range(7), 2):
        assert torch.equal(mask[start:stop].to_bool(), mask.to_bool()[:, :, start:stop])


def test_steps_of_cached_next_scale_generation_allow_everything() -> None:
    scales = (1, 2, 3, 4)
    mask, start = masks.next_scale(scales), 0
    for side in scales:
        stop = start + side * side
        assert mask.rows(start, stop, nk=stop) == masks.full(stop - start, stop)
        start = stop


def test_keys_beyond_the_cache_are_an_error_only_if_a_row_sees_them() -> None:
    mask = masks.causal(6)
    assert mask.rows(2, 4, nk=4) == masks.causal(2, offset=2)
    with pytest.raises(ValueError, match="expected rows that see keys below nk=3 only but row 3 sees key 3"):
        mask.rows(2, 4, nk=3)
    padded = mask.with_padding([3, 4])
    with pytest.raises(ValueError, match=r"nk=3 only but batch 1, row 3 sees key 3"):
        padded.rows(2, 4, nk=3)
    assert torch.equal(padded.rows(2, 6, nk=4).to_bool(), padded.to_bool()[:, :, 2:6, :4])
    # The row's only range holds nothing but keys that no query may see.
    hidden = IntervalMask(rows([9, 10]), 12, key_bounds=rows(*[[0, 1]] * 6, *[[0, 0]] * 6))
    assert hidden.rows(0, 1, nk=3).num_pairs == 0


@pytest.mark.parametrize(
    ("cut", "error", "text"),
    [
        (lambda m: m.rows(0, 7), ValueError, "expected 0 <= start <= stop <= nq=6 but got 0 and 7"),
        (lambda m: m.rows(4, 3), ValueError, "but got 4 and 3"),
        (lambda m: m.rows(-1, 3), ValueError, "expected start to be at least 0"),
        (
            lambda m: m.rows(0, 3, nk=7),
            ValueError,
            "expected nk to be at most 6, the keys of the mask, but got 7",
        ),
        (lambda m: m[0:7], ValueError, "nq=6 but got 0 and 7"),
        (lambda m: m[-8:], ValueError, "expected start to be at least 0 but got -2"),
        (lambda m: m[2], TypeError, r"for one row write mask\[i:i\+1\]"),
        (lambda m: m[0:4, 3], TypeError, r"expected mask\[start:stop\] or mask\[start:stop, :nk\]"),
        (lambda m: m[::2], ValueError, "rows in steps of 1"),
        (lambda m: m[:, 2:4], ValueError, "keys from 0"),
        (lambda m: m[0:1, 0:1, 0:1], TypeError, "expected mask"),
    ],
)
def test_bad_slices(cut: Callable[[IntervalMask], object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        cut(masks.causal(6))


def test_slices_keep_labels() -> None:
    mask = masks.skip_causal(2, 3)
    cut = mask.rows(1, 5, nk=6)
    assert cut.labels.queries == (Segment(0, 2, "clean", "clean 0"), Segment(2, 4, "clean", "clean 1"))
    assert cut.labels.keys == (Segment(0, 3, "clean", "clean 0"), Segment(3, 6, "clean", "clean 1"))


def test_algebra() -> None:
    n = 12
    window, docs, prefix = masks.sliding_window(n, 3), masks.documents([5, 7]), masks.prefix_lm(n, 4)
    for a, b in itertools.combinations((window, docs, prefix), 2):
        assert torch.equal((a & b).to_bool(), a.to_bool() & b.to_bool())
        assert torch.equal((a | b).to_bool(), a.to_bool() | b.to_bool())
    assert masks.sliding_window(n, 3) & masks.causal(n) == masks.sliding_window(n, 3)
    assert masks.documents([5, 7], causal=False) & masks.causal(n) == docs


def test_algebra_broadcasts_over_batch_and_heads() -> None:
    by_batch = masks.prefix_lm(6, [0, 2, 4])
    by_head = IntervalMask(torch.cat([masks.causal(6).bounds, masks.sliding_window(6, 2).bounds], 1), 6)
    for both, expected in (
        (by_batch & by_head, by_batch.to_bool() & by_head.to_bool()),
        (by_batch | by_head, by_batch.to_bool() | by_head.to_bool()),
    ):
        assert both.shape == (3, 2, 6, 6)
        assert torch.equal(both.to_bool(), expected)


def test_union_does_not_let_one_sides_padding_cut_the_other() -> None:
    padded, window = masks.causal(6).with_padding([2, 6]), masks.sliding_window(6, 2)
    assert torch.equal((padded | window).to_bool(), padded.to_bool() | window.to_bool())
    left = masks.causal(6).with_padding([4, 3], side="left")
    assert torch.equal((padded | left).to_bool(), padded.to_bool() | left.to_bool())
    same = masks.documents([3, 3]).with_padding([2, 6])
    assert torch.equal((padded | same).to_bool(), padded.to_bool() | same.to_bool())
    assert (padded | same).key_bounds is not None


@pytest.mark.parametrize(
    ("combine", "text"),
    [
        (
            lambda: masks.sliding_window(9, 2, 1) | IntervalMask(torch.tensor([[4, 5]] * 9), 9),
            r"IntervalMask: \|: expected at most 2 key ranges per row but row 7 has 3; an IntervalMask cannot",
        ),
        (
            lambda: (
                masks.full(5, 5).with_key_bounds(torch.tensor([[0, 5], [0, 0], [0, 5], [0, 0], [0, 5]]))
                | masks.sliding_window(5, 1)
            ),
            r"\| of masks with different key_bounds: expected at most 2 key ranges per row but row 0 has 3",
        ),
        (
            lambda: masks.causal(3) | masks.causal(4),
            r"\| expected masks of one length but got 3 x 3 and 4 x 4",
        ),
        (
            lambda: masks.causal(3) & masks.causal(3, 1),
            "& expected masks of one length but got 3 x 3 and 3 x 4",
        ),
        (
            lambda: masks.prefix_lm(3, [1, 2]) & masks.prefix_lm(3, [1, 2, 3]),
            r"one batch size \(or 1\) but got 2 and 3",
        ),
        (lambda: masks.causal(3) & masks.causal(3).to("meta"), "one device but got cpu and meta"),
    ],
)
def test_bad_algebra(combine: Callable[[], object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        combine()


def test_algebra_with_something_else() -> None:
    with pytest.raises(TypeError):
        masks.causal(3) & 1
    with pytest.raises(TypeError):
        masks.causal(3) | torch.ones(3, 3)


def test_from_bool() -> None:
    dense = masks.skip_causal(3, 2).to_bool()
    assert masks.from_bool(dense) == masks.skip_causal(3, 2)
    assert masks.from_bool(dense[0, 0]) == masks.skip_causal(3, 2)
    assert IntervalMask.from_bool(torch.zeros(2, 3, 4, 0, dtype=torch.bool)).shape == (2, 3, 4, 0)


@pytest.mark.parametrize(
    ("mask", "error", "text"),
    [
        (torch.ones(3, 3), TypeError, "expected a bool tensor but got float32"),
        ([[True]], TypeError, "expected a bool tensor but got list"),
        (torch.ones(2, 3, 3, dtype=torch.bool), ValueError, r"but got \(2, 3, 3\); .*mask.unsqueeze\(1\)"),
        (checkerboard(6), ValueError, "from_bool: expected at most 2 key ranges per row but row 0 has 3"),
        (
            torch.stack([torch.ones(5, 5).bool(), checkerboard(5)]).unsqueeze(0),
            ValueError,
            "head 1, row 0 has 3; an IntervalMask cannot hold this mask",
        ),
    ],
)
def test_bad_from_bool(mask: Tensor, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        masks.from_bool(mask)


def test_padding_in_attention_equals_shorter_sequences() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 1, 6, 8, dtype=torch.float64)
    out = reference_block_sparse_attention(q, k, v, masks.causal(6).with_padding([6, 4]))
    short = reference_block_sparse_attention(q[1:, :, :4], k[1:, :, :4], v[1:, :, :4], masks.causal(4))
    torch.testing.assert_close(out[1:, :, :4], short)


@pytest.mark.parametrize("batch", [1, 3])
def test_to_cudnn_says_the_same_mask(batch):
    generator = torch.Generator().manual_seed(0)
    for size in {1, batch}:
        ends = torch.randint(0, 31, (size, 2, 17, 2, 2), generator=generator)
        bounds = ends.sort(dim=-1).values.flatten(-2).int()
        mask = IntervalMask(bounds, 30)
        ends = mask.to_cudnn(batch).unflatten(-1, (batch, 17))  # [H, 5, B, Nq]
        assert ends.dtype == torch.int32 and (ends.diff(dim=1) >= 0).all()
        keys = torch.arange(30)
        seen = keys < ends[:, 0, ..., None]
        for i in (1, 3):
            seen |= (keys >= ends[:, i, ..., None]) & (keys < ends[:, i + 1, ..., None])
        assert torch.equal(seen.transpose(0, 1), mask.to_bool().expand(batch, -1, -1, -1))


def test_to_cudnn_refuses_what_it_cannot_say():
    mask = IntervalMask(torch.zeros(2, 1, 3, 2, dtype=torch.int32), 4)
    with pytest.raises(ValueError, match="expected batch=2, which the mask has, but got 3"):
        mask.to_cudnn(3)
    keys = torch.tensor([[[0, 3]] * 4], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="without key_bounds"):
        IntervalMask(torch.zeros(1, 1, 3, 2, dtype=torch.int32), 4, key_bounds=keys).to_cudnn()
