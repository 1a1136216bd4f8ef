"""torch.func.vmap maps over rows: what one example gives alone."""

from __future__ import annotations

import pytest
import torch

from arcore.ops import confidence_mask, filter_probs, sample

X, OTHER = torch.randn(3, 4, 40), torch.randn(3, 4, 40)
SEEDS = torch.arange(12).view(3, 4)


def test_every_example_is_what_it_is_alone():
    settings = {"top_p": torch.rand(3, 4), "temperature": 0.5 + torch.rand(3, 4)}
    history, mask = torch.randint(40, (3, 4, 5)), torch.rand(3, 40) < 0.8

    def one(x, other, seed, settings, history, mask):
        return tuple(sample(
            x, uncond=other, cfg_scale=1.5, seed=seed, history=history, presence_penalty=0.3, mask=mask,
            num_samples=2, return_logprob="processed", return_prob=True, return_entropy=True, return_valid=True,
            return_kept=True, **settings,
        ))  # fmt: skip

    got = torch.vmap(one)(X, OTHER, SEEDS, settings, history, mask)
    for i in range(3):
        alone = one(X[i], OTHER[i], SEEDS[i], {k: v[i] for k, v in settings.items()}, history[i], mask[i])
        for whole, part in zip(got, alone, strict=True):
            assert torch.equal(whole[i], part)


def test_the_batch_may_lie_in_any_dimension():
    expected = filter_probs(X, top_p=0.8, mask=OTHER[0] > -1)
    got = torch.vmap(lambda x: filter_probs(x, top_p=0.8, mask=OTHER[0] > -1), in_dims=2, out_dims=2)(
        X.movedim(0, 2)
    )
    assert torch.equal(got.movedim(2, 0), expected)
    same = torch.vmap(lambda seed: sample(X[0], seed=seed))(SEEDS)
    assert torch.equal(same[1], sample(X[0], seed=SEEDS[1]))
    nested = torch.vmap(torch.vmap(lambda x, seed: sample(x, seed=seed)))(X, SEEDS)
    assert torch.equal(nested, sample(X, seed=SEEDS))


def test_confidence_masks():
    confidence, counts = torch.rand(3, 4, 9), torch.tensor([2, 3, 4])
    got = torch.vmap(lambda c, n, s: confidence_mask(c, n, temperature=1.0, seed=s))(
        confidence, counts, SEEDS
    )
    for i in range(3):
        assert torch.equal(got[i], confidence_mask(confidence[i], counts[i], temperature=1.0, seed=SEEDS[i]))


def test_examples_do_not_share_their_random_numbers():
    drawn = torch.vmap(lambda x: sample(x), randomness="different")(torch.zeros(3, 4, 10**6))
    assert drawn.unique().numel() == 12
    with pytest.raises(ValueError, match="map over a seed per example"):
        torch.vmap(lambda x: sample(x, seed=SEEDS[0]))(X)
    with pytest.raises(ValueError, match="map over a seed per example"):
        torch.vmap(lambda x: confidence_mask(x, 2, temperature=1.0, seed=SEEDS[0]))(X)
    best = torch.vmap(lambda x: sample(x, mode="greedy"))(X)
    assert torch.equal(best, X.argmax(-1))


def test_no_transform_finds_a_derivative():
    """Draws and distributions are results without a gradient, also for torch.func."""
    with pytest.raises(NotImplementedError, match="expected arguments that nothing is differentiated by"):
        torch.func.grad(lambda x: filter_probs(x).sum())(X)
