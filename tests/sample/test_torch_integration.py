"""opcheck, torch.compile, torch.export."""

from __future__ import annotations

import pytest
import torch

from arcore.ops import confidence_mask, filter_probs, sample

SETTINGS = torch.tensor([[0.9, 5, 0.9, 0, 2, 0, 0, 1.2, 0, 0, 2.0, -1.0]], dtype=torch.float64)


def _arguments(dtype=torch.float32):
    logits = [torch.randn(2, 3, 40).to(dtype) for _ in range(2)]
    mask = torch.rand(2, 3, 40) < 0.9
    history = torch.randint(0, 40, (2, 3, 4))
    return logits, SETTINGS, torch.randn(2, 3, 40), mask, history, None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    keys = (torch.arange(6), torch.zeros(1, dtype=torch.int64))
    for wanted in ((True,) * 5, (False,) * 5):
        torch.library.opcheck(torch.ops.arcore.sample.default, (*_arguments(dtype), *keys, 2, 0, 0, *wanted))
    for wanted in ((True, True), (False, False)):
        torch.library.opcheck(torch.ops.arcore.filter_probs.default, (*_arguments(dtype), 0, *wanted))
    torch.library.opcheck(
        torch.ops.arcore.confidence_mask.default,
        (
            torch.rand(3, 9),
            torch.rand(3, 9) < 0.5,
            torch.tensor([4]),
            torch.arange(3),
            torch.arange(3),
            1.0,
            0,
        ),
    )


def step(logits, uncond, seed, offset, top_p):
    drawn = sample(
        logits, uncond=uncond, cfg_scale=1.5, top_k=20, top_p=top_p, seed=seed, offset=offset,
        return_prob=True, return_kept=True,
    )  # fmt: skip
    again = confidence_mask(drawn.prob, 2)
    return drawn.tokens, again, filter_probs(logits, mask=drawn.kept)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph(backend):
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for batch in (2, 3, 5):
        x, y = torch.randn(batch, 4, 50), torch.randn(batch, 4, 50)
        seed, offset, top_p = torch.arange(batch)[:, None], torch.arange(4), torch.rand(batch, 4)
        for got, expected in zip(
            compiled(x, y, seed, offset, top_p), step(x, y, seed, offset, top_p), strict=True
        ):
            assert torch.equal(got, expected)


def test_export():
    class Step(torch.nn.Module):
        def forward(self, x, y, seed, offset, top_p):
            return step(x, y, seed, offset, top_p)

    arguments = (
        torch.randn(3, 4, 50), torch.randn(3, 4, 50), torch.arange(3)[:, None], torch.arange(4), torch.rand(3, 4),
    )  # fmt: skip
    program = torch.export.export(Step(), arguments)
    for got, expected in zip(program.module()(*arguments), step(*arguments), strict=True):
        assert torch.equal(got, expected)
