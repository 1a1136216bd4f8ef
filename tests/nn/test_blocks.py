"""Attention, modulation, embeddings and the autoencoder's parts."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from arcore import masks
from arcore.nn import (
    MLP,
    AdaLNBlock,
    AdaLNHead,
    ClassEmbedding,
    ConvDecoder,
    ConvEncoder,
    DropPath,
    KVCache,
    LevelEmbedding,
    SelfAttention,
    modulated_norm,
)


@pytest.fixture
def attention() -> SelfAttention:
    module = SelfAttention(32, 2, l2_norm=True)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


@torch.no_grad()
def test_attention_against_sdpa(attention: SelfAttention):
    mask, x = masks.block_causal([2, 3]), torch.randn(3, 5, 32)
    bias = torch.cat([attention.q_bias, torch.zeros(32), attention.v_bias])
    q, k, v = F.linear(x, attention.qkv.weight, bias).view(3, 5, 3, 2, 16).permute(2, 0, 3, 1, 4)
    q = F.normalize(q, dim=-1) * attention.log_scale.exp()
    mixed = F.scaled_dot_product_attention(q, F.normalize(k, dim=-1), v, mask.to_bool(), scale=1.0)
    expected = attention.proj(mixed.transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x, mask), expected)


@torch.no_grad()
def test_attention_from_a_cache(attention: SelfAttention):
    x = torch.randn(2, 7, 32)
    whole = attention(x, masks.block_causal([3, 4]))
    cache = KVCache(num_layers=2, batch=2, num_heads=2, max_length=7, head_dim=16)
    first = attention(x[:, :3], masks.full(3, 3), cache, layer=1)
    second = attention(x[:, 3:], masks.full(4, 7), cache, layer=1)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole)


@torch.no_grad()
def test_temperature_is_capped(attention: SelfAttention):
    x, mask = torch.randn(1, 4, 32), masks.full(4, 4)
    attention.log_scale.fill_(math.log(100))
    expected = attention(x, mask)
    attention.log_scale.fill_(9.0)
    torch.testing.assert_close(attention(x, mask), expected)
    attention.log_scale.fill_(4.0)
    assert not torch.allclose(attention(x, mask), expected)


@pytest.mark.parametrize(("dim", "heads"), [(32, 3), (32, 64), (32, 0), (0, 1)])
def test_heads_that_do_not_divide_the_width(dim: int, heads: int):
    with pytest.raises(ValueError, match=f"multiple of num_heads but got dim={dim} and num_heads={heads}"):
        SelfAttention(dim, heads)


@pytest.mark.parametrize(("dim", "heads"), [(30, 10), (33, 3), (512, 1)])
def test_heads_of_any_width(dim: int, heads: int):
    x = torch.randn(2, 5, dim)
    assert SelfAttention(dim, heads)(x, masks.causal(5)).shape == x.shape


def test_modulated_norm():
    x, scale, shift = torch.randn(2, 3, 8), torch.randn(2, 1, 8), torch.randn(2, 1, 8)
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift
    torch.testing.assert_close(modulated_norm(x, scale, shift), expected)


class Recorder(nn.Module):
    """Stands in for attention: returns its input times two and keeps the other arguments."""

    def forward(self, x, *others):
        self.others = others
        return 2 * x


@torch.no_grad()
def test_block_order_of_vectors():
    """The six vectors are gate1, gate2, scale1, scale2, shift1, shift2."""
    block = AdaLNBlock(8, 4, attn=Recorder(), ffn=nn.Tanh())
    nn.init.normal_(block.modulation.linear.bias)
    x, cond = torch.randn(2, 3, 8), torch.randn(2, 4)
    vectors = block.modulation.linear(cond * cond.sigmoid()).view(2, 1, 6, 8).unbind(2)
    gate1, gate2, scale1, scale2, shift1, shift2 = vectors
    middle = x + gate1 * 2 * modulated_norm(x, scale1, shift1)
    expected = middle + gate2 * modulated_norm(middle, scale2, shift2).tanh()
    torch.testing.assert_close(block(x, cond, "mask", "cache", 5), expected)
    assert block.attn.others == ("mask", "cache", 5)


@torch.no_grad()
def test_head_order_of_vectors():
    head = AdaLNHead(8, 4, 3)
    x, cond = torch.randn(2, 5, 8), torch.randn(2, 4)
    scale, shift = head.modulation.linear(F.silu(cond)).unsqueeze(1).split(8, dim=-1)
    torch.testing.assert_close(head(x, cond), head.linear(modulated_norm(x, scale, shift)))


def test_drop_path():
    drop, x = DropPath(0.25), torch.ones(4000, 2, 3)
    out = drop(x)
    rows = out[:, 0, 0]
    assert torch.equal(out, rows.view(-1, 1, 1).expand_as(out))
    assert sorted(rows.unique().tolist()) == [0.0, pytest.approx(4 / 3)]
    assert abs((rows > 0).double().mean().item() - 0.75) < 5 * math.sqrt(0.25 * 0.75 / 4000)
    assert drop.eval()(x) is x
    assert DropPath(0.0)(x) is x
    for rate in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"0 <= rate < 1 but got {rate}"):
            DropPath(rate)


def test_class_embedding():
    embedding = ClassEmbedding(3, 8, drop=0.5)
    labels = torch.arange(3).repeat(2000)
    null = (embedding(labels) == embedding.weight[3]).all(1).double().mean().item()
    assert abs(null - 0.5) < 5 * math.sqrt(0.25 / 6000)
    assert torch.equal(embedding.eval()(labels), embedding.weight[labels])
    assert torch.equal(embedding(torch.tensor([3])), embedding.weight[3:])
    with pytest.raises(ValueError, match=r"class ids from 0 to 3 \(3 means no class\) but got 4"):
        embedding(torch.tensor([1, 4]))
    with pytest.raises(TypeError, match="int64 but got int32"):
        embedding(torch.tensor([1], dtype=torch.int32))
    with pytest.raises(ValueError, match="num_classes=0"):
        ClassEmbedding(0, 8)


def test_level_embedding():
    embedding = LevelEmbedding([1, 4, 2], 8)
    expected = embedding.weight[torch.tensor([0, 1, 1, 1, 1, 2, 2])]
    assert torch.equal(embedding(), expected.unsqueeze(0))
    embedding().sum().backward()
    assert torch.equal(embedding.weight.grad, torch.tensor([1.0, 4.0, 2.0]).unsqueeze(1).expand(3, 8))


def test_mlp():
    mlp, x = MLP(8, 20), torch.randn(2, 3, 8)
    expected = mlp.fc2(F.gelu(mlp.fc1(x), approximate="tanh"))
    assert torch.equal(mlp(x), expected)


@torch.no_grad()
def test_encoder_and_decoder_change_the_resolution():
    layout = (3, 8, (1, 2, 2), 1, 5, 4)
    images = torch.randn(2, 3, 16, 16)
    latent = ConvEncoder(*layout)(images)
    assert latent.shape == (2, 5, 4, 4)
    assert ConvDecoder(*layout)(latent).shape == images.shape


@torch.no_grad()
def test_downsampling_pads_right_and_bottom():
    encoder = ConvEncoder(1, 4, (1, 1), 1, 2, 2)
    down, x = encoder.down[0].downsample, torch.randn(1, 4, 6, 6)
    expected = F.conv2d(F.pad(x, (0, 1, 0, 1)), down.conv.weight, down.conv.bias, stride=2)
    assert torch.equal(down(x), expected)
    assert expected.shape[-1] == 3


@torch.no_grad()
def test_convolutional_attention():
    block = ConvEncoder(1, 4, (2,), 1, 2, 2).mid.attn_1
    x = torch.randn(2, 8, 3, 3)
    q, k, v = block.qkv(block.norm(x)).flatten(2).chunk(3, dim=1)  # [B, C, 9]
    weights = (q.transpose(1, 2) @ k / math.sqrt(8)).softmax(-1)
    mixed = (v @ weights.transpose(1, 2)).view(2, 8, 3, 3)
    torch.testing.assert_close(block(x), x + block.proj_out(mixed))
