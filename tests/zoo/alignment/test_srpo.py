"""SRPO's loss against a plain reference, its closed form, revisions, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from arcore.objectives import sequence_logprob
from arcore.zoo.alignment.srpo import minimiser, revisions, solution, srpo_loss

Batch = dict[str, Tensor]
SHAPES = {"policy": (4, 2, 6), "reviser": (4, 2, 2, 6), "policy_ref": (4, 2, 6), "reviser_ref": (4, 2, 2, 6)}


class Contract:
    learns = ("policy", "reviser")
    tolerance = 1e-12

    def batch(self, seed: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        found = {
            name: -2 * torch.rand(shape, generator=generator, dtype=torch.float64)
            for name, shape in SHAPES.items()
        }
        lengths = torch.randint(0, 7, (4, 2, 1), generator=generator)
        return found | {
            "preference": torch.rand(4, generator=generator, dtype=torch.float64),
            "mask": torch.arange(6) < lengths,
        }

    def loss(self, batch: Batch, alpha: float = 0.3) -> Tensor:
        mask = batch["mask"]
        after = mask[:, None].expand(-1, 2, -1, -1)  # a response's tokens are the same after either
        sums = [sequence_logprob(batch[n], mask if batch[n].dim() == 3 else after) for n in SHAPES]
        return srpo_loss(*sums, batch["preference"], beta=0.2, alpha=alpha)

    def reference(self, batch: Batch) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for row, preference in enumerate(batch["preference"]):
            kept = batch["mask"][row]
            g = [(batch["policy"] - batch["policy_ref"])[row, b][kept[b]].sum() for b in (0, 1)]
            d = [
                [(batch["reviser"] - batch["reviser_ref"])[row, a, b][kept[b]].sum() for b in (0, 1)]
                for a in (0, 1)
            ]
            second = 1 - preference
            robust = second - 0.5 - 0.1 * (d[0][1] - d[1][0] + g[1] - g[0])
            for a, wins in ((0, second), (1, preference)):
                total = total + 0.15 * (wins - 0.5 - 0.2 * (d[a][1 - a] - d[a][a])) ** 2
            total = total + 0.7 * robust**2
        return total / 4

    def special_case(self) -> tuple[Tensor, Tensor]:
        """Without the reviser's share, and with a reviser at its reference, it is IPO's regression of p / beta."""
        batch = self.batch(3)
        batch["reviser"] = batch["reviser_ref"]
        g = torch.where(batch["mask"], batch["policy"] - batch["policy_ref"], 0.0).sum(-1)
        known = (batch["preference"] - 0.5 - 0.1 * (g[:, 0] - g[:, 1])) ** 2
        return self.loss(batch, alpha=0.0), known.mean()

    def padded(self, batch: Batch) -> Batch:
        wide = {name: torch.nn.functional.pad(batch[name], (0, 2), value=math.nan) for name in SHAPES}
        return batch | wide | {"mask": torch.nn.functional.pad(batch["mask"], (0, 2))}


def test_the_closed_form_has_no_loss():
    table = np.array([[0.5, 0.8, 0.3], [0.2, 0.5, 0.9], [0.7, 0.1, 0.5]])
    random = np.random.default_rng(0)
    reference, sticky = random.dirichlet(np.ones(3)), random.dirichlet(np.ones(3), size=3)
    # Also where the reviser's reference depends on the answer that it revises.
    for after in (np.tile(reference, (3, 1)), sticky):
        policy, reviser = solution(table, reference, after, beta=0.4)
        pair = torch.tensor([[i, j] for i in range(3) for j in range(3)])
        logs = [torch.from_numpy(np.log(x)) for x in (policy, reviser, reference, after)]
        values = [x[pair] if x.dim() == 1 else x[pair[:, :, None], pair[:, None, :]] for x in logs]
        wins = torch.from_numpy(table)[pair[:, 0], pair[:, 1]]
        assert srpo_loss(*values, wins, beta=0.4, alpha=0.5) < 1e-25


def test_the_minimiser_does_not_see_where_pairs_come_from():
    table = np.array([[0.5, 0.8, 0.3], [0.2, 0.5, 0.9], [0.7, 0.1, 0.5]])
    behaviours = [np.array([0.7, 0.2, 0.1]), np.array([0.1, 0.2, 0.7])]
    ours, ipo = (
        [minimiser(table, np.outer(b, b), beta=0.5, objective=name)[0] for b in behaviours]
        for name in ("srpo", "ipo")
    )
    assert np.abs(ours[0] - ours[1]).sum() < 1e-5
    assert np.abs(ipo[0] - ipo[1]).sum() > 0.1


def test_revisions_are_steps_of_the_reviser():
    table = np.array([[0.5, 1.0], [0.0, 0.5]])
    rates = revisions(
        table, np.array([0.0, 1.0]), np.array([[1.0, 0.0], [0.5, 0.5]]), np.array([0.5, 0.5]), count=2
    )
    np.testing.assert_allclose(rates, [0.25, 0.5, 0.625])


def test_no_pair_costs_nothing() -> None:
    none = torch.zeros(0, 2, requires_grad=True)
    pairs = torch.zeros(0, 2, 2)
    loss = srpo_loss(none, pairs, none, pairs, torch.zeros(0), beta=0.1)
    assert loss == 0
    loss.backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reviser": torch.zeros(3, 2)}, r"but got \(3, 2\) in place of \(3, 2, 2\)"),
        ({"reference_policy": torch.zeros(2, 2)}, r"but got \(2, 2\) in place of \(3, 2\)"),
        ({"preference": torch.full((3,), -0.1)}, r"expected preference \(3,\) in \[0, 1\] but got"),
        ({"beta": 0.0}, "expected beta > 0 and alpha from 0 to 1 but got 0.0 and 0.5"),
        ({"alpha": 1.5}, "expected beta > 0 and alpha from 0 to 1 but got 0.1 and 1.5"),
        ({"weight": torch.ones(2)}, r"expected weight \(3,\), at least 0"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str):
    settings: dict[str, Any] = {
        "policy": torch.zeros(3, 2),
        "reviser": torch.zeros(3, 2, 2),
        "reference_policy": torch.zeros(3, 2),
        "reference_reviser": torch.zeros(3, 2, 2),
        "preference": torch.ones(3),
        "beta": 0.1,
    }
    with pytest.raises(ValueError, match=message):
        srpo_loss(**(settings | change))
