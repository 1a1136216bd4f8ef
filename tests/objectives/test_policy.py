"""What policy objectives share: ratios, groups, reductions, and GRPO's named variants."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from arcore import objectives, ops


def batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(6, 5, generator=generator, dtype=torch.float64)
    new = old + 0.4 * torch.randn(6, 5, generator=generator, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([5, 1, 4, 3, 2, 5])[:, None]
    return new.requires_grad_(), old, torch.randn(6, generator=generator, dtype=torch.float64), mask


def test_ratios_are_exactly_one_on_policy_and_padding_may_be_nan():
    logits = torch.randn(4, 7, 11)
    target = torch.randint(0, 11, (4, 7))
    logp, old = (ops.token_logprobs(logits, target, temperature=0.7).logp for _ in range(2))
    mask = torch.rand(4, 7) < 0.6
    for ratio in ("token", "sequence"):
        assert (objectives.log_ratio(logp, old, mask, ratio=ratio).exp() == 1).all()
    leaf = torch.where(mask, logp, math.nan).requires_grad_()
    objectives.grpo_loss(leaf, old, torch.ones(4), mask).backward()
    assert torch.isfinite(leaf.grad).all()
    assert not leaf.grad[~mask].any()


def test_group_statistics_and_advantages():
    rewards = torch.tensor([1.0, 0.0, 0.3, 1.0, 0.3, 4.0, 0.0], dtype=torch.float64)
    groups = torch.tensor([7, 7, 2, 7, 2, 5, 7])
    for kind, correction in (("population", 0), ("sample", 1)):
        found = objectives.group_statistics(rewards, groups, deviation=kind)
        own = rewards[groups == 7]
        assert found.mean[0] == own.mean()
        torch.testing.assert_close(found.deviation[3], own.std(correction=correction), rtol=1e-14, atol=0)
        assert found.size.tolist() == [4, 4, 2, 4, 2, 1, 4]
        assert found.equal.tolist() == [False, False, True, False, True, True, False]
        advantages = objectives.group_advantages(rewards, groups, deviation=kind)
        assert advantages[[2, 4, 5]].tolist() == [0, 0, 0]
        assert abs(advantages[groups == 7].sum()) < 1e-14
        torch.testing.assert_close(
            objectives.group_advantages(3 * rewards + 2, groups, deviation=kind),
            advantages,
            rtol=1e-13,
            atol=1e-14,
        )
    plain = objectives.group_advantages(rewards, groups, deviation="none")
    assert plain[0] == 0.5


@pytest.mark.parametrize("how", ["sequence_mean", "token_mean", "constant"])
def test_on_policy_gradient_is_that_of_reinforce(how: Any):
    _, old, gain, mask = batch()
    length = 5 if how == "constant" else None
    ours = old.clone().requires_grad_()
    objectives.grpo_loss(ours, old, gain, mask, how=how, length=length).backward()
    counts = mask.sum(1, keepdim=True).double()
    weights = {"sequence_mean": 1 / (6 * counts), "token_mean": 1 / counts.sum(), "constant": 1 / 30}[how]
    torch.testing.assert_close(ours.grad, -gain[:, None] * mask * weights, rtol=1e-12, atol=0)


def test_named_variants():
    new, old, gain, mask = batch()
    apart = torch.where(mask, new - old, 0).detach()
    rho, gains = apart.exp(), gain[:, None]
    plain = -torch.minimum(rho * gains, rho.clamp(0.8, 1.28) * gains)
    dapo = objectives.grpo_loss(new, old, gain, mask, clip_high=0.28, how="token_mean")
    torch.testing.assert_close(dapo.detach(), plain[mask].mean(), rtol=1e-13, atol=0)
    row = (apart.sum(1) / mask.sum(1)).exp()
    gspo = objectives.grpo_loss(new, old, gain, mask, ratio="sequence")
    torch.testing.assert_close(
        gspo.detach(), -torch.minimum(row * gain, row.clamp(0.8, 1.2) * gain).mean(), rtol=1e-13, atol=0
    )
    # Where the advantage is negative, a ratio counts no more than clip_negative.
    far = objectives.grpo_loss(old + 5.0, old, -gain.abs(), mask, clip_negative=3.0)
    assert far.item() == pytest.approx(3 * gain.abs().mean().item(), rel=1e-12)
    entropy = torch.rand(6, 5, dtype=torch.float64)
    leaf = old.clone().requires_grad_()
    objectives.grpo_loss(
        leaf, old, gain, mask, entropy=entropy, entropy_share=0.25, how="token_mean"
    ).backward()
    top = entropy[mask].topk(5).values[-1]
    assert torch.equal(leaf.grad != 0, mask & (entropy >= top))
    kl = objectives.grpo_loss(old, old, gain, mask, reference=old - 0.3, kl_weight=2.0, how="token_mean")
    rest = objectives.grpo_loss(old, old, gain, mask, how="token_mean")
    assert (kl - rest).item() == pytest.approx(2 * (math.exp(-0.3) + 0.3 - 1), rel=1e-10)


def test_empty_responses_count_nothing():
    new, old, gain, mask = batch()
    none = torch.zeros_like(mask)
    for how, length in (("sequence_mean", None), ("token_mean", None), ("constant", 5)):
        loss = objectives.grpo_loss(new, old, gain, none, how=how, length=length)
        assert loss == 0
        loss.backward()
        assert not new.grad.any()
    assert objectives.sequence_logprob(old, none).tolist() == [0] * 6
    assert objectives.sequence_logprob(old.bfloat16(), mask).dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda n, o, a, m: objectives.grpo_loss(n, o[:, 1:], a, m),
            "expected log-probabilities and mask of one shape",
        ),
        (
            lambda n, o, a, m: objectives.grpo_loss(n, o, a[1:], m),
            r"advantages \(B,\) but got \(6, 5\) and \(5,\)",
        ),
        (
            lambda n, o, a, m: objectives.grpo_loss(n, o, a * torch.nan, m),
            "grpo_loss: expected finite advantages but got nan in row 0",
        ),
        (
            lambda n, o, a, m: objectives.group_advantages(torch.ones(6).long(), torch.zeros(6)),
            r"expected floating-point rewards but got torch.int64; use rewards.float\(\)",
        ),
        (
            lambda n, o, a, m: objectives.grpo_loss(n, o, a, m.long()),
            "expected a bool mask but got torch.int64",
        ),
        (
            lambda n, o, a, m: objectives.grpo_loss(n, o, a, m, clip_low=2.0),
            "expected clip_low from 0 to 1 but got 2",
        ),
        (
            lambda n, o, a, m: objectives.grpo_loss(n, o, a, m, kl_weight=1.0),
            "expected reference of logprobs's shape",
        ),
        (
            lambda n, o, a, m: objectives.reduce(n, m, how="constant"),
            "expected length, at least 1, with how='constant'",
        ),
        (lambda n, o, a, m: objectives.reduce(n, m, how="mean"), "expected how to be one of 'sequence_mean'"),
        (
            lambda n, o, a, m: objectives.log_ratio(n, o, m, ratio="row"),
            "expected ratio to be one of 'token', 'sequence'",
        ),
        (
            lambda n, o, a, m: objectives.group_advantages(a / 0, torch.zeros(6)),
            "expected finite rewards but got .*inf in row 0",
        ),
        (
            lambda n, o, a, m: objectives.group_advantages(a, torch.zeros(5)),
            "expected rewards and groups of one shape",
        ),
        (
            lambda n, o, a, m: objectives.group_advantages(a, torch.zeros(6), epsilon=-1),
            "expected epsilon >= 0",
        ),
        (
            lambda n, o, a, m: objectives.group_advantages(a, torch.zeros(6), deviation="robust"),
            "expected deviation to be one of 'population', 'sample', 'none' but got 'robust'",
        ),
    ],
)
def test_bad_input(call: Any, message: str):
    with pytest.raises(ValueError, match=message):
        call(*batch())
