"""The float64 reference itself: against SDPA, against a loop over pairs, and its gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from arcore.ops import reference_block_sparse_attention
from tests.block_sparse_attention.cases import MASKS, make_inputs, random_mask


@pytest.mark.parametrize("name", MASKS)
def test_equals_sdpa_with_the_dense_mask(name):
    mask = MASKS[name]()
    x = make_inputs(mask, dtype=torch.float64)
    out = reference_block_sparse_attention(x.q, x.k, x.v, mask)
    expected = scaled_dot_product_attention(x.q, x.k, x.v, attn_mask=mask.to_bool(), enable_gqa=True)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_equals_a_loop_over_rows():
    mask = random_mask(9, 13, seed=3, batch=2, heads=4, key_bounds=True)
    x = make_inputs(mask, dim=8, dtype=torch.float64)
    out, lse = reference_block_sparse_attention(x.q, x.k, x.v, mask, scale=0.3, return_lse=True)
    allowed = mask.to_bool()
    for b in range(2):
        for h in range(4):
            for i in range(9):
                keys = allowed[b, h, i].nonzero().flatten()
                if len(keys) == 0:
                    assert lse[b, h, i] == -math.inf
                    assert torch.equal(out[b, h, i], torch.zeros(8, dtype=torch.float64))
                    continue
                logits = 0.3 * x.k[b, h // 2, keys] @ x.q[b, h, i]
                weights = torch.softmax(logits, dim=0)
                torch.testing.assert_close(out[b, h, i], weights @ x.v[b, h // 2, keys], rtol=0, atol=1e-12)
                torch.testing.assert_close(lse[b, h, i], torch.logsumexp(logits, dim=0), rtol=0, atol=1e-12)


def test_gradcheck():
    mask = random_mask(5, 7, seed=1, heads=2, key_bounds=True)
    x = make_inputs(mask, batch=1, heads=2, kv_heads=1, dim=8, dtype=torch.float64)
    seen = mask.to_bool().any(dim=-1).expand(1, 2, 5)

    def function(q, k, v):
        out, lse = reference_block_sparse_attention(q, k, v, mask, return_lse=True)
        return out, torch.where(seen, lse, 0.0)

    inputs = [t.requires_grad_() for t in (x.q, x.k, x.v)]
    assert torch.autograd.gradcheck(function, inputs)
