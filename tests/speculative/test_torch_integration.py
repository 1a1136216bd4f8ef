"""opcheck, torch.compile, torch.export, inference mode."""

from __future__ import annotations

import pytest
import torch

from arcore.ops import verify_chain, verify_jacobi, verify_relaxed, verify_tree, verify_typical
from tests.speculative.cases import assert_same, make_case

PARENTS = [-1, -1, 0]


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str
)
def test_opcheck(dtype):
    c = make_case(4, 20, dtype=dtype, parents=PARENTS)
    parents, lengths = c.parents.expand(4, -1), torch.tensor([0, 1, 2, 3])
    ops = torch.ops.arcore
    rows = (c.seed, c.offset)
    for op, arguments in (
        (ops.verify_chain, (c.target, c.tokens, c.draft, None, *rows, False)),
        (ops.verify_chain, (c.target, c.tokens, c.draft, lengths, *rows, True)),
        (ops.verify_tree, (c.target, c.tokens, parents, None, lengths, *rows, False)),
        (ops.verify_tree, (c.target, c.tokens, parents, c.draft, None, *rows, True)),
        (ops.verify_typical, (c.target, c.tokens, parents, None, *rows, 0.09, 0.3, True)),
        (
            ops.verify_relaxed,
            (c.target, c.tokens, c.neighbours, parents, c.draft, None, *rows, 0.1, 5, True, False, False),
        ),
        (ops.verify_jacobi, (c.target, c.tokens, c.draft, lengths, *rows)),
    ):
        torch.library.opcheck(op.default, arguments)


def _everything(target, draft, tokens, neighbours, seed, offset):
    """From logits, as a decoder calls the ops."""
    p, q = target.softmax(-1), draft.softmax(-1)
    return (
        verify_chain(p, tokens, q, seed=seed, offset=offset),
        verify_chain(p, tokens, q, seed=7, offset=3, method="block"),
        verify_tree(p, tokens, PARENTS, seed=seed, offset=offset),
        verify_typical(p, tokens, PARENTS),
        verify_relaxed(p, tokens, neighbours, PARENTS, q, seed=seed, offset=offset),
        verify_jacobi(p, tokens, q, seed=seed, offset=offset),
    )


def _inputs(batch=4):
    c = make_case(batch, 20, parents=PARENTS, zeros=0.0)
    return c.target.log(), c.draft.log(), c.tokens, c.neighbours, c.seed, c.offset


@pytest.mark.slow
def test_compile_by_inductor():
    inputs = _inputs()
    compiled = torch.compile(_everything, fullgraph=True)
    for got, expected in zip(compiled(*inputs), _everything(*inputs), strict=True):
        assert_same(got, expected)


def test_compile_fullgraph_with_dynamic_batch():
    compiled = torch.compile(_everything, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 3, 5):
        inputs = _inputs(batch)
        for got, expected in zip(compiled(*inputs), _everything(*inputs), strict=True):
            assert_same(got, expected)


def test_export():
    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return _everything(*inputs)

    inputs = _inputs()
    program = torch.export.export(Module(), inputs)
    for got, expected in zip(program.module()(*inputs), _everything(*inputs), strict=True):
        assert_same(got, expected)


def test_inference_mode():
    inputs = _inputs()
    expected = _everything(*inputs)
    with torch.inference_mode():
        for got, wanted in zip(_everything(*inputs), expected, strict=True):
            assert_same(got, wanted)
