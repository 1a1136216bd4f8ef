"""The compiled op against the reference: masks, shapes, dtypes, strides, GQA, hard values."""

from __future__ import annotations

import math

import pytest
import torch

from arcore import masks
from arcore.masks import IntervalMask
from arcore.ops import block_sparse_attention, reference_block_sparse_attention
from tests.block_sparse_attention.cases import MASKS, assert_as_good_as_eager, make_inputs, random_mask

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_masks(name, dtype):
    mask = MASKS[name]()
    assert_as_good_as_eager(make_inputs(mask, dtype=dtype), mask)


@pytest.mark.parametrize("dim", [8, 24, 40, 64, 72, 80, 96, 128, 136, 256])
def test_head_dims(dim):
    mask = masks.next_scale((1, 2, 3, 5, 7))
    assert_as_good_as_eager(make_inputs(mask, dim=dim), mask)


@pytest.mark.parametrize("key_bounds", [False, True])
@pytest.mark.parametrize(
    ("nq", "nk"), [(1, 1), (1, 1000), (15, 17), (17, 15), (63, 65), (127, 300), (300, 1), (97, 513)]
)
def test_random_masks_of_odd_lengths(nq, nk, key_bounds):
    mask = random_mask(nq, nk, seed=nq * 1000 + nk, batch=2, heads=4, key_bounds=key_bounds)
    assert_as_good_as_eager(make_inputs(mask, dim=40), mask)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60))
def test_random_masks_many(seed):
    generator = torch.Generator().manual_seed(seed)
    nq, nk = (int(n) for n in torch.randint(1, 700, (2,), generator=generator))
    dim = 8 * int(torch.randint(1, 33, (1,), generator=generator))
    mask = random_mask(
        nq, nk, seed=seed, batch=1 + seed % 2, heads=(1, 4)[seed // 2 % 2], key_bounds=seed % 3 == 0
    )
    assert_as_good_as_eager(make_inputs(mask, dim=dim, dtype=DTYPES[seed % 3], seed=seed), mask)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 2), (5, 1), (8, 8)])
def test_grouped_query_attention(heads, kv_heads):
    mask = masks.skip_causal(2, 31)
    assert_as_good_as_eager(make_inputs(mask, batch=1, heads=heads, kv_heads=kv_heads, dim=32), mask)


