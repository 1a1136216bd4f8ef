"""Dynamic reward weighting: the loss, hypervolumes, both kinds of weights, and what is refused."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from arcore.zoo.alignment.dynamic_reward_weighting import (
    HypervolumeWeight,
    Options,
    gradient_weights,
    hypervolume,
    learn,
    run,
    weighted_reward_loss,
)

Batch = dict[str, Tensor]
WEIGHTS = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)


class Contract:
    learns = ("logprobs",)
    tolerance = 1e-12

    def batch(self, seed: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        old = -torch.rand(6, 5, generator=generator, dtype=torch.float64)
        return {
            "logprobs": old + 0.4 * torch.randn(6, 5, generator=generator, dtype=torch.float64),
            "old": old,
            "rewards": torch.rand(6, 3, generator=generator, dtype=torch.float64),
            "groups": torch.tensor([1, 1, 1, 4, 4, 4]),
            "mask": torch.arange(5) < torch.tensor([5, 1, 4, 3, 2, 5])[:, None],
        }

    def loss(self, batch: Batch, weights: Tensor = WEIGHTS) -> Tensor:
        return weighted_reward_loss(**batch, weights=weights)

    def reference(self, batch: Batch) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        combined = [sum(r * w for r, w in zip(row, WEIGHTS, strict=True)).item() for row in batch["rewards"]]
        for row, group in enumerate(batch["groups"].tolist()):
            own = [c for c, other in zip(combined, batch["groups"].tolist(), strict=True) if other == group]
            gain = combined[row] - sum(own) / len(own)
            places = batch["mask"][row].nonzero()[:, 0]
            for place in places:
                ratio = (batch["logprobs"][row, place] - batch["old"][row, place]).exp()
                total = total - ratio * gain / (len(places) * 6)
        return total

    def special_case(self) -> tuple[Tensor, Tensor]:
        """It is linear in the weights: one reward after the other."""
        batch = self.batch(3)
        alone = [self.loss(batch, weights=one) for one in torch.eye(3, dtype=torch.float64)]
        return self.loss(batch), (torch.stack(alone) * WEIGHTS).sum()

    def padded(self, batch: Batch) -> Batch:
        wide = {n: torch.nn.functional.pad(batch[n], (0, 2), value=math.nan) for n in ("logprobs", "old")}
        return batch | wide | {"mask": torch.nn.functional.pad(batch["mask"], (0, 2))}


def test_known_hypervolumes():
    assert hypervolume([], [0.0, 0.0]) == 0
    assert hypervolume([[2.0, 1.0], [1.0, 3.0], [1.0, 1.0], [-1.0, 9.0]], [0.0, 0.0]) == 4
    assert hypervolume([[2.0, 1.0], [2.0, 1.0]], [1.0, -1.0]) == 2
    assert hypervolume([[1.0, 1.0, 1.0], [2.0, 0.5, 0.5]], [0.0, 0.0, 0.0]) == 1.25


@pytest.mark.parametrize("width", [2, 3, 4])
def test_hypervolume_on_a_grid(width: int):
    """Points with whole coordinates: the cells that one of them covers are counted."""
    points = np.random.default_rng(width).integers(0, 5, (8, width))
    cells = np.stack(np.meshgrid(*[np.arange(5)] * width, indexing="ij"), -1).reshape(-1, width)
    covered = (cells[:, None] < points[None]).all(-1).any(1).sum()
    assert hypervolume(points, np.zeros(width)) == covered


def test_factors_reward_a_wider_front():
    keeper = HypervolumeWeight([0.0, 0.0])
    assert keeper.update([0.5, 0.5]) == pytest.approx(0.5 + 1.5 * math.tanh(0.25))
    assert keeper.update([0.4, 0.5]) == 0.5
    assert len(keeper.points) == 1
    assert keeper.update([0.25, 1.0]) == pytest.approx(0.5 + 1.5 * math.tanh(0.125))
    assert keeper.volume == pytest.approx(0.375)
    assert keeper.update([100.0, 100.0]) == pytest.approx(2.0)


def test_gradient_weights_by_hand():
    gradients = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    found = gradient_weights(torch.tensor([0.25, 0.75], dtype=torch.float64), gradients, lr=0.5, mu=2.0)
    wanted = torch.tensor([0.25 * math.exp(1.0), 0.75 * math.exp(0.25)], dtype=torch.float64)
    torch.testing.assert_close(found, wanted / wanted.sum())


def test_the_neglected_reward_gains_weight():
    found = learn("gradient", seed=0, limit=8, batch=32)
    assert (found.steps, found.reached) == (8, False)
    assert found.hardest != 1
    assert learn("fixed", seed=0, limit=2, batch=32).hardest == pytest.approx(1.0)
    counted = learn("hypervolume", seed=0, limit=8, batch=32, every=2)
    assert counted.hardest != 1
    assert 0.5 <= counted.hardest <= 2


def test_the_command_compares_the_variants():
    report = run(Options(seeds=2, limit=3, batch=16))
    assert list(report.values) == ["fixed", "gradient", "hypervolume"]
    assert ">3, >3" in report.text
    assert report.draw is not None
    report.draw(pytest.importorskip("matplotlib.figure").Figure())
    assert list(run(Options(variant="hypervolume", seeds=1, limit=1)).values) == ["hypervolume"]


def test_a_front_goes_on_from_its_state():
    first = HypervolumeWeight([0.0, 0.0])
    first.update([1.0, 0.5])
    second = HypervolumeWeight.of_state(json.loads(json.dumps(first.state())))
    assert second.update([0.5, 1.0]) == first.update([0.5, 1.0]) == pytest.approx(0.5 + 1.5 * math.tanh(0.25))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Options(weights=(0.0, 1.0, 1.0)), "--weights: expected three numbers above 0"),
        (lambda: Options(every=0), "--every: expected at least 1 but got 0"),
        (lambda: Options(lr=math.nan), "--lr: expected a number of at least 0"),
        (
            lambda: hypervolume([[1.0]], [0.0, 0.0]),
            r"expected points \[n, M\] and reference \[M\] but got \[1, 1\]",
        ),
        (lambda: hypervolume([[1.0, math.nan]], [0.0, 0.0]), "expected finite numbers but got NaN"),
        (lambda: HypervolumeWeight([0.0]).update([math.inf]), "expected finite numbers"),
        (lambda: gradient_weights(torch.ones(2), torch.ones(3, 4), lr=1.0), r"but got \(2,\) and \(3, 4\)"),
        (
            lambda: gradient_weights(torch.zeros(3), torch.ones(3, 4), lr=1.0),
            "expected weights > 0, finite gradients",
        ),
        (
            lambda: gradient_weights(torch.ones(1), torch.ones(1, 1) / 0, lr=1.0),
            "a weight of 0 could never grow",
        ),
        (
            lambda: Contract().loss(Contract().batch(0), -WEIGHTS),
            "expected finite weights of at least 0 but got",
        ),
        (
            lambda: Contract().loss(Contract().batch(0), WEIGHTS[:2]),
            r"expected rewards \(6, M\) and weights \(M,\)",
        ),
    ],
)
def test_bad_input(call: Any, message: str):
    with pytest.raises(ValueError, match=message):
        call()
