"""NFT against a plain reference, GRPO as its on-policy gradient, RFT, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from arcore.objectives import group_advantages, grpo_loss
from arcore.zoo.alignment.nft import Speller, learn_palindromes, nft_loss

Batch = dict[str, Tensor]


class Contract:
    learns = ("logprobs",)
    tolerance = 1e-11

    def batch(self, seed: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        old = -torch.rand(8, 6, generator=generator, dtype=torch.float64)
        return {
            "logprobs": old + 0.8 * torch.randn(8, 6, generator=generator, dtype=torch.float64),
            "old": old,
            "correct": torch.tensor([1, 0, 0, 1, 1, 1, 0, 1]),
            "groups": torch.tensor([3, 3, 3, 3, 9, 9, 9, 9]),
            "mask": torch.arange(6) < torch.tensor([6, 1, 4, 3, 6, 5, 6, 0])[:, None],
        }

    def loss(self, batch: Batch, **settings: Any) -> Tensor:
        return nft_loss(**batch, **settings)

    def reference(self, batch: Batch) -> Tensor:
        total, count = torch.zeros((), dtype=torch.float64), 0
        for row, tokens in enumerate(batch["logprobs"]):
            right = batch["correct"][batch["groups"] == batch["groups"][row]].double().mean().item()
            for place, logprob in enumerate(tokens):
                if not batch["mask"][row, place]:
                    continue
                count += 1
                weight = math.sqrt((1 - right) / right)
                apart = logprob - batch["old"][row, place]
                if batch["correct"][row]:
                    total = total - weight * apart
                else:
                    negative = (1 - right * apart.exp()) / (1 - right)
                    value = max(negative.item(), 1.0)
                    # log(value), with the slope of the logarithm there times that of N.
                    total = total - weight * (math.log(value) + (negative - negative.item()) / value)
        return total / count

    def special_case(self) -> tuple[Tensor, Tensor]:
        """Without wrong answers it is RFT: the mean log-ratio of the right ones."""
        batch = self.batch(5)
        known = torch.where(batch["mask"], batch["old"] - batch["logprobs"], 0.0)
        known = known[batch["correct"] == 1].sum() / batch["mask"].sum()
        return self.loss(batch, negative_weight=0.0, prompt_weight="none"), known

    def padded(self, batch: Batch) -> Batch:
        wide = {n: torch.nn.functional.pad(batch[n], (0, 2), value=math.nan) for n in ("logprobs", "old")}
        return batch | wide | {"mask": torch.nn.functional.pad(batch["mask"], (0, 2))}


@pytest.mark.parametrize(("weight", "deviation"), [("root", "population"), ("wrong", "none")])
@pytest.mark.parametrize("how", ["token_mean", "sequence_mean"])
def test_on_policy_gradient_is_grpos(weight: Any, deviation: Any, how: Any):
    batch = Contract().batch(0)
    leaf = batch["old"].clone().requires_grad_()
    loss = nft_loss(**(batch | {"logprobs": leaf}), prompt_weight=weight, how=how)
    ours = torch.autograd.grad(loss, leaf)[0]
    gain = group_advantages(batch["correct"].double(), batch["groups"], deviation=deviation)
    theirs = torch.autograd.grad(grpo_loss(leaf, batch["old"], gain, batch["mask"], how=how), leaf)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


def test_prompts_that_teach_nothing_count_nothing():
    batch = Contract().batch(0)
    leaf = batch["logprobs"].clone().requires_grad_()
    batch |= {"logprobs": leaf, "correct": torch.tensor([1, 1, 1, 1, 0, 0, 0, 0])}
    loss = nft_loss(**batch)
    loss.backward()
    assert loss == 0
    assert not leaf.grad.any()


@pytest.mark.parametrize("ratio", [10.0, 1e3, 1e8])
def test_ratios_beyond_the_limit_stay_finite(ratio: float):
    leaf = torch.tensor([[math.log(ratio)], [0.0]], requires_grad=True)
    whole = torch.ones(2, 1, dtype=torch.bool)
    loss = nft_loss(leaf, torch.zeros(2, 1), torch.tensor([0, 1]), torch.zeros(2), whole, floor=1e-3)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(leaf.grad).all()
    # Log-ratios above 10 are cut, and with them their gradient.
    assert (leaf.grad[0, 0] > 0) == (ratio < math.exp(10))


def test_the_spellers_own_log_probabilities():
    torch.manual_seed(0)
    model = Speller(3, 2)
    words = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    total = model(words).log_softmax(-1).gather(-1, words[..., None]).sum((1, 2)).exp()
    assert total.sum().item() == pytest.approx(1, abs=1e-6)
    drawn = model.draw(4000)
    counts = torch.bincount(drawn[:, 0] * 3 + drawn[:, 1], minlength=9) / 4000
    assert (counts - total).abs().max() < 0.03


def test_nft_and_grpo_start_alike():
    one, other = (learn_palindromes(name, updates=3, seed=4) for name in ("nft", "grpo"))
    assert one[0] == other[0]
    assert abs(one[1] - other[1]) < 0.02


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"correct": torch.full((8,), 0.5)}, r"expected correct \(8,\) of 0 and 1 but got .* \[0.5\]"),
        ({"correct": torch.ones(7)}, r"expected correct \(8,\) of 0 and 1 but got shape \(7,\)"),
        ({"floor": 0.0}, "expected floor > 0 and negative_weight >= 0 but got 0.0 and 1.0"),
        ({"negative_weight": -1.0}, "expected floor > 0 and negative_weight >= 0 but got 1.0 and -1.0"),
        (
            {"prompt_weight": "std"},
            "expected prompt_weight to be one of 'root', 'wrong', 'none' but got 'std'",
        ),
        ({"groups": torch.zeros(3)}, "expected rewards and groups of one shape"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        nft_loss(**(Contract().batch(0) | change))
