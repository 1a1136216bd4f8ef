"""Every constructor against its definition, written pair by pair."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from arcore import masks
from arcore.masks import IntervalMask, TreeMask

Rule = Callable[[int, int], bool]


def table(nq: int, nk: int, allowed: Rule) -> Tensor:
    return torch.tensor([[allowed(i, j) for j in range(nk)] for i in range(nq)], dtype=torch.bool).view(
        nq, nk
    )


def one(mask: IntervalMask) -> Tensor:
    assert mask.shape[:2] == (1, 1)
    return mask.to_bool()[0, 0]


def level(sizes: list[int]) -> list[int]:
    return [k for k, size in enumerate(sizes) for _ in range(size)]


@pytest.mark.parametrize("n", [0, 1, 2, 17])
@pytest.mark.parametrize("offset", [0, 1, 5])
def test_causal(n: int, offset: int) -> None:
    mask = masks.causal(n, offset)
    assert (mask.nq, mask.nk) == (n, n + offset)
    assert torch.equal(one(mask), table(n, n + offset, lambda i, j: j <= i + offset))


@pytest.mark.parametrize(("nq", "nk"), [(0, 0), (0, 3), (3, 0), (2, 5)])
def test_full(nq: int, nk: int) -> None:
    assert torch.equal(one(masks.full(nq, nk)), table(nq, nk, lambda i, j: True))


@pytest.mark.parametrize("scales", [(1,), (1, 2, 3, 4), (2, 2), (3, 1, 2)])
def test_next_scale(scales: tuple[int, ...]) -> None:
    lvl = level([s * s for s in scales])
    n = len(lvl)
    assert torch.equal(one(masks.next_scale(scales)), table(n, n, lambda i, j: lvl[i] >= lvl[j]))
    assert torch.equal(one(masks.next_scale_markov(scales)), table(n, n, lambda i, j: lvl[i] == lvl[j]))


def test_next_scale_of_the_paper() -> None:
    scales = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    lvl = torch.tensor(level([s * s for s in scales]))
    mask = masks.next_scale(scales)
    assert (mask.nq, mask.nk) == (680, 680)
    assert torch.equal(one(mask), lvl[:, None] >= lvl[None, :])
    assert mask.density == pytest.approx(0.619, abs=5e-4)
    assert masks.next_scale_markov(scales).density == pytest.approx(0.239, abs=5e-4)


def skip_causal_rule(num_blocks: int, block_size: int) -> Rule:
    """ACDiT's definition over block indices of ``[clean; noisy]``."""

    def allowed(i: int, j: int) -> bool:
        q, k, t = i // block_size, j // block_size, num_blocks
        return (q < t and k < t and q >= k) or (q >= t and k < t and q - t > k) or q == k

    return allowed


@pytest.mark.parametrize("drop_last_clean", [False, True])
@pytest.mark.parametrize("order", ["clean_first", "noisy_first"])
@pytest.mark.parametrize(("num_blocks", "block_size"), [(1, 1), (1, 3), (2, 1), (3, 2), (4, 5)])
def test_skip_causal(num_blocks: int, block_size: int, order: str, drop_last_clean: bool) -> None:
    half = num_blocks * block_size
    whole = table(2 * half, 2 * half, skip_causal_rule(num_blocks, block_size))
    clean, noisy = list(range(half)), list(range(half, 2 * half))
    if drop_last_clean:
        clean = clean[:-block_size]
    kept = clean + noisy if order == "clean_first" else noisy + clean
    mask = masks.skip_causal(num_blocks, block_size, order=order, drop_last_clean=drop_last_clean)
    assert mask.nq == (2 * num_blocks - drop_last_clean) * block_size
    assert torch.equal(one(mask), whole[kept][:, kept])


def test_last_clean_block_feeds_no_noisy_row() -> None:
    mask = one(masks.skip_causal(4, 3))
    assert not mask[12:, 9:12].any()


