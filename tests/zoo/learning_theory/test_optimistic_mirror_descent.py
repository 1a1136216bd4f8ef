"""Optimistic mirror descent: its two steps, projections, step sizes, games, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from arcore.zoo.learning_theory.optimistic_mirror_descent import MirrorDescent, play_game, regret


def test_the_two_steps_by_hand():
    learner = MirrorDescent([0.0, 0.0], domain="box", radius=10.0, step=0.5)
    assert learner.play().tolist() == [0, 0]
    learner.update([1.0, -2.0])
    # h moved by the gradient, and the guess moves once more.
    assert learner.base.tolist() == [-0.5, 1.0]
    assert learner.play().tolist() == [-1.0, 2.0]
    learner.update([0.0, 2.0])
    assert learner.base.tolist() == [-0.5, 0.0]
    assert learner.deviation == 5 + 1 + 16
    plain = MirrorDescent([0.0, 0.0], domain="box", radius=10.0, step=0.5, optimism=False)
    plain.update([1.0, -2.0])
    assert plain.play().tolist() == [-0.5, 1.0]


def test_step_sizes():
    learner = MirrorDescent([0.0, 0.0])
    assert learner.eta == 2
    learner.update([3.0, 0.0])
    assert learner.eta == pytest.approx(2 / math.sqrt(10))
    strong = MirrorDescent([0.0, 0.0], strong=4.0)
    etas = []
    for _ in range(3):
        etas.append(strong.eta)
        strong.update([1.0, 0.0])
    assert etas == pytest.approx([1 / 2, 1 / 4, 1 / 6])


@pytest.mark.parametrize("domain", ["ball", "box", "simplex"])
def test_projections_are_the_nearest_points(domain: Any):
    random = np.random.default_rng(0)
    learner = MirrorDescent([1.0, 0.0, 0.0], domain=domain, step=1.0)
    for _ in range(20):
        point = 2 * random.standard_normal(3)
        found = learner._project(point)
        # No way from the nearest point of a convex set into the set leads towards the point.
        inside = [learner._project(2 * random.standard_normal(3)) for _ in range(50)]
        assert max((point - found) @ (other - found) for other in inside) < 1e-12
        np.testing.assert_allclose(learner._project(found), found, atol=1e-12)


def test_steps_that_multiply_are_exponential_weights():
    learner = MirrorDescent([0.2, 0.8], domain="entropy", step=0.5, optimism=False)
    learner.update([1.0, 0.0])
    wanted = np.array([0.2 * math.exp(-0.5), 0.8])
    np.testing.assert_allclose(learner.play(), wanted / wanted.sum(), rtol=1e-14)
    # A response that lost badly can come back.
    learner.update([1e6, 0.0])
    assert learner.play()[0] > 0
    learner.update([-1e6, 0.0])
    assert learner.play()[0] > 0.99


def test_only_optimistic_players_reach_the_equilibrium():
    table = [[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]
    away = {
        optimism: np.abs(play_game(table, optimism=optimism, rounds=1500)[-1] - 1 / 3).sum()
        for optimism in (True, False)
    }
    assert away[True] < 0.1
    assert away[False] > 0.5


def test_regret_of_one_cost_is_what_the_first_steps_lose():
    """Of a constant cost (1, 0): the ball's point (-1, 0) is best, and only play at 0 in round 1 loses."""
    found = regret(lambda: MirrorDescent([0.0, 0.0], step=1.0), noise=0.0, drift=0.0, rounds=50, seed=0)
    assert found == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"domain": "sphere"},
            "expected domain to be one of 'ball', 'box', 'simplex', 'entropy' but got 'sphere'",
        ),
        ({"step": 1.0, "strong": 1.0}, "expected step or strong but got both"),
        ({"step": 0.0}, "expected step > 0 but got 0"),
        ({"strong": math.inf}, "expected strong > 0 but got inf"),
        ({"start": [2.0, 0.0]}, r"expected start \[d\] in the ball but got"),
        ({"start": [0.5, 0.4], "domain": "simplex"}, r"expected start \[d\] in the simplex"),
        ({"start": [1.0, 0.0], "domain": "entropy"}, "expected a positive start"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        MirrorDescent(**({"start": [0.5, 0.5]} | settings))


@pytest.mark.parametrize("gradient", [[1.0], [math.nan, 0.0]])
def test_bad_gradients_change_nothing(gradient: Any):
    learner = MirrorDescent([0.5, 0.5])
    with pytest.raises(ValueError, match=r"expected a finite gradient of shape \(2,\)"):
        learner.update(gradient)
    assert learner.rounds == 0
    assert learner.base.tolist() == [0.5, 0.5]
