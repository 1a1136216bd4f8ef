from __future__ import annotations

import pytest
import torch

from arcore import masks
from arcore.nn import MLP, CrossAttention, SwiGLU


@torch.no_grad()
def test_cross_attention_is_softmax_attention_under_its_mask():
    attend = CrossAttention(48, 3)
    x, context = torch.randn(2, 6, 48), torch.randn(2, 9, 48)
    mask = masks.IntervalMask.from_bool(torch.arange(9) <= torch.arange(6)[:, None] + 2)
    q = attend.q(x).view(2, 6, 3, 16).transpose(1, 2)
    k, v = (part.reshape(2, 9, 3, 16).transpose(1, 2) for part in attend.kv(context).chunk(2, dim=-1))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask.to_bool()[0, 0])
    expected = attend.proj(expected.transpose(1, 2).flatten(2))
    torch.testing.assert_close(attend(x, context, mask), expected, rtol=1e-5, atol=1e-5)


def test_heads_of_cross_attention_must_fit():
    with pytest.raises(ValueError, match=r"CrossAttention.*got dim=48 and num_heads=5"):
        CrossAttention(48, 5)


@torch.no_grad()
def test_feed_forward_networks():
    x = torch.randn(3, 8)
    exact, tanh = MLP(8, 16, approximate="none"), MLP(8, 16)
    h = exact.fc1(x)
    torch.testing.assert_close(exact(x), exact.fc2(h * 0.5 * (1 + torch.erf(h / 2**0.5))))
    tanh.load_state_dict(exact.state_dict())
    assert 0 < (tanh(x) - exact(x)).abs().max() < 1e-2
    gated = SwiGLU(8, 12)
    a = gated.w1(x)
    torch.testing.assert_close(gated(x), gated.w3(a * a.sigmoid() * gated.w2(x)))
