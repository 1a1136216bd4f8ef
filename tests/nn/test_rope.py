"""Rotary positions on several axes."""

from __future__ import annotations

import pytest
import torch

from arcore.nn import axis_base, rope_table


def score(rope, q, k):
    """Products of one query and one key, each at the position of its row."""
    q, k = rope.apply(q.expand(len(rope.cos), -1)), rope.apply(k.expand(len(rope.cos), -1))
    return q @ k.T


def table(positions, head_dim=64, split=(1, 1), layout="blockdiag", **options):
    bases = [100.0] * len(positions)
    return rope_table(torch.tensor(positions), head_dim, split=split, bases=bases, layout=layout, **options)


@pytest.mark.parametrize("layout", ["blockdiag", "cosmos"])
@pytest.mark.parametrize("inclusive", [False, True])
@pytest.mark.parametrize("split", [(1, 1, 2), (2, 3, 3)])
def test_scores_depend_on_differences_and_norms_stay(layout, inclusive, split):
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 64, generator=generator)
    # Pairs (0, 1), (2, 3) and (4, 5) have equal differences.
    positions = [[0, 1, 4, 5, 7, 8], [3, 5, 0, 2, 6, 8], [2, 1, 9, 8, 5, 4]]
    rope = table(positions, split=split, layout=layout, inclusive=inclusive)
    scores = score(rope, q, k)
    pairs = torch.stack([scores[0, 1], scores[2, 3], scores[4, 5]])
    assert (pairs - pairs[0]).abs().max() <= 1e-5
    norms = rope.apply(q.expand(6, -1)).norm(dim=-1)
    torch.testing.assert_close(norms, q.norm().expand(6), rtol=1e-6, atol=0)


def test_the_released_layout_of_acdit_is_no_rotation():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 64, generator=generator)
    positions = [[0, 1, 4, 5, 7, 8], [3, 5, 0, 2, 6, 8]]
    rope = table(positions, layout="acdit_v0", inclusive=True)
    scores = score(rope, q, k)
    assert (scores[0, 1] - scores[2, 3]).abs() > 0.01
    assert (rope.apply(q.expand(6, -1)).norm(dim=-1) / q.norm() - 1).abs().max() > 0.01


def test_cosmos_is_blockdiag_in_another_order_of_channels():
    x = torch.randn(5, 64)
    positions = torch.randint(9, (3, 5)).tolist()
    block = table(positions, split=(2, 3, 3))
    halves = table(positions, split=(2, 3, 3), layout="cosmos")
    starts, widths = (0, 16, 40), (16, 24, 24)
    first = [torch.arange(s, s + w // 2) for s, w in zip(starts, widths, strict=True)]
    second = [torch.arange(s + w // 2, s + w) for s, w in zip(starts, widths, strict=True)]
    order = torch.cat(first + second)
    torch.testing.assert_close(halves.apply(x[:, order]), block.apply(x)[:, order], rtol=0, atol=0)


def test_rates_and_pairs():
    """One pair per axis: position times rate 1, the first channel with the second."""
    rope = table([[2], [3]], head_dim=4)
    out = rope.apply(torch.tensor([[1.0, 0.0, 0.0, 1.0]]))
    angles = torch.tensor([2.0, 3.0])
    expected = [angles[0].cos(), angles[0].sin(), -angles[1].sin(), angles[1].cos()]
    torch.testing.assert_close(out[0], torch.stack(expected))
    inclusive = table([[1.0]], head_dim=8, split=(1,), inclusive=True)
    rates = [1, 100 ** (-1 / 3), 100 ** (-2 / 3), 0.01]
    torch.testing.assert_close(inclusive.cos[0, :4], torch.tensor(rates).cos())
    standard = table([[1.0]], head_dim=8, split=(1,))
    torch.testing.assert_close(standard.cos[0, :4], torch.tensor([1, 100**-0.25, 0.1, 100**-0.75]).cos())


def test_bases_of_acdit():
    assert [axis_base(length) for length in (4, 16, 32, 64, 1024)] == [100, 100, 100, 200, 2700]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: table([[0], [0]], layout="rows"), "layout to be"),
        (lambda: table([[0], [0]], split=(1,)), "for each of A axes"),
        (lambda: table([[0], [0]], head_dim=6), "even numbers of channels"),
        (lambda: table([[0], [0]], split=(0, 1)), "even numbers of channels"),
    ],
)
def test_bad_tables(call, message):
    with pytest.raises(ValueError, match=message):
        call()
