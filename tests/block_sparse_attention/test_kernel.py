"""The compiled op against the reference: masks, shapes, dtypes, strides, GQA, hard values."""

from __future__ import annotations

import math

import pytest
import torch

from arcore import masks
from arcore.masks import IntervalMask
from arcore.ops import alibi_bias, block_sparse_attention, reference_block_sparse_attention
from tests.block_sparse_attention.cases import (
    MASKS,
    assert_as_good_as_eager,
    make_inputs,
    random_mask,
    random_tree,
)

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("dim", "v_dim"), [(1, 1), (7, 7), (20, 20), (33, 5), (24, 40), (64, 96), (300, 130)]
)
def test_any_head_dims(dim, v_dim, dtype):
    mask = masks.next_scale((1, 2, 3, 5))
    assert_as_good_as_eager(make_inputs(mask, dim=dim, v_dim=v_dim, dtype=dtype), mask)


def test_values_of_another_width_equal_padded_ones():
    mask = masks.causal(70)
    x = make_inputs(mask, dim=40, v_dim=24)
    wide = torch.nn.functional.pad(x.v, (0, 16))
    padded = block_sparse_attention(x.q, x.k, wide, mask)[..., :24]
    assert torch.equal(block_sparse_attention(x.q, x.k, x.v, mask), padded)


@pytest.mark.parametrize("mask", [masks.causal(33), random_tree(33, 0, seed=1)], ids=["causal", "tree"])
def test_one_batch_entry_of_keys_serves_all_queries(mask):
    x = make_inputs(mask, batch=3, kv_batch=1, dim=16)
    assert_as_good_as_eager(x, mask)
    whole = block_sparse_attention(x.q, x.k.repeat(3, 1, 1, 1), x.v.repeat(3, 1, 1, 1), mask)
    assert torch.equal(block_sparse_attention(x.q, x.k, x.v, mask), whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("nodes", "prefix", "batch"),
    [
        (1, 0, 1),
        (7, [0, 13], 1),
        (64, 300, 1),
        (64, [509, 5], 2),
        (65, [3, 250], 2),
        (130, 37, 1),
        (200, [0, 700], 1),
    ],
)
def test_trees(nodes, prefix, batch, dtype):
    mask = random_tree(nodes, prefix, seed=nodes, batch=batch)
    assert_as_good_as_eager(make_inputs(mask, dim=24, dtype=dtype), mask)


def test_a_chain_equals_a_causal_mask():
    mask = masks.tree([-1, *range(99)], 50)
    x = make_inputs(mask, dim=32)
    inputs = [t.clone().requires_grad_() for t in (x.q, x.k, x.v)]
    twins = [t.clone().requires_grad_() for t in (x.q, x.k, x.v)]
    chain, causal = (
        block_sparse_attention(*inputs, mask),
        block_sparse_attention(*twins, masks.causal(100, offset=50)),
    )
    assert torch.equal(chain, causal)
    for a, b in zip(
        torch.autograd.grad(chain, inputs, x.grad_out),
        torch.autograd.grad(causal, twins, x.grad_out),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_a_tree_of_a_batch_entry_alone():
    mask = random_tree(70, [31, 400], seed=3, batch=2)
    x = make_inputs(mask, dim=16)
    whole = block_sparse_attention(x.q, x.k, x.v, mask)
    for b, prefix in enumerate((31, 400)):
        nk = prefix + 70
        alone = masks.TreeMask(mask.words[b : b + 1], prefix)
        part = block_sparse_attention(x.q[b : b + 1], x.k[b : b + 1, :, :nk], x.v[b : b + 1, :, :nk], alone)
        assert torch.equal(whole[b : b + 1], part)


def test_poison_in_other_branches_of_a_tree():
    mask = masks.tree([-1, 0, 0, 1, 2], [2, 4])
    x = make_inputs(mask, dim=8)
    allowed = mask.to_bool()[:, 0]  # [B, 5, Nk]
    expected = block_sparse_attention(x.q, x.k, x.v, mask)
    k, v = x.k.clone(), x.v.clone()
    k[0, :, 3], v[0, :, 3] = math.nan, math.inf  # node 1 of the first tree
    out = block_sparse_attention(x.q, k, v, mask)
    blind = ~allowed[0, :, 3]
    assert torch.equal(blind, torch.tensor([True, False, True, False, True]))
    torch.testing.assert_close(out[0][:, blind], expected[0][:, blind], rtol=0, atol=1e-6)
    assert torch.isnan(out[0][:, ~blind]).all()
    torch.testing.assert_close(out[1], expected[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["next_scale", "window_sinks", "full"])
@pytest.mark.parametrize(("key_bias", "sinks"), [(True, False), (False, True), (True, True)])
def test_key_bias_and_sinks(name, key_bias, sinks, dtype):
    mask = MASKS[name]()
    assert_as_good_as_eager(make_inputs(mask, dim=24, key_bias=key_bias, sinks=sinks, dtype=dtype), mask)


def test_shapes_of_a_key_bias():
    mask = masks.causal(40)
    x = make_inputs(mask, dim=16)
    bias = torch.randn(2, 4, 40)
    whole = block_sparse_attention(x.q, x.k, x.v, mask, key_bias=bias)
    for b in range(2):
        one = block_sparse_attention(x.q[b : b + 1], x.k[b : b + 1], x.v[b : b + 1], mask, key_bias=bias[b])
        assert torch.equal(whole[b : b + 1], one)
    first = bias[0, 0].requires_grad_()
    out = block_sparse_attention(x.q, x.k, x.v, mask, key_bias=first)
    twin = bias[:1, :1].expand(2, 4, 40).detach().clone().requires_grad_()
    same = block_sparse_attention(x.q, x.k, x.v, mask, key_bias=twin)
    assert torch.equal(out, same)
    out.backward(x.grad_out)
    same.backward(x.grad_out)
    torch.testing.assert_close(first.grad, twin.grad.sum((0, 1)), rtol=0, atol=1e-5)


def test_alibi():
    """The bias of each key alone gives what the bias by distance gives."""
    slopes, n = torch.tensor([0.5, 0.25, 0.125, 0.0625]), 300
    mask = masks.causal(n)
    x = make_inputs(mask, dim=32)
    out = block_sparse_attention(x.q, x.k, x.v, mask, key_bias=alibi_bias(slopes, n))
    q, k, v = (t.double() for t in (x.q, x.k.repeat_interleave(2, 1), x.v.repeat_interleave(2, 1)))
    distance = (torch.arange(n) - torch.arange(n)[:, None]).double()
    logits = q @ k.transpose(2, 3) / math.sqrt(32) + slopes.double().view(-1, 1, 1) * distance
    expected = logits.masked_fill(~mask.to_bool(), -math.inf).softmax(-1) @ v
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("value", [-math.inf, math.inf, math.nan, 3e38, -3e38])
def test_extreme_key_biases(value):
    """A bias of -inf hides a key; what a row may not see does not reach it."""
    mask = masks.causal(40)
    x = make_inputs(mask, dim=16)
    bias = torch.zeros(40)
    bias[20] = value
    out, lse = block_sparse_attention(x.q, x.k, x.v, mask, key_bias=bias, return_lse=True)
    exact, exact_lse = reference_block_sparse_attention(
        x.q.double(), x.k.double(), x.v.double(), mask, key_bias=bias.double(), return_lse=True
    )
    assert torch.equal(out[:, :, :20], block_sparse_attention(x.q, x.k, x.v, mask)[:, :, :20])
    if value < 3e38:
        torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-5)
        torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-5)


