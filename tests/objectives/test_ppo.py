"""PPO: against a loop, its on-policy gradient, turns of several tokens, the critic, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from arcore.objectives import grpo_loss, ppo_loss, turn_logprobs, value_loss


def batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(3, 5, generator=generator, dtype=torch.float64)
    new = old + 0.3 * torch.randn(3, 5, generator=generator, dtype=torch.float64)
    gain = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    return new.requires_grad_(), old, gain, torch.arange(5) < torch.tensor([5, 1, 3])[:, None]


def test_equals_a_loop() -> None:
    new, old, gain, mask = (t.detach() for t in batch())
    total = 0.0
    for row, place in mask.nonzero().tolist():
        rho = math.exp(float(new[row, place] - old[row, place]))
        a = float(gain[row, place])
        total -= min(rho * a, min(max(rho, 0.8), 1.2) * a) / 9
    spoiled = torch.where(mask, gain, math.nan)
    assert float(ppo_loss(new, old, spoiled, mask)) == pytest.approx(total, rel=1e-12)


def test_on_policy_its_gradient_is_reinforce() -> None:
    new, _, gain, mask = batch(1)
    (ours,) = torch.autograd.grad(ppo_loss(new, new.detach(), gain, mask), new)
    (known,) = torch.autograd.grad(-(new * gain)[mask].mean(), new)
    torch.testing.assert_close(ours, known, rtol=1e-12, atol=1e-14)


def test_one_advantage_for_all_tokens_is_grpo() -> None:
    new, old, gain, mask = batch(2)
    row = gain[:, :1]
    ours = ppo_loss(new, old, row.expand(-1, 5), mask)
    torch.testing.assert_close(
        ours, grpo_loss(new, old, row[:, 0], mask, how="token_mean"), rtol=1e-12, atol=0
    )


def test_a_turn_is_the_sum_of_its_tokens() -> None:
    new = batch(3)[0].detach()
    turns = torch.tensor([[0, 0, 1, -1, 2], [-1, -1, -1, -1, -1], [2, 2, 2, 2, 2]])
    found = turn_logprobs(new, turns, 3)
    known = [
        [float(new[0, 0] + new[0, 1]), float(new[0, 2]), float(new[0, 4])],
        [0.0, 0.0, 0.0],
        [0.0, 0.0, float(new[2].sum())],
    ]
    torch.testing.assert_close(found, torch.tensor(known, dtype=torch.float64))


def test_the_critic_counts_the_larger_error() -> None:
    mask = torch.tensor([[True, True, False]])
    values = torch.tensor([[1.0, 3.0, math.nan]], dtype=torch.float64)
    returns, old = torch.tensor([[2.0, 0.0, 0.0]]).double(), torch.tensor([[0.0, 3.5, 0.0]]).double()
    assert float(value_loss(values, returns, mask)) == 0.5 * (1 + 9) / 2
    clipped = value_loss(values, returns, mask, old=old, clip=0.2)
    assert float(clipped) == pytest.approx(0.5 * (1.8**2 + 3.3**2) / 2)


def test_refuses() -> None:
    new, old, gain, mask = batch()
    with pytest.raises(ValueError, match=r"advantages of logprobs's shape \(3, 5\) but got \(3,\)"):
        ppo_loss(new, old, gain[:, 0], mask)
    place = mask.nonzero()[-1]
    broken = gain.clone()
    broken[tuple(place)] = torch.inf
    with pytest.raises(ValueError, match=f"finite advantages but got inf in row {int(place[0])}"):
        ppo_loss(new, old, broken, mask)
    with pytest.raises(ValueError, match="clip from 0 to 1 but got 2"):
        ppo_loss(new, old, gain, mask, clip=2)
    with pytest.raises(ValueError, match="clip above 0 together with old"):
        value_loss(new, old, mask, clip=0.2)
    with pytest.raises(ValueError, match="below count=2 but got 4"):
        turn_logprobs(new, torch.full((3, 5), 4), 2)
    with pytest.raises(ValueError, match="integer turns of one shape"):
        turn_logprobs(new, gain, 2)