@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("block", [1, 2, 5])
def test_skip_causal_step(block: int, block_size: int) -> None:
    """The step's rows are those that the same tokens have in the training mask."""
    num_blocks = block + 1
    training = one(masks.skip_causal(num_blocks, block_size))
    clean = list(range(block * block_size))
    noisy = list(range((num_blocks + block) * block_size, (num_blocks + block + 1) * block_size))
    keys = clean + noisy
    rows = clean[-block_size:] + noisy
    mask = masks.skip_causal_step(block, block_size)
    assert (mask.nq, mask.nk) == (2 * block_size, (block + 1) * block_size)
    assert torch.equal(one(mask), training[rows][:, keys])


def test_skip_causal_step_of_the_first_block() -> None:
    assert masks.skip_causal_step(0, 4) == masks.full(4, 4)


@pytest.mark.parametrize("prefix", [0, 1, 4, 9])
def test_prefix_lm(prefix: int) -> None:
    expected = table(9, 9, lambda i, j: j < prefix or j <= i)
    assert torch.equal(one(masks.prefix_lm(9, prefix)), expected)


@pytest.mark.parametrize("prefixes", [[0, 4, 9], (0, 4, 9), torch.tensor([0, 4, 9])])
def test_prefix_lm_of_a_batch(prefixes: list[int] | tuple[int, ...] | Tensor) -> None:
    mask = masks.prefix_lm(9, prefixes)
    assert mask.shape == (3, 1, 9, 9)
    for b, prefix in enumerate((0, 4, 9)):
        assert torch.equal(mask.to_bool()[b], masks.prefix_lm(9, prefix).to_bool()[0])


@pytest.mark.parametrize("lengths", [[5], [3, 1, 4], [0, 2, 0, 0, 3, 0], [0]])
@pytest.mark.parametrize("causal", [True, False])
def test_documents(lengths: list[int], causal: bool) -> None:
    doc = level(lengths)
    n = len(doc)
    expected = table(n, n, lambda i, j: doc[i] == doc[j] and (j <= i or not causal))
    assert torch.equal(one(masks.documents(lengths, causal=causal)), expected)
    assert masks.documents(torch.tensor(lengths), causal=causal) == masks.documents(lengths, causal)


@pytest.mark.parametrize("window", [1, 3, 50])
@pytest.mark.parametrize("sinks", [0, 1, 4, 12])
def test_sliding_window(window: int, sinks: int) -> None:
    expected = table(12, 12, lambda i, j: j <= i and (i - j < window or j < sinks))
    assert torch.equal(one(masks.sliding_window(12, window, sinks)), expected)


@pytest.mark.parametrize("sizes", [[4], [1, 3, 2], [0, 2, 0, 5], [1] * 6])
def test_block_causal(sizes: list[int]) -> None:
    block = level(sizes)
    n = len(block)
    assert torch.equal(one(masks.block_causal(sizes)), table(n, n, lambda i, j: block[i] >= block[j]))


def test_block_causal_links_the_family() -> None:
    assert masks.block_causal([1] * 7) == masks.causal(7)
    assert masks.block_causal([1, 4, 9]) == masks.next_scale((1, 2, 3))
    assert masks.documents([1, 4, 9], causal=False) == masks.next_scale_markov((1, 2, 3))
    assert masks.sliding_window(7, 7) == masks.causal(7) == masks.prefix_lm(7, 0)


def test_tree_is_a_tree_mask() -> None:
    assert isinstance(masks.tree([-1, 0], 3), TreeMask)


SCALES_1024 = (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)


@pytest.mark.parametrize(
    "build",
    [
        lambda: masks.next_scale(SCALES_1024),
        lambda: masks.next_scale_markov(SCALES_1024),
        lambda: masks.skip_causal(16, 295),
        lambda: masks.causal(9451),
        lambda: masks.documents([9451]),
        lambda: masks.sliding_window(9451, 512, 4),
        lambda: masks.block_causal([1] * 9451),
        lambda: masks.prefix_lm(9451, 100),
    ],
)
def test_long_masks_take_milliseconds(build: Callable[[], IntervalMask]) -> None:
    """A loop over 9451 rows, or anything of their square, takes far longer than this allows."""
    build()
    fastest = min(_seconds(build) for _ in range(5))
    assert fastest < 0.05