def test_a_row_whose_keys_are_all_hidden_by_the_bias():
    mask = masks.full(3, 5)
    x = make_inputs(mask, dim=8)
    q, k, v = (t.requires_grad_() for t in (x.q, x.k, x.v))
    bias = torch.full((5,), -math.inf)
    out, lse = block_sparse_attention(q, k, v, mask, key_bias=bias, return_lse=True)
    assert torch.equal(out, torch.zeros_like(out))
    assert (lse == -math.inf).all()
    out.backward(x.grad_out)
    for t in (q, k, v):
        assert torch.equal(t.grad, torch.zeros_like(t))


def test_extreme_sinks():
    bounds = torch.tensor([[0, 3], [2, 2]], dtype=torch.int32).reshape(1, 1, 2, 2)
    mask = IntervalMask(bounds, 3)
    x = make_inputs(mask, dim=8)
    plain, plain_lse = block_sparse_attention(x.q, x.k, x.v, mask, return_lse=True)
    sinks = torch.tensor([-math.inf, 0.0, 1e4, -1e4], requires_grad=True)
    out, lse = block_sparse_attention(x.q, x.k, x.v, mask, sinks=sinks, return_lse=True)
    assert torch.equal(out[:, [0, 3]], plain[:, [0, 3]])
    assert torch.equal(lse[:, 0], plain_lse[:, 0])
    assert torch.equal(out[:, 2], torch.zeros_like(out[:, 2]))
    assert torch.equal(lse[:, :, 1], sinks.detach().expand(2, 4))
    out.sum().backward()
    assert sinks.grad.isfinite().all()


SEES_ONE = {
    "one_key": lambda: masks.full(3, 1),
    "one_of_many": lambda: masks.documents([1] * 300),
    "by_key_bounds": lambda: IntervalMask(
        torch.tensor([0, 600], dtype=torch.int32).expand(1, 1, 2, 2),
        600,
        key_bounds=torch.zeros(600, 2, dtype=torch.int32).index_put(
            (torch.tensor(311),), torch.tensor([0, 2], dtype=torch.int32)
        ),
    ),
    "by_a_tree": lambda: masks.tree([-1] * 300, 0),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SEES_ONE)
def test_a_row_that_sees_one_key_has_no_gradient_of_its_logits(name, dtype):
    """Its weight is 1 whatever q and k are."""
    mask = SEES_ONE[name]()
    x = make_inputs(mask, dim=200, dtype=dtype)
    q, k, v = (t.requires_grad_() for t in (x.q, x.k, x.v))
    block_sparse_attention(q, k, v, mask, scale=1.0).backward(x.grad_out)
    assert torch.equal(q.grad, torch.zeros_like(q))
    assert torch.equal(k.grad, torch.zeros_like(k))
    assert v.grad.abs().sum() > 0


@pytest.mark.parametrize("seed", range(12))
def test_few_keys_and_wide_heads(seed):
    """Where few keys are seen, their gradients are small differences of large numbers."""
    nq, nk = 1 + seed % 4, 1 + seed % 3
    mask = masks.full(nq, nk)
    x = make_inputs(mask, dim=100 + 13 * seed, seed=seed)
    x.grad_lse.zero_()
    assert_as_good_as_eager(x, mask)


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
