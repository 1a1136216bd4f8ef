"""What a sampler returned is what token_logprobs computes over the kept set: on policy the ratio is exactly 1."""

from __future__ import annotations

import math

import pytest
import torch

from arcore.ops import linear_logprobs, sample, token_logprobs
from arcore.ops._sample_reference import RowInputs, mixed_row, penalise
from tests.sample.cases import FILTERS, adversarial_rows


def unpack(kept, vocab):
    token = torch.arange(vocab)
    return (kept[..., token // 32] >> (token % 32) & 1).bool()


def draw(logits, **settings):
    """Tokens, their log-probabilities and the kept set."""
    rows = torch.arange(math.prod(logits.shape[:-1])).view(logits.shape[:-1])
    return sample(logits, seed=rows + 5, return_logprob="processed", return_kept=True, **settings)


def assert_ratio_is_one(old, new):
    assert torch.isfinite(old).all()
    assert torch.equal(old, new)
    assert ((new - old).exp() == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [1, 7, 31, 1000, 2049, 5000])
def test_on_policy_ratio_is_one(vocab, dtype):
    logits = (2 * torch.randn(32, vocab)).to(dtype)
    for temperature in (1.0, 0.9, 3.7, 0.3 + torch.rand(32)):
        for settings in (
            {},
            {"top_p": 0.8},
            {"top_k": 50, "min_p": 0.01},
            {"typical_p": 0.7, "order": "vllm"},
        ):
            old = draw(logits, temperature=temperature, **settings)
            for mask in (old.kept, unpack(old.kept, vocab)):
                new = token_logprobs(logits, old.tokens, mask=mask, temperature=temperature)
                assert_ratio_is_one(old.logprob, new.logp)
        old = draw(logits, temperature=temperature)
        assert_ratio_is_one(old.logprob, token_logprobs(logits, old.tokens, temperature=temperature).logp)


@pytest.mark.parametrize("order", ["hf", "vllm", "joint"])
def test_on_policy_ratio_is_one_in_hard_rows(order):
    # One of these rows overflows; token_logprobs has no number for logits of +inf.
    logits = torch.stack(list(adversarial_rows(300).values())).clamp(max=3e38)
    for settings in FILTERS:
        old = draw(logits, order=order, **settings)
        assert_ratio_is_one(old.logprob, token_logprobs(logits, old.tokens, mask=old.kept).logp)


def test_every_draw_of_a_row():
    logits = 2 * torch.randn(4, 600)
    old = draw(logits, top_p=0.9, num_samples=20)
    new = token_logprobs(logits.unsqueeze(1).expand(4, 20, 600), old.tokens, mask=old.kept.unsqueeze(1))
    assert_ratio_is_one(old.logprob, new.logp)


def test_mixed_biased_and_penalised_logits():
    """The distribution that was drawn from is that of the logits after these steps."""
    cond, uncond, bias = torch.randn(5, 400), torch.randn(5, 400), torch.randn(400)
    history = torch.randint(400, (5, 60))
    old = draw(
        cond, uncond=uncond, cfg_scale=2.0, bias=bias, temperature=0.7, top_k=90, mask=torch.rand(400) < 0.9,
        repetition_penalty=1.3, presence_penalty=0.2, frequency_penalty=0.1, history=history,
    )  # fmt: skip
    names = {"repetition_penalty": 1.3, "presence_penalty": 0.2, "frequency_penalty": 0.1}
    processed = []
    for row in range(5):
        inputs = RowInputs(
            [cond[row], uncond[row]], names, [2.0, -1.0], None, None, history[row].tolist(), [], "hf"
        )
        processed.append(penalise(mixed_row(inputs) + bias, inputs))
    new = token_logprobs(torch.stack(processed), old.tokens, mask=old.kept, temperature=0.7)
    assert_ratio_is_one(old.logprob, new.logp)


def test_raw_log_probabilities():
    logits = 3 * torch.randn(20, 3000)
    raw = sample(logits, temperature=0.5, top_k=9, seed=torch.arange(20), return_logprob="raw")
    assert_ratio_is_one(raw.logprob, token_logprobs(logits, raw.tokens).logp)


def test_layouts():
    wide = torch.randn(3, 4, 1400)
    logits = wide[..., 100:1100]
    old = draw(logits, top_p=0.9)
    assert_ratio_is_one(old.logprob, token_logprobs(logits, old.tokens, mask=old.kept).logp)
    across = logits.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert torch.equal(draw(across, top_p=0.9).logprob, old.logprob)


def test_ratio_has_the_gradient_of_the_policy():
    logits = torch.randn(8, 200, requires_grad=True)
    old = draw(logits.detach(), top_p=0.8)
    ratio = (token_logprobs(logits, old.tokens, mask=old.kept).logp - old.logprob).exp()
    assert (ratio == 1).all()
    ratio.sum().backward()
    kept = unpack(old.kept, 200)
    probs = torch.where(kept, logits.detach(), -math.inf).softmax(-1)
    expected = torch.nn.functional.one_hot(old.tokens, 200) - probs
    torch.testing.assert_close(logits.grad, expected)


def test_scoring_over_the_whole_vocabulary_is_biased_by_the_kept_mass():
    """The ratio of the unmasked to the masked score is the kept mass for every token."""
    logits = 2 * torch.randn(64, 1000)
    old = draw(logits, top_p=0.8)
    whole = token_logprobs(logits, old.tokens).logp
    mass = torch.where(unpack(old.kept, 1000), logits.softmax(-1), 0.0).sum(-1)
    torch.testing.assert_close((whole - old.logprob).exp(), mass, rtol=1e-5, atol=1e-6)


def test_ratio_is_one_on_average_over_the_kept_set():
    """E_old[new / old] = 1 when both are normalised over the same set, whatever the new policy is."""
    old_logits, new_logits = 2 * torch.randn(1, 300), 2 * torch.randn(1, 300)
    kept = unpack(draw(old_logits, top_p=0.7).kept, 300)
    tokens = kept[0].nonzero().squeeze(-1)
    old = token_logprobs(old_logits.expand(len(tokens), -1), tokens, mask=kept).logp.double()
    new = token_logprobs(new_logits.expand(len(tokens), -1), tokens, mask=kept).logp.double()
    assert (old.exp() * (new - old).exp()).sum().item() == pytest.approx(1, abs=1e-6)
    outside = (~kept[0]).nonzero()[:5, 0]
    lost = token_logprobs(new_logits.expand(5, -1), outside, mask=kept).logp
    assert (lost == -math.inf).all()


def test_linear_head_on_policy():
    """Two passes of the same head agree; with a sampler's logits they do as far as matrix products do."""
    hidden, weight = torch.randn(32, 16), torch.randn(500, 16)
    old = draw(hidden @ weight.t(), top_p=0.9)
    first = linear_logprobs(hidden, weight, old.tokens, mask=old.kept).logp
    second = linear_logprobs(hidden.requires_grad_(), weight, old.tokens, mask=old.kept).logp
    assert_ratio_is_one(first, second.detach())
    torch.testing.assert_close(first, old.logprob, rtol=1e-5, atol=1e-5)
