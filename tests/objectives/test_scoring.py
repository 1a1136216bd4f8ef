"""The scorer: against plain log-softmax, packed and not, filtered sampling replayed, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import arcore
from arcore.decoding import Sampling, draw_rollout
from arcore.nn import PreferenceBatch, Rollout
from arcore.objectives import score, score_rollout

PROMPTS = [[5, 6, 7], [1, 2, 3, 4, 250]]


class Plain(nn.Module):
    """A model that shows logits only."""

    def __init__(self, inner: Any, wrapped: bool = False) -> None:
        super().__init__()
        self.inner, self.vocab_size, self.wrapped = inner, inner.vocab_size, wrapped

    def forward(self, ids: Tensor) -> Any:
        logits = self.inner(ids)
        return type("Output", (), {"logits": logits}) if self.wrapped else logits


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    made = arcore.create_model("llama_tiny", num_layers=2, dim=64, hidden_dim=96)
    with torch.no_grad():
        made.lm_head.weight.normal_(std=0.5)
    return made


def dense(model: Any, rollout: Rollout) -> tuple[Tensor, Tensor]:
    law = (model(rollout.tokens) / rollout.temperature).double().log_softmax(-1)
    rows, places = rollout.mask.nonzero(as_tuple=True)
    picked = law[rows, places - 1]
    logp, entropy = torch.zeros(rollout.tokens.shape), torch.zeros(rollout.tokens.shape)
    logp[rows, places] = picked.gather(1, rollout.tokens[rows, places, None])[:, 0].float()
    entropy[rows, places] = -(picked.exp() * picked).sum(1).float()
    return logp, entropy


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equals_log_softmax_in_every_way_of_scoring(model: Any, temperature: float) -> None:
    rollout = draw_rollout(
        model, PROMPTS, 3, max_new_tokens=6, sampling=Sampling(temperature=temperature), seed=3
    )
    logp, entropy = dense(model, rollout)
    ways = [
        score_rollout(model, rollout, entropy=True, packed=True),
        score_rollout(model, rollout, entropy=True, packed=False),
        score_rollout(Plain(model), rollout, entropy=True),
        score_rollout(Plain(model, wrapped=True), rollout, entropy=True),
    ]
    for found in ways:
        assert found.entropy is not None
        torch.testing.assert_close(found.logp, logp, rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(found.entropy, entropy, rtol=1e-5, atol=2e-5)
        assert (found.logp <= 0).all()
    assert rollout.logp is not None
    torch.testing.assert_close(rollout.logp, logp, rtol=1e-4, atol=1e-4)


def test_gradients_of_packed_and_separate_rows_agree(model: Any) -> None:
    rollout = draw_rollout(model, PROMPTS, 4, max_new_tokens=5, seed=1)
    found = []
    for packed in (True, False):
        model.zero_grad()
        (score_rollout(model, rollout, packed=packed).logp ** 2).sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    model.zero_grad()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


@pytest.mark.parametrize("filters", [{"top_p": 0.8}, {"top_k": 5}, {"min_p": 0.05}])
def test_kept_sets_of_the_sampler_are_replayed(model: Any, filters: dict[str, Any]) -> None:
    rollout = draw_rollout(model, PROMPTS, 8, max_new_tokens=6, sampling=Sampling(**filters), seed=2)
    assert rollout.kept is not None
    assert rollout.logp is not None
    replayed = score_rollout(model, rollout).logp
    torch.testing.assert_close(replayed, rollout.logp, rtol=1e-4, atol=1e-4)
    whole = score(model, rollout.tokens, rollout.mask).logp
    # Over the whole vocabulary each token is less likely, by the mass that was kept.
    assert (whole[rollout.mask] < replayed[rollout.mask]).all()


def test_float64_models_are_scored_in_float64() -> None:
    torch.manual_seed(0)
    embedding = nn.Embedding(7, 7, dtype=torch.float64)
    tokens, mask = torch.tensor([[1, 2, 3]]), torch.tensor([[False, True, True]])
    found = score(embedding, tokens, mask, entropy=True).logp
    law = embedding(tokens[0, :2]).log_softmax(-1)
    known = torch.stack([law.new_zeros(()), law[0, 2], law[1, 3]])
    torch.testing.assert_close(found[0], known, rtol=1e-14, atol=0)


def test_nothing_to_score(model: Any) -> None:
    tokens, mask = torch.ones(2, 4, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.bool)
    found = score(model, tokens, mask, entropy=True)
    assert not found.logp.any()
    assert found.entropy is not None
    # A row without a response, beside one that has one.
    mask[1, 2:] = True
    packed = score(model, tokens, mask, groups=torch.tensor([0, 1]))
    torch.testing.assert_close(packed.logp, score(model, tokens, mask).logp, rtol=1e-5, atol=1e-5)
    assert not packed.logp[0].any()


def test_refuses(model: Any) -> None:
    tokens = torch.full((1, 4), 3)
    mask = torch.tensor([[False, False, True, True]])
    with pytest.raises(ValueError, match=r"below the model's vocabulary of 256 but got 300.*one vocabulary"):
        score(model, tokens + 297, mask)
    with pytest.raises(ValueError, match=r"expected kept sets of the 2 response tokens but got 1"):
        score(model, tokens, mask, kept=torch.zeros(1, 8, dtype=torch.int32))
    with pytest.raises(ValueError, match="follow at least one token of a prompt but row 0"):
        score(model, tokens, ~mask)
    with pytest.raises(TypeError, match="expected int64 tokens and a bool mask but got int64 and int64"):
        score(model, tokens, mask.long())
    with pytest.raises(ValueError, match="expected logits of shape"):
        score(nn.Sequential(nn.Embedding(9, 4), nn.Flatten(1)), tokens, mask)
    with pytest.raises(ValueError, match="temperature above 0 but got 0"):
        draw_rollout(model, PROMPTS, 1, max_new_tokens=2, sampling=Sampling(temperature=0.0))
    with pytest.raises(ValueError, match="max_new_tokens"):
        draw_rollout(model, PROMPTS, 1, max_new_tokens=0)


def test_records_refuse_what_does_not_fit() -> None:
    tokens, mask = torch.zeros(2, 3, dtype=torch.int64), torch.tensor([[False, True, True]] * 2)
    groups = torch.zeros(2, dtype=torch.int64)
    assert Rollout(tokens=tokens, mask=mask, groups=groups).lengths.tolist() == [2, 2]
    with pytest.raises(ValueError, match=r"expected groups \(2,\)"):
        Rollout(tokens=tokens, mask=mask, groups=groups[:1])
    with pytest.raises(ValueError, match="rows of a group to stand together"):
        many = torch.zeros(3, 3, dtype=torch.int64)
        Rollout(tokens=many, mask=many.bool(), groups=torch.tensor([0, 1, 0]))
    with pytest.raises(ValueError, match=r"expected rewards \(2, M\) but got \(2,\)"):
        Rollout(tokens=tokens, mask=mask, groups=groups, rewards=torch.zeros(2))
    with pytest.raises(ValueError, match="expected kept sets of the 4 drawn tokens but got 3"):
        Rollout(tokens=tokens, mask=mask, groups=groups, kept=torch.zeros(3, 1, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"preference \(1,\), half as many as rows"):
        PreferenceBatch(tokens=tokens, mask=mask, preference=torch.zeros(2))
    with pytest.raises(ValueError, match=r"preferences in \[0, 1\]"):
        PreferenceBatch(tokens=tokens, mask=mask, preference=torch.tensor([2.0]))
    with pytest.raises(ValueError, match=r"expected previous \(2,\) but got \(1,\)"):
        PreferenceBatch(tokens=tokens, mask=mask, preference=torch.ones(1), previous=torch.zeros(1))
