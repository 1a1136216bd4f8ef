"""opcheck, torch.compile, torch.export, autocast."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from arcore import masks
from arcore.ops import block_sparse_attention
from tests.block_sparse_attention.cases import make_inputs, random_mask, random_tree


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("key_bounds", [False, True])
def test_opcheck(dtype, key_bounds):
    mask = random_mask(17, 33, seed=4, heads=4, key_bounds=key_bounds)
    x = make_inputs(mask, dim=16, dtype=dtype)
    for layout in (lambda t: t, lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)):
        q, k, v = (layout(t).detach().requires_grad_() for t in (x.q, x.k, x.v))
        torch.library.opcheck(
            torch.ops.arcore.block_sparse_attention.default, (q, k, v, mask.bounds, mask.key_bounds, 0.25)
        )


def raw_arguments(mask, *, v_dim=16, key_bias=True):
    """What torch.ops takes for `mask`: q, k, v, and what follows the derivatives' own arguments."""
    x = make_inputs(mask, dim=16, v_dim=v_dim, key_bias=key_bias)
    tree = isinstance(mask, masks.TreeMask)
    key_bounds = None if tree else mask.key_bounds
    words = (mask.words.reshape(*mask.words.shape[:2], -1), mask.prefix) if tree else (None, None)
    return x, (mask.bounds, key_bounds, 0.25), (*words, x.key_bias)


OPCHECK_MASKS = {
    "causal": lambda: masks.causal(20),
    "key_bounds": lambda: random_mask(17, 33, seed=4, heads=4, key_bounds=True),
    "tree": lambda: random_tree(9, [3, 5], seed=1),
}


@pytest.mark.parametrize(
    ("name", "v_dim"),
    [
        ("tree", 24),
        pytest.param("tree", 16, marks=pytest.mark.slow),
        *(
            pytest.param(name, v, marks=pytest.mark.slow)
            for name in ("causal", "key_bounds")
            for v in (16, 24)
        ),
    ],
)
def test_opcheck_of_every_argument_and_of_the_derivatives(name, v_dim):
    x, mask, rest = raw_arguments(OPCHECK_MASKS[name](), v_dim=v_dim)
    ops = torch.ops.arcore
    leaves = [t.clone().requires_grad_() for t in (x.q, x.k, x.v)]
    bias = rest[-1].clone().requires_grad_()
    torch.library.opcheck(ops.block_sparse_attention.default, (*leaves, *mask, None, None, *rest[:2], bias))
    out, lse = ops.block_sparse_attention(x.q, x.k, x.v, *mask, None, None, *rest)
    values = (x.q, x.k, x.v, out, lse)
    for grad_lse in (None, x.grad_lse):
        torch.library.opcheck(
            ops.block_sparse_attention_backward.default,
            (x.grad_out, grad_lse, *values, *mask, None, None, *rest),
        )
    moving = (x.q, None, x.v, rest[-1])
    torch.library.opcheck(ops.block_sparse_attention_jvp.default, (*values, *moving, *mask, *rest))
    tangents = ops.block_sparse_attention_jvp(*values, *moving, *mask, *rest)
    torch.library.opcheck(
        ops.block_sparse_attention_second.default,
        (x.grad_out, x.grad_lse, *values, *moving, *tangents, *mask, *rest),
    )


class Layer(torch.nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.mask = mask
        self.qkv = torch.nn.Linear(32, 96)

    def forward(self, x):  # [B, N, 32]
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        out, lse = block_sparse_attention(q, k, v, self.mask, return_lse=True)
        return out.transpose(1, 2).flatten(2), lse


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph(backend):
    torch.manual_seed(0)
    layer = Layer(masks.next_scale((1, 2, 3)))
    x = torch.randn(2, 14, 32)
    out, lse = layer(x)
    (out.square().sum() + lse.sum()).backward()
    grads = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    out2, lse2 = compiled(x)
    torch.testing.assert_close(out2, out)
    torch.testing.assert_close(lse2, lse)
    (out2.square().sum() + lse2.sum()).backward()
    for p, grad in zip(layer.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-5)


def test_compile_with_dynamic_batch():
    compiled = torch.compile(Layer(masks.causal(9)), fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (1, 2, 5):
        assert compiled(torch.randn(batch, 9, 32))[0].shape == (batch, 9, 32)


@pytest.mark.parametrize("name", ["causal", "tree"])
def test_compile_with_everything_dynamic(name):
    """Batch and heads change without a new graph; masks, biases and keys of one batch entry broadcast."""
    torch.compiler.reset()
    mask = {"causal": masks.causal(20), "tree": random_tree(9, 6, seed=1)}[name]
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter, dynamic=True)
    def step(q, k, v, bias, sinks):
        return block_sparse_attention(q, k, v, mask, key_bias=bias, sinks=sinks, return_lse=True)

    for batch, heads in ((3, 4), (5, 8), (7, 4)):
        x = make_inputs(
            mask, batch=batch, heads=heads, kv_batch=1, dim=12, v_dim=17, key_bias=True, sinks=True
        )
        inputs = [t.clone().requires_grad_() for t in (x.q, x.k, x.v, x.key_bias, x.sinks)]
        twins = [t.detach().clone().requires_grad_() for t in inputs]
        out, lse = step(*inputs)
        wanted, wanted_lse = block_sparse_attention(
            *twins[:3], mask, key_bias=twins[3], sinks=twins[4], return_lse=True
        )
        assert out.stride() == wanted.stride()
        torch.testing.assert_close((out, lse), (wanted, wanted_lse))
        found = torch.autograd.grad(out, inputs, x.grad_out)
        expected = torch.autograd.grad(wanted, twins, x.grad_out)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


def test_export():
    layer = Layer(masks.next_scale((1, 2, 3))).eval()
    x = torch.randn(2, 14, 32)
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x)[0], layer(x)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    mask = masks.causal(12)
    x = make_inputs(mask, dim=16)
    q = x.q.clone().requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        out, lse = block_sparse_attention(q, x.k, x.v, mask, return_lse=True)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert torch.equal(out, block_sparse_attention(x.q.to(dtype), x.k.to(dtype), x.v.to(dtype), mask))
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32


def test_autocast_casts_mixed_dtypes():
    mask = masks.causal(12)
    x = make_inputs(mask, dim=16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = block_sparse_attention(x.q, x.k.bfloat16(), x.v, mask)
    assert out.dtype == torch.bfloat16


def test_no_grad_and_inference_mode():
    mask = masks.causal(12)
    x = make_inputs(mask, dim=16)
    expected = block_sparse_attention(x.q, x.k, x.v, mask)
    with torch.inference_mode():
        assert torch.equal(block_sparse_attention(x.q, x.k, x.v, mask), expected)
