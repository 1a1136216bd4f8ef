"""What must hold of every objective of alignment, whatever the model; each in less than a second."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import arcore
from arcore.decoding import Sampling, draw_rollout
from arcore.objectives import (
    group_advantages,
    grpo_loss,
    kto_loss,
    ppo_loss,
    preference_loss,
    reduce,
    score,
    score_rollout,
    sequence_logprob,
)
from arcore.ops import linear_scan, reference_linear_scan, token_logprobs
from arcore.zoo.alignment import inpo, srpo
from arcore.zoo.alignment._games import omd_step
from arcore.zoo.alignment.inpo import inpo_loss
from arcore.zoo.alignment.nft import nft_loss
from arcore.zoo.alignment.spo import spo_loss

GROUPS = torch.arange(12) // 4


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    made = arcore.create_model("llama_tiny", num_layers=1, dim=32, num_heads=2, num_kv_heads=1, hidden_dim=32)
    with torch.no_grad():
        made.lm_head.weight.normal_(std=0.5)
    return made.eval()


def batch(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(12, 7, generator=generator, dtype=torch.float64)
    return {
        "logprobs": old + 0.2 * torch.randn(12, 7, generator=generator, dtype=torch.float64),
        "old": old,
        "reference": old + 0.1 * torch.randn(12, 7, generator=generator, dtype=torch.float64),
        "mask": torch.arange(7) < torch.randint(1, 8, (12, 1), generator=generator),
        "rewards": torch.randint(0, 9, (12,), generator=generator).double() / 8,
        "correct": torch.arange(12) % 4 < 1 + torch.arange(12) // 4 % 3,
        "groups": GROUPS,
    }


def all_losses(b: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every objective on one batch."""
    gain = group_advantages(b["rewards"], b["groups"])
    common = (b["logprobs"], b["old"], gain, b["mask"])
    policy, reference, previous = (
        sequence_logprob(b[name], b["mask"]).view(-1, 2) for name in ("logprobs", "reference", "old")
    )
    wins = (b["rewards"].view(3, 4, 1) > b["rewards"].view(3, 1, 4)).double()
    wins = torch.where(b["rewards"].view(3, 4, 1) == b["rewards"].view(3, 1, 4), 0.5, wins)
    shaped = [b[name].view(3, 4, -1) for name in ("logprobs", "old", "mask")]
    label = (b["rewards"].view(-1, 2).diff(dim=1)[:, 0] <= 0).double()
    return {
        "grpo": grpo_loss(*common, reference=b["reference"], kl_weight=0.1),
        "dapo": grpo_loss(*common, clip_high=0.28, how="token_mean"),
        "dr_grpo": grpo_loss(*common, how="constant", length=9),
        "gspo": grpo_loss(*common, ratio="sequence"),
        "nft": nft_loss(b["logprobs"], b["old"], b["correct"], b["groups"], b["mask"]),
        "ppo": ppo_loss(b["logprobs"], b["old"], gain[:, None].expand(b["mask"].shape), b["mask"]),
        "dpo": preference_loss(policy, reference, label),
        "ipo": preference_loss(policy, reference, label, kind="ipo"),
        "kto": kto_loss(policy[:, 0], reference[:, 0], label.bool()),
        "inpo": inpo_loss(policy, reference, previous, label, tau=0.1, eta=0.3),
        "spo": spo_loss(shaped[0], shaped[1], wins, shaped[2]),
    }


