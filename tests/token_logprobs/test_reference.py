"""The reference against a loop over rows in plain Python, and its derivatives."""

from __future__ import annotations

import math

import pytest
import torch

from arcore.ops import reference_linear_logprobs, reference_token_logprobs
from tests.token_logprobs.cases import IGNORE, pack_mask, random_mask


def by_hand(row, target, temperature, softcap, kept):
    z = [
        (softcap * math.tanh(x / softcap) if softcap else x) / temperature
        for x, k in zip(row, kept, strict=True)
        if k
    ]
    if not z:
        return -math.inf, -math.inf, 0.0
    top = max(z)
    lse = top + math.log(math.fsum(math.exp(x - top) for x in z))
    entropy = -math.fsum(math.exp(x - lse) * (x - lse) for x in z)
    position = sum(kept[:target])
    return (z[position] - lse if kept[target] else -math.inf), lse, entropy


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("masked", [False, True])
def test_against_a_loop(softcap, masked):
    logits = 3 * torch.randn(2, 4, 37, dtype=torch.float64)
    target = torch.randint(37, (2, 4))
    target[0, 1] = IGNORE
    temperature = torch.rand(2, 4, dtype=torch.float64) + 0.5
    kept = random_mask(2, 4, 37) if masked else torch.ones(2, 4, 37, dtype=torch.bool)
    if masked:
        kept[1, 2] = False
    for mask in (kept, pack_mask(kept)):
        out = reference_token_logprobs(
            logits, target, temperature=temperature, softcap=softcap, mask=mask, return_entropy=True
        )
        for b in range(2):
            for t in range(4):
                expected = (0.0, 0.0, 0.0)
                if target[b, t] != IGNORE:
                    expected = by_hand(
                        logits[b, t].tolist(), target[b, t].item(), temperature[b, t].item(), softcap,
                        kept[b, t].tolist(),
                    )  # fmt: skip
                got = [x[b, t].item() for x in out]
                assert got == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(softcap, masked):
    logits = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)
    temperature = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 8, 3])
    mask = random_mask(3, 9) if masked else None
    if mask is not None:
        mask[torch.arange(3), target] = True

    def outputs(x, t):
        return reference_token_logprobs(
            x, target, temperature=t, softcap=softcap, mask=mask, return_entropy=True
        )

    assert torch.autograd.gradcheck(outputs, (logits, temperature))


def test_gradcheck_with_the_linear_layer():
    hidden = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([1, 0, IGNORE, 6])

    def outputs(h, w, b):
        return reference_linear_logprobs(h, w, target, bias=b, softcap=3.0, return_entropy=True)

    assert torch.autograd.gradcheck(outputs, (hidden, weight, bias))


def test_edge_rows_have_zero_gradients():
    logits = torch.randn(4, 6, dtype=torch.float64)
    logits[1] = -math.inf  # nothing kept
    logits[2, 3] = -math.inf  # the target is out
    logits[3] = math.nan  # ignored
    logits.requires_grad_()
    out = reference_token_logprobs(logits, torch.tensor([0, 1, 3, IGNORE]), return_entropy=True)
    assert out.logp.tolist()[1:] == [-math.inf, -math.inf, 0.0]
    assert out.logsumexp.tolist()[1] == -math.inf
    assert out.entropy.tolist()[1] == 0.0
    torch.autograd.backward(list(out), [torch.ones(4, dtype=torch.float64)] * 3)
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[[1, 3]] == 0).all()
    assert logits.grad[2, 3] == 0
    (only_logp,) = torch.autograd.grad(
        reference_token_logprobs(logits, torch.tensor([0, 1, 3, IGNORE])).logp.sum(), logits
    )
    assert (only_logp[1:] == 0).all()
