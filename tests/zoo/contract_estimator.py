"""What every estimator must do. A system's test file has a class `Contract` like `MeanInterval` below."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .conftest import contracts

base = pytest.importorskip("sklearn.base")


class MeanInterval(base.BaseEstimator):
    """An interval of the mean of a column, by the normal law."""

    def __init__(self, width: float = 2.5) -> None:
        self.width = width

    def fit(self, X: Any, y: Any = None) -> MeanInterval:
        half = self.width * X.std() / len(X) ** 0.5
        self.interval_ = (float(X.mean() - half), float(X.mean() + half))
        return self


class MeanOfAColumn:
    """A test double. A contract of an estimator has

    `make()` (an estimator with default settings), `data(seed)` (arguments of `fit`), `covers(fitted, seed)` (whether
    what was estimated is right about the known truth), `runs` and `least`: of so many seeds, how many must be covered.
    """

    runs, least = 40, 36

    def make(self) -> Any:
        return MeanInterval()

    def data(self, seed: int) -> tuple[Any, ...]:
        return (torch.randn(200, 1, generator=torch.Generator().manual_seed(seed)).numpy() + 3.0,)

    def covers(self, fitted: Any, seed: int) -> bool:
        low, high = fitted.interval_
        return low <= 3.0 <= high and high - low < 1.0


@pytest.fixture(params=contracts("estimator", MeanOfAColumn))
def contract(request: pytest.FixtureRequest) -> Any:
    return request.param()


def test_covers_a_known_truth(contract: Any) -> None:
    covered = 0
    for seed in range(contract.runs):
        fitted = contract.make()
        assert fitted.fit(*contract.data(seed)) is fitted
        covered += bool(contract.covers(fitted, seed))
    assert covered >= contract.least


def test_keeps_to_scikit_learns_conventions(contract: Any) -> None:
    one = contract.make()
    settings = one.get_params()
    assert settings
    other = base.clone(one)
    assert other is not one
    assert other.get_params() == settings
    name = next(iter(settings))
    assert one.set_params(**{name: settings[name]}) is one
    # The constructor stores settings and nothing else; what is learnt ends in _.
    assert set(vars(one)) == set(settings)
    one.fit(*contract.data(0))
    learnt = set(vars(one)) - set(settings)
    assert learnt
    assert all(key.endswith("_") or key.startswith("_") for key in learnt)
    with pytest.raises((ValueError, TypeError)):
        one.set_params(no_such_setting=1)


def test_the_same_data_give_the_same_result(contract: Any) -> None:
    fits = [vars(contract.make().fit(*contract.data(1))) for _ in range(2)]
    learnt = [key for key in fits[0] if key.endswith("_")]
    assert learnt
    for key in learnt:
        assert repr(fits[0][key]) == repr(fits[1][key])