def test_mask_broadcast_over_batch_and_heads():
    full_mask = random_mask(65, 70, seed=5, batch=2, heads=4, key_bounds=True)
    x = make_inputs(full_mask, dim=16)
    whole = block_sparse_attention(x.q, x.k, x.v, full_mask)
    for b in range(2):
        for h in range(4):
            one = IntervalMask(
                full_mask.bounds[b : b + 1, h : h + 1], 70, key_bounds=full_mask.key_bounds[b : b + 1]
            )
            part = block_sparse_attention(x.q[b : b + 1, h : h + 1], x.k[b : b + 1, h // 2 : h // 2 + 1],
                                          x.v[b : b + 1, h // 2 : h // 2 + 1], one)  # fmt: skip
            assert torch.equal(whole[b : b + 1, h : h + 1], part)


@pytest.mark.parametrize("shape", ["no_queries", "no_keys", "no_batch", "no_heads"])
def test_empty_tensors(shape):
    batch, heads = (0 if shape == "no_batch" else 2), (0 if shape == "no_heads" else 4)
    nq, nk = (0 if shape == "no_queries" else 5), (0 if shape == "no_keys" else 7)
    mask = IntervalMask(torch.zeros(1, 1, nq, 2, dtype=torch.int32), nk)
    q = torch.randn(batch, heads, nq, 16, requires_grad=True)
    k = torch.randn(batch, heads // 2, nk, 16, requires_grad=True)
    v = torch.randn(batch, heads // 2, nk, 16, requires_grad=True)
    out, lse = block_sparse_attention(q, k, v, mask, return_lse=True)
    assert out.shape == q.shape
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full((batch, heads, nq), -math.inf))
    out.sum().backward()
    for x in (q, k, v):
        assert torch.equal(x.grad, torch.zeros_like(x))


def _strided_variants(x):
    b, h, n, d = x.shape
    yield x.transpose(1, 2).contiguous().transpose(1, 2)  # [B, N, H, D] storage
    wide = torch.randn(b, h, n, 3 * d, dtype=x.dtype)
    wide[..., d : 2 * d] = x
    yield wide[..., d : 2 * d]  # a slice of a fused projection
    yield x.transpose(2, 3).contiguous().transpose(2, 3)  # last dimension not contiguous
    yield x.flip(2).contiguous().flip(2)


def test_any_strides_give_the_same_bits():
    mask = masks.next_scale((1, 2, 3, 5))
    x = make_inputs(mask, dim=24)
    expected = block_sparse_attention(x.q, x.k, x.v, mask)
    inputs = [t.clone().requires_grad_() for t in (x.q, x.k, x.v)]
    grads = torch.autograd.grad(block_sparse_attention(*inputs, mask), inputs, x.grad_out)
    for q, k, v, grad_out in zip(*map(_strided_variants, (x.q, x.k, x.v, x.grad_out)), strict=True):
        assert torch.equal(block_sparse_attention(q, k, v, mask), expected)
        inputs = [t.detach().requires_grad_() for t in (q, k, v)]
        out = block_sparse_attention(*inputs, mask)
        for got, wanted in zip(torch.autograd.grad(out, inputs, grad_out), grads, strict=True):
            assert torch.equal(got, wanted)


def test_output_keeps_the_layout_of_q():
    mask = masks.causal(9)
    q = torch.randn(2, 9, 4, 16).transpose(1, 2)
    out = block_sparse_attention(q, q, q, mask)
    assert out.stride() == q.stride()


def test_expanded_inputs_and_gradients():
    mask = masks.causal(33)
    q = torch.randn(1, 1, 33, 16, requires_grad=True)
    k = torch.randn(1, 2, 33, 16)
    out = block_sparse_attention(q.expand(3, 4, 33, 16), k.expand(3, 2, 33, 16), k.expand(3, 2, 33, 16), mask)
    out.sum().backward()  # the gradient of out is a stride-0 tensor of ones
    twin = q.detach().double().requires_grad_()
    expected = reference_block_sparse_attention(
        twin.expand(3, 4, 33, 16), k.double().expand(3, 2, 33, 16), k.double().expand(3, 2, 33, 16), mask
    )
    expected.sum().backward()
    torch.testing.assert_close(q.grad.double(), twin.grad, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits(dtype):
    """VAR's l2-normalised attention reaches logits of +-100."""
    mask = masks.next_scale((1, 2, 3, 4, 5, 6))
    x = make_inputs(mask, dtype=dtype)
    x.q, x.k = (torch.nn.functional.normalize(t.float(), dim=-1).to(dtype) for t in (x.q, x.k))
    x.k[:, :, : mask.nk // 2] = x.q[:, :2, : mask.nk // 2]
    assert_as_good_as_eager(x, mask, scale=100.0)


@pytest.mark.parametrize("scale", [0.0, -0.5, 1.0, 7.0])
def test_scales(scale):
    mask = masks.causal(70)
    assert_as_good_as_eager(make_inputs(mask), mask, scale=scale)


def test_fully_masked_rows_have_no_output_and_no_gradient():
    bounds = torch.tensor([[0, 3], [2, 2], [1, 5], [5, 5]], dtype=torch.int32).reshape(1, 1, 4, 2)
    mask = IntervalMask(bounds, 5)
    x = make_inputs(mask, dim=8)
    q, k, v = (t.requires_grad_() for t in (x.q, x.k, x.v))
    out, lse = block_sparse_attention(q, k, v, mask, return_lse=True)
    assert torch.equal(out[:, :, [1, 3]], torch.zeros(2, 4, 2, 8))
    assert torch.equal(lse[:, :, [1, 3]], torch.full((2, 4, 2), -math.inf))
    assert torch.isfinite(lse[:, :, [0, 2]]).all()
    torch.autograd.backward([out, lse], [x.grad_out, x.grad_lse])
    assert torch.equal(q.grad[:, :, [1, 3]], torch.zeros(2, 4, 2, 8))
    for t in (q, k, v):
        assert torch.isfinite(t.grad).all()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key_bounds", [False, True])
def test_poison_stays_behind_the_mask(poison, key_bounds):
    """Every row's result depends only on what it may see, even if the rest is NaN or infinite."""
    mask = random_mask(130, 300, seed=11, key_bounds=key_bounds)
    allowed = mask.to_bool()[0, 0]  # [Nq, Nk]
    x = make_inputs(mask, batch=1, heads=2, kv_heads=1, dim=24)
    clean = [t.clone() for t in (x.q, x.k, x.v, x.grad_out)]
    bad_keys = torch.tensor([0, 7, 150, 299])
    blind = ~allowed[:, bad_keys].any(dim=1)  # rows that see no poisoned key
    assert blind.any()
    assert (~blind).any()

    def gradients(q, k, v, grad_out):
        q, k, v = (t.clone().requires_grad_() for t in (q, k, v))
        out, lse = block_sparse_attention(q, k, v, mask, return_lse=True)
        return out.detach(), lse.detach(), *torch.autograd.grad(out, (q, k, v), grad_out)

    expected = gradients(*clean)
    k, v = clean[1].clone(), clean[2].clone()
    k[:, :, bad_keys] = poison
    v[:, :, bad_keys] = poison
    got = gradients(clean[0], k, v, clean[3])
    for name, a, b in zip(("out", "lse", "grad_q"), got, expected, strict=False):
        torch.testing.assert_close(a[:, :, blind], b[:, :, blind], rtol=0, atol=1e-5, msg=name)

    # Poisoned queries and gradients must not reach keys that they do not see.
    bad_rows = torch.tensor([3, 64, 129])
    q, grad_out = clean[0].clone(), clean[3].clone()
    q[:, :, bad_rows] = poison
    grad_out[:, :, bad_rows] = poison
    got = gradients(q, clean[1], clean[2], grad_out)
    unseen = ~allowed[bad_rows].any(dim=0)
    assert unseen.any()
    for name, a, b in zip(("grad_k", "grad_v"), got[3:], expected[3:], strict=True):
        torch.testing.assert_close(a[:, :, unseen], b[:, :, unseen], rtol=0, atol=1e-5, msg=name)


def test_visible_nan_is_not_hidden():
    mask = masks.causal(40)
    x = make_inputs(mask, batch=1, heads=1, kv_heads=1, dim=16)
    x.v[0, 0, 10] = math.nan
    out = block_sparse_attention(x.q, x.k, x.v, mask)
    assert torch.isfinite(out[0, 0, :10]).all()
    assert torch.isnan(out[0, 0, 10:]).all()


def test_documents_equal_separate_calls():
    lengths = [5, 64, 1, 33]
    x = make_inputs(masks.documents(lengths), batch=1, dim=32)
    packed = block_sparse_attention(x.q, x.k, x.v, masks.documents(lengths))
    start = 0
    for n in lengths:
        part = slice(start, start + n)
        alone = block_sparse_attention(x.q[:, :, part], x.k[:, :, part], x.v[:, :, part], masks.causal(n))
        torch.testing.assert_close(packed[:, :, part], alone, rtol=0, atol=2e-6)
        start += n


def test_next_scale_rows_equal_steps_over_a_cache():
    scales = (1, 2, 3, 4)
    mask = masks.next_scale(scales)
    x = make_inputs(mask, dim=16)
    whole = block_sparse_attention(x.q, x.k, x.v, mask)
    start = 0
    for side in scales:
        stop = start + side * side
        step = block_sparse_attention(
            x.q[:, :, start:stop], x.k[:, :, :stop], x.v[:, :, :stop], masks.full(side * side, stop)
        )
        torch.testing.assert_close(step, whole[:, :, start:stop], rtol=0, atol=2e-6)
        start = stop


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_with_the_exported_mask_agrees():
    from torch.nn.attention.flex_attention import flex_attention

    mask = masks.skip_causal(2, 40)
    x = make_inputs(mask, batch=1, heads=2, kv_heads=2, dim=16)
    expected = flex_attention(x.q, x.k, x.v, block_mask=mask.to_block_mask())
    torch.testing.assert_close(block_sparse_attention(x.q, x.k, x.v, mask), expected, rtol=0, atol=1e-5)


def test_second_derivative_is_refused():
    mask = masks.causal(4)
    q = torch.randn(1, 1, 4, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(block_sparse_attention(q, q, q, mask).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; use reference_block_sparse_attention"):
        grad.sum().backward()
