"""RAIN: simulated rests, the search tree's bookkeeping, and evaluators that misbehave."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from arcore.decoding import Sampling, Session
from arcore.decoding.laws import outcomes, small_model, text_law
from arcore.zoo.alignment.rain import STEPS, Node, Rain, RainConfig, finish

QUICK = RainConfig(simulations=12, fewest=6, rollout=6)


class Contract:
    """The rests that the evaluator judges are plain samples."""

    bound = 0.0

    def __init__(self) -> None:
        self.model = small_model(3)
        self.law = text_law(self.model, [1, 2], 2, Sampling())

    def draw(self, count: int, seed: int) -> tuple[Tensor, int]:
        session = Session(self.model, [[1, 2]] * count, max_length=4)
        rests = finish(session, 2, torch.arange(count) + seed * 1_000_003)
        return outcomes(torch.tensor(rests), 3), 2 * count

    def plain_calls(self, count: int) -> int:
        return 2 * count


def test_steps_get_longer_visits_add_up_and_the_cache_is_that_of_a_fresh_session() -> None:
    model = small_model(9)
    search = Rain(model, [1, 2], lambda text: 1.0 if text[0] % 2 else -1.0, max_new_tokens=30, config=QUICK)
    best = search.search()

    def walk(node: Node) -> None:
        for child in node.children:
            assert len(child.tokens) == STEPS[min(child.depth, 3)]
            assert child.depth == node.depth + 1
            assert -1.0 <= child.value <= 1.0
            walk(child)

    walk(search.root)
    assert sum(child.own for child in search.root.children) <= QUICK.simulations
    assert sum(child.own for child in search.root.children) >= QUICK.fewest
    assert abs(sum(child.prior for child in search.root.children) - 1) < 1e-5
    # What the evaluator likes is found and committed.
    assert best.tokens[0] % 2 == 1
    assert best.value == 1.0
    fresh = Session(model, search.session.texts, max_length=60)
    torch.testing.assert_close(search.session.logits, fresh.logits)


def test_texts_end_are_repeatable_and_keep_their_statistics() -> None:
    model = small_model(9)

    def run(seed: int) -> list[int]:
        return Rain(
            model, [3], lambda text: len(set(text)) / 9 * 2 - 1, max_new_tokens=9, config=QUICK, seed=seed
        ).run()

    text = run(1)
    assert len(text) == 9
    assert text == run(1)
    stopped = Rain(model, [3], lambda _: 0.0, max_new_tokens=9, config=QUICK, stop=range(9)).run()
    assert len(stopped) == 1
    search = Rain(model, [3], lambda text: 1.0 if text[0] == 4 else -1.0, max_new_tokens=5, config=QUICK)
    search.run()
    assert search.evaluations <= 5 * (QUICK.simulations + 1)


def test_an_evaluator_that_misbehaves_is_named_and_nothing_is_lost() -> None:
    model = small_model(9)
    calls = iter(range(1000))

    def breaks(text: list[int]) -> float:
        return 1 / max(18 - next(calls), 0)

    search = Rain(model, [3], breaks, max_new_tokens=9, config=QUICK)
    with pytest.raises(
        RuntimeError, match=r"the evaluator failed on a text of \d tokens \(ZeroDivisionError"
    ):
        search.run()
    assert len(search.text) >= 1
    for value in (float("nan"), 2.0):
        with pytest.raises(ValueError, match="a value from -1 to 1"):
            Rain(model, [3], lambda _, value=value: value, max_new_tokens=9, config=QUICK).run()
    with pytest.raises(ValueError, match="simulations to be at least 1"):
        RainConfig(simulations=0)