def gradients(b: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    leaf = b["logprobs"].clone().requires_grad_()
    return {
        name: (loss.detach(), torch.autograd.grad(loss, leaf, retain_graph=True)[0])
        for name, loss in all_losses(b | {"logprobs": leaf}).items()
    }


def test_log_probabilities_and_entropies_are_in_range_and_sum_to_one() -> None:
    logits = 30 * torch.randn(64, 33, generator=torch.Generator().manual_seed(0))
    every = torch.arange(33).expand(64, 33)
    found = token_logprobs(logits[:, None].expand(-1, 33, -1), every, return_entropy=True)
    assert (found.logp <= 0).all()
    assert found.entropy is not None
    assert ((found.entropy >= 0) & (found.entropy <= math.log(33) + 1e-6)).all()
    torch.testing.assert_close(found.logp.exp().sum(1), torch.ones(64), rtol=1e-5, atol=1e-6)
    total = (logits - found.logsumexp[:, :1]).exp().sum(1)
    torch.testing.assert_close(total, torch.ones(64), rtol=1e-5, atol=1e-6)


def test_the_scorer_keeps_to_the_same_ranges(model: Any) -> None:
    rollout = draw_rollout(model, [[1, 2], [3]], 4, max_new_tokens=6)
    found = score_rollout(model, rollout, entropy=True)
    assert found.entropy is not None
    assert (found.logp <= 0).all()
    assert ((found.entropy >= 0) & (found.entropy <= math.log(256) + 1e-6)).all()


@pytest.mark.parametrize("deviation", ["population", "sample", "none"])
def test_advantages_of_a_group_sum_to_zero(deviation: Any) -> None:
    gain = group_advantages(batch()["rewards"], GROUPS, deviation=deviation)
    assert gain.view(3, 4).sum(1).abs().max() <= 1e-14


def test_scale_and_offset_of_rewards_change_nothing() -> None:
    b = batch()
    other = b | {"rewards": 4 * b["rewards"] - 8}
    for name in ("grpo", "dapo", "gspo", "ppo"):
        one, two = gradients(b)[name], gradients(other)[name]
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])


def test_nft_on_policy_is_grpo() -> None:
    b = batch()
    leaf = b["logprobs"].clone().requires_grad_()
    gain = group_advantages(b["correct"].double(), GROUPS)
    ours = nft_loss(leaf, leaf.detach(), b["correct"], GROUPS, b["mask"])
    theirs = grpo_loss(leaf, leaf.detach(), gain, b["mask"], how="token_mean")
    one, other = (torch.autograd.grad(loss, leaf)[0] for loss in (ours, theirs))
    assert (one - other).norm() <= 1e-6 * other.norm()


def test_the_argmin_of_inpo_is_the_mirror_step() -> None:
    generator = np.random.default_rng(0)
    table = generator.random((9, 9))
    table = (table + 1 - table.T) / 2
    reference, previous = (generator.dirichlet(np.full(9, 3.0)) for _ in range(2))
    found = inpo.minimiser(table, reference, previous, tau=0.2, eta=0.6)
    wanted = omd_step(previous, reference, table @ previous, tau=0.2, eta=0.6)
    assert np.abs(found - wanted).max() <= 1e-5


def test_srpo_does_not_depend_on_who_drew_the_pairs_and_ipo_does() -> None:
    generator = np.random.default_rng(1)
    table = generator.random((4, 4))
    table = (table + 1 - table.T) / 2
    weights = [np.outer(b, b) for b in (np.ones(4) / 4, np.array([0.7, 0.1, 0.1, 0.1]))]
    for objective, low, high in (("srpo", 0.0, 1e-3), ("ipo", 0.05, 2.0)):
        one, other = (
            srpo.minimiser(table, w, beta=0.25, objective=objective)[0]  # type: ignore[arg-type]
            for w in weights
        )
        assert low <= np.abs(one - other).sum() <= high


