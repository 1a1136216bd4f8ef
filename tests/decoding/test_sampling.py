"""Filters, draws and seeds."""

from __future__ import annotations

import math

import pytest
import torch

from arcore.decoding import RowSeeds, filter_logits, sample


def kept(logits: torch.Tensor) -> list[int]:
    return logits.isfinite().nonzero().flatten().tolist()


def test_top_k_keeps_ties():
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0])
    assert kept(filter_logits(logits, top_k=1)) == [1]
    assert kept(filter_logits(logits, top_k=2)) == [1, 2, 3]
    assert kept(filter_logits(logits, top_k=4)) == [0, 1, 2, 3]
    assert filter_logits(logits, top_k=5) is logits
    assert filter_logits(logits, top_k=900) is logits


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (0.05, [1]),
        (0.45, [1]),
        (0.55, [1, 3]),
        (0.75, [1, 3]),
        (0.85, [0, 1, 3]),
        (0.97, [0, 1, 2, 3]),
        (1.0, [0, 1, 2, 3]),
    ],
)
def test_top_p_drops_the_tail(top_p: float, expected: list[int]):
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log()
    assert kept(filter_logits(logits, top_p=top_p)) == expected


def test_top_p_looks_at_what_top_k_left():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert kept(filter_logits(logits, top_k=2)) == [0, 1]
    # 0.4 / 0.7 = 0.57 of the mass that is left.
    assert kept(filter_logits(logits, top_k=2, top_p=0.5)) == [0]
    assert kept(filter_logits(logits, top_p=0.5)) == [0, 1]


def test_filters_work_row_by_row_and_leave_their_input():
    logits = torch.randn(2, 3, 50)
    before = logits.clone()
    out = filter_logits(logits, top_k=7, top_p=0.8)
    assert torch.equal(logits, before)
    for b in range(2):
        for n in range(3):
            assert torch.equal(out[b, n], filter_logits(logits[b, n], top_k=7, top_p=0.8))
    assert torch.equal(out[out.isfinite()], logits[out.isfinite()])


def test_draws_follow_the_distribution():
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2])
    n = 20_000
    drawn = sample(probabilities.log().expand(1, n, 4), RowSeeds(3, 1).uniforms(n))
    counts = drawn.flatten().bincount(minlength=4) / n
    # Five standard deviations.
    limit = 5 * (probabilities * (1 - probabilities) / n).sqrt()
    assert ((counts - probabilities).abs() <= limit).all()
    assert counts[1] == 0


def test_inverse_of_the_cumulative_distribution():
    logits = torch.tensor([0.0, 0.25, 0.25, 0.0, 0.5, 0.0]).log()
    for uniform, token in ((0.0, 1), (0.2499, 1), (0.2501, 2), (0.4999, 2), (0.5001, 4), (1 - 2**-53, 4)):
        assert sample(logits.view(1, 1, 6), torch.tensor([[uniform]], dtype=torch.float64)).item() == token


def test_temperature():
    logits = torch.tensor([[[0.0, 1.0, 2.0]]])
    n = 5000
    uniforms = RowSeeds(0, 1).uniforms(n)

    def share(temperature: float) -> float:
        return (sample(logits.expand(1, n, 3), uniforms, temperature=temperature) == 2).double().mean().item()

    for temperature in (0.5, 1.0, 4.0):
        p = torch.softmax(logits.flatten() / temperature, 0)[2].item()
        assert abs(share(temperature) - p) <= 5 * math.sqrt(p * (1 - p) / n)
    assert share(0.0) == 1.0
    assert share(1e-6) == 1.0


def test_rows_have_their_own_seeds():
    whole = RowSeeds(5, 4)
    first, second = whole.uniforms(6), whole.uniforms(3)
    assert first.dtype == torch.float64
    assert len(first.unique()) == 24
    assert not torch.equal(first[:, :3], second)
    # Fewer rows, another count per call: row i sees the same numbers.
    other = RowSeeds(5, 2)
    assert torch.equal(
        torch.cat([other.uniforms(4), other.uniforms(5)], 1), torch.cat([first, second], 1)[:2]
    )
    assert torch.equal(RowSeeds([8, 9], 2).uniforms(3)[1], RowSeeds([9], 1).uniforms(3)[0])
    assert not torch.equal(RowSeeds(6, 1).uniforms(3), RowSeeds(5, 1).uniforms(3))
    assert RowSeeds(5, 0).uniforms(3).shape == (0, 3)


def test_seeds_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    RowSeeds(5, 4).uniforms(6)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 0}, "expected top_k >= 1 but got 0; None keeps all"),
        ({"top_p": 0.0}, "expected 0 < top_p <= 1 but got 0.0"),
        ({"top_p": 1.1}, "but got 1.1"),
        ({"top_p": math.nan}, "but got nan"),
        ({"temperature": -1.0}, "finite temperature >= 0 but got -1.0"),
        ({"temperature": math.nan}, "but got nan"),
        ({"temperature": math.inf}, "but got inf"),
    ],
)
def test_bad_settings(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        sample(torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.float64), **settings)


def test_bad_shapes():
    with pytest.raises(ValueError, match=r"uniforms of shape \(1, 2\) but got \(1, 3\)"):
        sample(torch.zeros(1, 2, 3), torch.zeros(1, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="expected one seed, or 3 of them, one per row, but got 2"):
        RowSeeds([1, 2], 3)
