"""The DPO family and KTO: known values, limits, INPO's special case, and what they refuse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from arcore.objectives import kto_loss, preference_loss
from arcore.zoo.alignment.inpo import inpo_loss


def pairs(count: int = 6, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    policy, reference = (
        -5 * torch.rand(count, 2, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    return policy.requires_grad_(), reference, torch.rand(count, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["dpo", "ipo", "hinge"])
def test_equals_a_loop_over_pairs(kind: str) -> None:
    policy, reference, preference = (t.detach() for t in pairs())
    total = 0.0
    for row in range(6):
        h = float((policy[row, 0] - reference[row, 0]) - (policy[row, 1] - reference[row, 1]))
        for sign, share in ((1, float(preference[row])), (-1, 1 - float(preference[row]))):
            cost = {
                "dpo": math.log1p(math.exp(-0.3 * sign * h)),
                "ipo": (sign * h - 1 / 0.6) ** 2,
                "hinge": max(0.0, 1 - 0.3 * sign * h),
            }[kind]
            total += share * cost / 6
    found = preference_loss(policy, reference, preference, beta=0.3, kind=kind)  # type: ignore[arg-type]
    assert float(found) == pytest.approx(total, rel=1e-12)


def test_swapping_a_pair_and_its_label_changes_nothing() -> None:
    policy, reference, preference = pairs(seed=1)
    one = preference_loss(policy, reference, preference)
    other = preference_loss(policy.flip(1), reference.flip(1), 1 - preference)
    assert one.item() == pytest.approx(other.item(), rel=1e-13)


def test_ipo_is_inpo_whose_previous_policy_is_the_reference() -> None:
    policy, reference, preference = pairs(seed=2)
    ours = preference_loss(policy, reference, preference, beta=0.2, kind="ipo")
    theirs = inpo_loss(policy, reference, reference, preference, tau=0.1, eta=0.2)
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)


def test_kto_equals_a_loop_and_moves_rows_the_right_way() -> None:
    generator = torch.Generator().manual_seed(3)
    policy = -3 * torch.rand(8, generator=generator, dtype=torch.float64)
    reference = -3 * torch.rand(8, generator=generator, dtype=torch.float64)
    desirable = torch.arange(8) % 2 == 0
    base = max(0.0, float((policy - reference).mean()))
    total = 0.0
    for row in range(8):
        r = float(policy[row] - reference[row]) - base
        side = 1 if desirable[row] else -1
        total += (2.0 if desirable[row] else 0.5) * (1 - 1 / (1 + math.exp(-0.4 * side * r))) / 8
    leaf = policy.requires_grad_()
    found = kto_loss(leaf, reference, desirable, beta=0.4, weights=(2.0, 0.5))
    assert found.item() == pytest.approx(total, rel=1e-12)
    (gradient,) = torch.autograd.grad(found, leaf)
    assert ((gradient < 0) == desirable).all()
    assert kto_loss(leaf[:0], reference[:0], desirable[:0]).item() == 0


@pytest.mark.parametrize("kind", ["dpo", "ipo", "hinge"])
def test_no_pair_costs_nothing(kind: Any) -> None:
    policy, reference, preference = pairs()
    none = policy[:0].detach().requires_grad_()
    loss = preference_loss(none, reference[:0], preference[:0], kind=kind)
    assert loss == 0
    loss.backward()
    assert none.grad is not None


def test_refuses() -> None:
    policy, reference, preference = pairs()
    with pytest.raises(ValueError, match=r"one shape \(P, 2\)"):
        preference_loss(policy, reference[:2], preference)
    with pytest.raises(ValueError, match=r"preference \(6,\) in \[0, 1\]"):
        preference_loss(policy, reference, preference + 1)
    with pytest.raises(ValueError, match="expected beta > 0 but got 0"):
        preference_loss(policy, reference, preference, beta=0)
    with pytest.raises(ValueError, match="one of 'dpo', 'ipo', 'hinge' but got 'orpo'"):
        preference_loss(policy, reference, preference, kind="orpo")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bool desirable but got"):
        kto_loss(policy[:, 0], reference[:, 0], preference)
