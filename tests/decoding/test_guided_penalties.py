"""Guidance behind penalties: the numbers of `arcore.ops.sample(guidance="after")`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import arcore
from arcore.decoding import GuidedModel, generate, jacobi
from arcore.ops import sample

SCALE, PENALTY = 2.5, 1.7


def model() -> Any:
    torch.manual_seed(0)
    made = arcore.create_model("mamba_tiny", d_model=32, n_layer=2, vocab_size=24).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return made


@torch.no_grad()
def by_hand(net: Any, prompt: Tensor, uncond: Tensor, guidance: Any, temperature: float) -> Tensor:
    text, other = prompt, uncond
    for place in range(12):
        cond, free = (net(ids)[:, -1, :24] for ids in (text, other))
        token = sample(
            cond,
            uncond=free,
            cfg_scale=SCALE,
            temperature=temperature,
            repetition_penalty=PENALTY,
            history=text,
            guidance=guidance,
            seed=torch.tensor([5]),
            offset=prompt.shape[1] + place,
        )
        text, other = (torch.cat([ids, token[:, None]], 1) for ids in (text, other))
    return text[0, prompt.shape[1] :]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_guidance_before_and_after_penalties(temperature: float):
    net, prompt, uncond = model(), torch.randint(1, 24, (1, 5)), torch.tensor([[0]])
    settings: dict[str, Any] = {"max_new_tokens": 12, "temperature": temperature, "seed": [5], "eos": ()}
    behind = GuidedModel(net, scale=SCALE, uncond=uncond, repetition_penalty=PENALTY)
    after = generate(behind, prompt, **settings).ids[0]
    assert torch.equal(after, by_hand(net, prompt, uncond, "after", temperature))
    plain = GuidedModel(net, scale=SCALE, uncond=uncond)
    before = generate(plain, prompt, repetition_penalty=PENALTY, **settings).ids[0]
    assert torch.equal(before, by_hand(net, prompt, uncond, "before", temperature))
    logits = [one.prefill(prompt, one.make_cache(1, 8)) for one in (behind, plain)]
    assert (logits[0] - logits[1]).abs().max() > 0.1
    # Rows of other lengths beside it change nothing, padding included.
    several = generate(behind, [[3], prompt[0].tolist()], **settings | {"seed": [1, 5]}).ids[1]
    assert torch.equal(several, after)


def test_what_cannot_follow_drafts_is_refused():
    net, uncond = model(), torch.tensor([[0]])
    guided = GuidedModel(net, scale=SCALE, uncond=uncond, repetition_penalty=PENALTY)
    with pytest.raises(ValueError, match="reads no drafts"):
        jacobi(guided, torch.ones(1, 3).long(), max_new_tokens=4)
    with pytest.raises(ValueError, match="repetition_penalty to be positive and finite but got 0"):
        GuidedModel(net, scale=SCALE, uncond=uncond, repetition_penalty=0.0)
    cache = guided.make_cache(1, 8)
    guided.prefill(torch.ones(1, 3).long(), cache)
    with pytest.raises(ValueError, match="cannot go back"):
        cache.snapshot()
