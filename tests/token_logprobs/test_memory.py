"""What forward and backward hold at their highest, counted by torch's allocator, to the byte."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from arcore.ops import linear_logprobs, token_logprobs


def peak_bytes(run) -> int:
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    del result
    return peak


def _total(out):
    return sum(x.sum() for x in out if x is not None)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_cost_their_gradient_and_nothing_more(dtype, entropy):
    logits = torch.randn(64, 20_000).to(dtype).requires_grad_()
    target = torch.randint(20_000, (64,))

    def run():
        return torch.autograd.grad(_total(token_logprobs(logits, target, return_entropy=entropy)), logits)

    gradient = logits.numel() * logits.element_size()
    assert gradient <= peak_bytes(run) <= 1.01 * gradient


def test_the_counter_sees_what_eager_pytorch_holds():
    logits = torch.randn(64, 20_000, requires_grad=True)

    def run():
        logp = logits.log_softmax(-1)
        return torch.autograd.grad((logp * logp.exp()).sum(), logits)

    assert peak_bytes(run) >= 3 * 4 * logits.numel()


@pytest.mark.parametrize("entropy", [False, True])
def test_a_head_never_holds_its_logits(entropy):
    rows, width, vocab = 512, 16, 20_000
    hidden = torch.randn(rows, width, requires_grad=True)
    weight = torch.randn(vocab, width, requires_grad=True)
    target = torch.randint(vocab, (rows,))
    tile = (256, 512)

    def run():
        out = linear_logprobs(hidden, weight, target, tile=tile, return_entropy=entropy)
        return torch.autograd.grad(_total(out), (hidden, weight))

    gradients = 4 * (hidden.numel() + weight.numel())
    beyond = peak_bytes(run) - gradients
    assert beyond <= 0.05 * 4 * rows * vocab
    assert beyond <= 1.5 * 4 * tile[0] * tile[1]