def test_ipo_is_inpo_whose_previous_policy_is_the_reference() -> None:
    generator = torch.Generator().manual_seed(2)
    policy, reference = (-5 * torch.rand(6, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    label = torch.rand(6, generator=generator, dtype=torch.float64)
    for tau in (0.02, 0.2):
        ours = inpo_loss(policy, reference, reference, label, tau=tau, eta=0.2)
        known = preference_loss(policy, reference, label, beta=0.2, kind="ipo")
        torch.testing.assert_close(ours, known, rtol=1e-13, atol=0)


def test_the_mean_ratio_of_truncated_samples_is_the_kept_mass() -> None:
    law = (2 * torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).softmax(0)
    order = law.argsort(descending=True)
    kept = order[: int((law[order].cumsum(0) < 0.8).sum()) + 1]
    mass = law[kept].sum()
    drawn_from = law[kept] / mass
    # The expectation over the truncated law, by enumeration: scored in full it is the mass, scored on the set 1.
    assert float((drawn_from * (law[kept] / drawn_from)).sum()) == pytest.approx(float(mass), rel=1e-14)
    mask = torch.zeros(40, dtype=torch.bool).index_fill(0, kept, True)
    logits = law.log().float().expand(len(kept), -1)
    full = token_logprobs(logits, kept).logp.double()
    replayed = token_logprobs(logits, kept, mask=mask).logp.double()
    assert float((drawn_from * (full - replayed).exp()).sum()) == pytest.approx(float(mass), rel=1e-6)
    assert float((drawn_from * (replayed.exp() / drawn_from)).sum()) == pytest.approx(1.0, rel=1e-6)


def test_truncated_samples_scored_on_their_sets_have_ratio_one(model: Any) -> None:
    rollout = draw_rollout(model, [[1, 2, 3]], 32, max_new_tokens=4, sampling=Sampling(top_p=0.8), seed=5)
    assert rollout.logp is not None
    full = score(model, rollout.tokens, rollout.mask).logp
    own = score_rollout(model, rollout).logp
    assert ((own - rollout.logp).exp() - 1)[rollout.mask].abs().max() <= 1e-4
    assert (full - rollout.logp)[rollout.mask].exp().mean() < 1 - 1e-3


def test_packed_rows_score_as_separate_ones(model: Any) -> None:
    rollout = draw_rollout(model, [[1, 2, 3], [4]], 4, max_new_tokens=5, seed=6)
    packed, separate = (score_rollout(model, rollout, packed=x).logp for x in (True, False))
    torch.testing.assert_close(packed, separate, rtol=1e-5, atol=1e-5)


def test_the_scan_is_the_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(5, 60, generator=generator, dtype=torch.float64) for _ in range(2))
    for reverse in (False, True):
        ours, known = (f(0.9 * a.tanh(), b, reverse=reverse) for f in (linear_scan, reference_linear_scan))
        assert (ours - known).abs().max() <= 1e-12


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.7}])
def test_on_policy_the_ratio_is_exactly_one(model: Any, filters: dict[str, Any]) -> None:
    rollout = draw_rollout(model, [[1, 2, 3], [4]], 4, max_new_tokens=5, sampling=Sampling(**filters))
    for packed in (True, False):
        one, other = (score_rollout(model, rollout, packed=packed).logp for _ in range(2))
        assert torch.equal(one.detach(), other.detach())
        assert torch.equal((one - other.detach()).exp().detach(), torch.ones_like(one))


def test_padding_changes_nothing() -> None:
    b = batch()
    wide = {
        name: torch.nn.functional.pad(b[name], (0, 3), value=False if name == "mask" else math.nan)
        for name in ("logprobs", "old", "reference", "mask")
    }
    plain, padded = gradients(b), gradients(b | wide)
    for name, (loss, gradient) in plain.items():
        torch.testing.assert_close(padded[name][0], loss, rtol=1e-13, atol=1e-15, msg=name)
        torch.testing.assert_close(padded[name][1][:, :7], gradient, rtol=1e-12, atol=1e-15, msg=name)
        assert not padded[name][1][:, 7:].any(), name


def test_the_order_within_groups_changes_nothing() -> None:
    b = batch(1)
    # Pairs stay pairs; pairs of a group change places, and so do its rows.
    order = torch.tensor([2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9])
    plain, mixed = gradients(b), gradients({name: value[order] for name, value in b.items()})
    for name, (loss, gradient) in plain.items():
        torch.testing.assert_close(mixed[name][0], loss, rtol=1e-12, atol=1e-15, msg=name)
        torch.testing.assert_close(mixed[name][1], gradient[order], rtol=1e-11, atol=1e-14, msg=name)


def test_ways_of_reducing_differ_in_what_long_responses_count() -> None:
    values, mask = torch.ones(2, 4), torch.tensor([[True] * 4, [True, False, False, False]])
    values[0] = 3.0
    assert reduce(values, mask, how="sequence_mean").item() == 2.0
    assert reduce(values, mask, how="token_mean").item() == pytest.approx(13 / 5)
    assert reduce(values, mask, how="constant", length=4).item() == pytest.approx(13 / 8)


def test_groups_of_one_equal_rewards_and_empty_responses_count_nothing() -> None:
    b = batch()
    alone = group_advantages(b["rewards"], torch.arange(12))
    assert not alone.any()
    assert not group_advantages(torch.full((12,), 0.1, dtype=torch.float64), GROUPS).any()
    leaf = b["logprobs"].clone().requires_grad_()
    mask = b["mask"].clone()
    mask[3] = False
    gain = group_advantages(b["rewards"], GROUPS)
    (gradient,) = torch.autograd.grad(grpo_loss(leaf, b["old"], gain, mask), leaf)
    assert not gradient[3].any()
    assert torch.isfinite(gradient).all()
    nothing = grpo_loss(leaf, b["old"], gain, torch.zeros_like(mask))
    assert nothing.item() == 0
