"""What every decoder must do. A system's test file has a class `Contract` like `RejectionSampling` below."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from .conftest import contracts


class RejectionSampling:
    """A test double: draws of a draft, kept with probability p / q, else replaced by a draw of what is left.

    A contract of a decoder has the exact `law` that plain sampling has over some outcomes (float64 `[K]`),
    `draw(count, seed)` (int64 `[count]` outcomes and the number of calls of the model), `plain_calls(count)`, and
    `bound`: how far the law may be from plain sampling in total variation, 0 where the paper calls it lossless.
    """

    bound = 0.0

    def __init__(self) -> None:
        self.law = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
        self.draft = torch.tensor([0.25, 0.25, 0.25, 0.25], dtype=torch.float64)

    def draw(self, count: int, seed: int) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(seed)
        drafted = self.draft.multinomial(count, True, generator=generator)
        kept = torch.rand(count, generator=generator, dtype=torch.float64) < (self.law / self.draft)[drafted]
        left = (self.law - self.draft).clamp(min=0).multinomial(count, True, generator=generator)
        return torch.where(kept, drafted, left), count

    def plain_calls(self, count: int) -> int:
        return count


@pytest.fixture(params=contracts("decoder", RejectionSampling))
def contract(request: pytest.FixtureRequest) -> Any:
    return request.param()


def g_statistic(counts: Tensor, law: Tensor) -> float:
    seen = counts > 0
    return float(2 * (counts[seen] * (counts[seen] / (law[seen] * counts.sum())).log()).sum())


def test_draws_have_the_promised_law(contract: Any) -> None:
    stats = pytest.importorskip("scipy.stats")
    outcomes, _ = contract.draw(20_000, seed=0)
    counts = torch.bincount(outcomes, minlength=len(contract.law)).double()
    assert len(counts) == len(contract.law)
    if contract.bound == 0:
        assert stats.chi2.sf(g_statistic(counts, contract.law), len(counts) - 1) > 1e-4
        # The test can fail: another law of that size would be found.
        other = (
            contract.law.flip(0)
            if not torch.allclose(contract.law, contract.law.flip(0))
            else contract.law**2
        )
        assert stats.chi2.sf(g_statistic(counts, other / other.sum()), len(counts) - 1) < 1e-6
    else:
        distance = 0.5 * (counts / counts.sum() - contract.law).abs().sum()
        assert distance <= contract.bound + 3 * (len(counts) / 20_000) ** 0.5 / 2


def test_draws_are_repeatable(contract: Any) -> None:
    one, calls = contract.draw(100, seed=3)
    again, as_many = contract.draw(100, seed=3)
    assert torch.equal(one, again)
    assert calls == as_many
    assert not torch.equal(one, contract.draw(100, seed=4)[0])


def test_calls_of_the_model_are_counted(contract: Any) -> None:
    _, calls = contract.draw(200, seed=1)
    assert 0 < calls <= contract.plain_calls(200)
