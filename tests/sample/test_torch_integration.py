"""opcheck, torch.compile, torch.export."""

from __future__ import annotations

import pytest
import torch

from arcore.ops import confidence_mask, filter_probs, sample

SETTINGS = torch.tensor([[0.9, 5, 0.9, 0, 1, 0, 0, 1.2, 0, 0, 2.0, -1.0]], dtype=torch.float64)


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


CALLS = {
    "no seed": lambda x: sample(x, top_k=20),
    "seed of a fixed size": lambda x: sample(x, seed=torch.arange(6)),
    "mask of a fixed width": lambda x: filter_probs(x, mask=torch.ones(1, 100).bool()),
    "settings of a fixed size": lambda x: sample(
        x, temperature=torch.ones(6), top_k=torch.full((1,), 3), seed=torch.arange(6)
    ),
    "guidance and history": lambda x: sample(
        x, uncond=torch.ones(6, 100), cfg_scale=1.5, history=torch.zeros(6, 3).long(), presence_penalty=0.1,
        seed=torch.arange(6), return_prob=True,
    ),
    "three dimensions": lambda x: sample(
        x[:, None].expand(-1, 4, -1), seed=torch.arange(6)[:, None], offset=torch.arange(4), bias=torch.ones(100)
    ),
    "confidence without a seed": lambda x: confidence_mask(x, 4, temperature=1.0),
    "counts of a fixed size": lambda x: confidence_mask(
        x, torch.full((6,), 3), candidates=torch.ones(100).bool(), temperature=1.0, seed=torch.arange(6)
    ),
}  # fmt: skip
ANY_BATCH = {"no seed", "mask of a fixed width", "confidence without a seed"}


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", CALLS)
def test_sizes_may_be_symbols(name, dynamic):
    """Automatic dynamic shapes at the second batch size, and dynamic=True beside sizes that are fixed in the code."""
    call = CALLS[name]
    compiled = torch.compile(call, fullgraph=True, backend="eager", dynamic=dynamic)
    for batch in (6, 7, 1, 8) if name in ANY_BATCH else (6,):
        x = torch.randn(batch, 100)
        got = compiled(x)
        if name in ("no seed", "confidence without a seed"):
            assert got.shape[0] == batch
        else:
            expected = call(x)
            pairs = zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]
            assert all(torch.equal(a, b) for a, b in pairs if a is not None)