def _seconds(build: Callable[[], object]) -> float:
    start = time.process_time()
    build()
    return time.process_time() - start


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (lambda: masks.causal(-1), ValueError, "masks.causal: expected n to be at least 0 but got -1"),
        (lambda: masks.causal(2.5), TypeError, "expected n to be an integer but got 2.5 of type float"),
        (lambda: masks.causal(True), TypeError, "expected n to be an integer but got True of type bool"),
        (lambda: masks.causal(4, offset=-2), ValueError, "expected offset to be at least 0"),
        (lambda: masks.causal(2**31), ValueError, "expected n to be at most 2147483647"),
        (lambda: masks.full(2, -1), ValueError, "masks.full: expected nk to be at least 0"),
        (
            lambda: masks.next_scale(()),
            ValueError,
            "masks.next_scale: expected scales to hold at least one entry",
        ),
        (lambda: masks.next_scale(4), TypeError, "expected scales to be a sequence of integers but got int"),
        (
            lambda: masks.next_scale("123"),
            TypeError,
            "expected scales to be a sequence of integers but got str",
        ),
        (lambda: masks.next_scale((1, 0)), ValueError, r"expected scales\[1\] to be at least 1 but got 0"),
        (lambda: masks.next_scale((1, 1.5)), TypeError, r"expected scales\[1\] to be an integer"),
        (
            lambda: masks.next_scale((2**16,)),
            ValueError,
            "masks.next_scale: expected the number of tokens to be at most",
        ),
        (lambda: masks.next_scale_markov((-1,)), ValueError, "masks.next_scale_markov: expected scales"),
        (
            lambda: masks.skip_causal(0, 4),
            ValueError,
            "masks.skip_causal: expected num_blocks to be at least 1",
        ),
        (lambda: masks.skip_causal(4, 0), ValueError, "expected block_size to be at least 1"),
        (
            lambda: masks.skip_causal(2, 2, order="mixed"),
            ValueError,
            "one of 'clean_first', 'noisy_first' but got 'mixed'",
        ),
        (
            lambda: masks.skip_causal_step(-1, 4),
            ValueError,
            "masks.skip_causal_step: expected block to be at least 0",
        ),
        (lambda: masks.prefix_lm(4, 5), ValueError, r"expected prefix from 0 to n=4 but got \[5\]"),
        (lambda: masks.prefix_lm(4, [1, -1]), ValueError, r"expected prefix from 0 to n=4 but got \[1, -1\]"),
        (lambda: masks.prefix_lm(4, []), ValueError, r"expected prefix from 0 to n=4 but got \[\]"),
        (lambda: masks.prefix_lm(4, 1.5), TypeError, "expected prefix of an integer dtype but got float32"),
        (
            lambda: masks.prefix_lm(4, "one"),
            TypeError,
            "expected prefix to be made of integers but got 'one'",
        ),
        (
            lambda: masks.documents([3, -1]),
            ValueError,
            r"masks.documents: expected lengths\[1\] to be at least 0",
        ),
        (
            lambda: masks.documents(torch.ones(2, 2).long()),
            ValueError,
            r"expected lengths of shape \[n\] but got \(2, 2\)",
        ),
        (lambda: masks.sliding_window(4, 0), ValueError, "expected window to be at least 1"),
        (lambda: masks.sliding_window(4, 2, 5), ValueError, "expected sinks to be at most n=4 but got 5"),
        (
            lambda: masks.block_causal([]),
            ValueError,
            "masks.block_causal: expected sizes to hold at least one entry",
        ),
        (
            lambda: masks.block_causal([2**30, 2**30]),
            ValueError,
            "expected the sum of sizes to be at most 2147483647",
        ),
    ],
)
def test_bad_arguments(build: Callable[[], object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        build()


def test_masks_are_made_on_the_cpu_whatever_the_default_device() -> None:
    with torch.device("meta"):
        mask = masks.skip_causal(2, 3).with_padding([12, 9])
        plan = mask.plan(4, 4)
        tree = masks.tree([-1, 0], [2, 3])
    assert mask.device.type == plan.col_idx.device.type == tree.device.type == "cpu"
    assert mask == masks.skip_causal(2, 3).with_padding([12, 9])
    assert tree == masks.tree([-1, 0], [2, 3])
