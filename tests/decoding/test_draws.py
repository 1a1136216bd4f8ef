"""Seeds of rows, and settings."""

from __future__ import annotations

import math

import pytest
import torch

from arcore.decoding import row_seeds
from arcore.decoding.draws import check_settings


def test_rows_of_one_number():
    seeds = row_seeds(5, 1000)
    assert seeds.dtype == torch.int64
    assert len(torch.cat([seeds, row_seeds(6, 1000)]).unique()) == 2000
    # Fewer rows: the same ones.
    assert torch.equal(row_seeds(5, 4), seeds[:4])
    assert row_seeds(5, 0).shape == (0,)
    # All 64 bits are in use.
    ones = ((seeds.unsqueeze(1) >> torch.arange(64)) & 1).double().mean(0)
    assert (ones - 0.5).abs().max() < 5 * 0.5 / math.sqrt(1000)
    # Kept as it is: the same seed must give the same pictures in every version.
    assert row_seeds(5, 2).tolist() == [1353502877876791966, -6347461878393215852]
    assert row_seeds(10**30, 1).shape == (1,)


def test_rows_with_numbers_of_their_own():
    assert row_seeds([8, -9], 2).tolist() == [8, -9]
    assert row_seeds([-(2**63), 2**63 - 1], 2).tolist() == [-(2**63), 2**63 - 1]
    with pytest.raises(ValueError, match="expected one seed, or 3 of them, one per row, but got 2"):
        row_seeds([1, 2], 3)
    with pytest.raises(ValueError, match=r"expected seeds of rows from -2\^63 to 2\^63 - 1 but got"):
        row_seeds([2**63], 1)


def test_seeds_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    row_seeds(5, 4)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": -2}, "expected top_k >= -1 but got -2; None, 0 and -1 keep all"),
        ({"top_p": -0.5}, r"expected 0 <= top_p <= 1 but got -0\.5"),
        ({"top_p": 1.1}, r"but got 1\.1"),
        ({"top_p": math.nan}, "but got nan"),
        ({"min_p": 1.5}, r"expected 0 <= min_p <= 1 but got 1\.5"),
        ({"temperature": -1.0}, r"finite temperature >= 0 but got -1\.0"),
        ({"temperature": math.nan}, "but got nan"),
        ({"temperature": math.inf}, "but got inf"),
    ],
)
def test_bad_settings(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        check_settings(**settings)
