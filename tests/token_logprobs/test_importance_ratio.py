"""A kept set replayed: on policy the importance ratio is exactly 1; without the set it is biased by the kept mass."""

from __future__ import annotations

import math

import pytest
import torch

from arcore.ops import linear_logprobs, token_logprobs
from tests.token_logprobs.cases import pack_mask


def top_p_set(logits, p):
    """Tokens of the smallest set of likeliest tokens whose mass reaches p."""
    ordered, order = logits.softmax(-1).sort(dim=-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before < p)


def draw(logits, kept, temperature):
    return torch.where(kept, logits / temperature, -math.inf).softmax(-1).multinomial(1).squeeze(-1)


@pytest.mark.parametrize("kind", ["bool", "bits"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_policy_ratio_is_one(kind, dtype):
    logits = (2 * torch.randn(64, 1000)).to(dtype)
    kept = top_p_set(logits.float(), 0.8)
    token = draw(logits.float(), kept, 0.9)
    mask = kept if kind == "bool" else pack_mask(kept)
    old = token_logprobs(logits, token, mask=mask, temperature=0.9).logp
    new = token_logprobs(logits.clone().requires_grad_(), token, mask=mask, temperature=0.9).logp
    assert ((new - old).exp() == 1).all()
    assert torch.isfinite(old).all()


def test_scoring_over_the_whole_vocabulary_is_biased_by_the_kept_mass():
    """The ratio of the unmasked to the masked score is the kept mass for every token."""
    logits = 2 * torch.randn(64, 1000)
    kept = top_p_set(logits, 0.8)
    token = draw(logits, kept, 1.0)
    whole = token_logprobs(logits, token).logp
    restricted = token_logprobs(logits, token, mask=kept).logp
    mass = torch.where(kept, logits.softmax(-1), 0.0).sum(-1)
    torch.testing.assert_close((whole - restricted).exp(), mass, rtol=1e-5, atol=1e-6)


def test_ratio_is_one_on_average_over_the_kept_set():
    """E_old[new / old] = 1 when both are normalised over the same set, whatever the new policy is."""
    old_logits, new_logits = 2 * torch.randn(1, 300), 2 * torch.randn(1, 300)
    kept = top_p_set(old_logits, 0.7)
    tokens = kept[0].nonzero().squeeze(-1)
    old = token_logprobs(old_logits.expand(len(tokens), -1), tokens, mask=kept).logp.double()
    new = token_logprobs(new_logits.expand(len(tokens), -1), tokens, mask=kept).logp.double()
    assert (old.exp() * (new - old).exp()).sum().item() == pytest.approx(1, abs=1e-6)
    outside = (~kept[0]).nonzero()[:5, 0]
    lost = token_logprobs(new_logits.expand(5, -1), outside, mask=kept).logp
    assert (lost == -math.inf).all()


def test_linear_head_on_policy():
    hidden, weight = torch.randn(32, 16), torch.randn(500, 16)
    kept = top_p_set(hidden @ weight.t(), 0.9)
    token = draw(hidden @ weight.t(), kept, 1.0)
    old = linear_logprobs(hidden, weight, token, mask=pack_mask(kept)).logp
    new = linear_logprobs(hidden.requires_grad_(), weight, token, mask=pack_mask(kept)).logp
    assert ((new - old).exp() == 1).all()
    torch.testing.assert_close(old, token_logprobs(hidden @ weight.t(), token, mask=kept).logp)
