"""Blocks of the convolutional autoencoder against their formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from arcore.nn.conv import AttnBlock, ConvDecoder, ConvEncoder, Downsample, ResnetBlock, Upsample


def test_downsample_pads_right_and_bottom() -> None:
    block = Downsample(1)
    with torch.no_grad():
        block.conv.weight.zero_()
        block.conv.bias.zero_()
        block.conv.weight[0, 0, 0, 0] = 1  # picks the corner of each window: windows start at even positions
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert torch.equal(block(x), x[:, :, ::2, ::2])
    with torch.no_grad():
        block.conv.weight.zero_()
        block.conv.weight[0, 0, 2, 2] = 1
    assert torch.equal(block(x)[0, 0], torch.tensor([[10.0, 0.0], [0.0, 0.0]]))


def test_upsample_repeats() -> None:
    block = Upsample(1)
    with torch.no_grad():
        block.conv.weight.zero_()
        block.conv.bias.zero_()
        block.conv.weight[0, 0, 1, 1] = 1
    x = torch.arange(4.0).reshape(1, 1, 2, 2)
    assert torch.equal(block(x), x.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_attention_is_single_headed_over_positions() -> None:
    block = AttnBlock(8, 4)
    x = torch.randn(2, 8, 3, 5)
    q, k, v = block.qkv(block.norm(x)).flatten(2).chunk(3, dim=1)  # [B, C, N]
    weights = (torch.einsum("bci,bcj->bij", q, k) * 8**-0.5).softmax(-1)
    mixed = torch.einsum("bij,bcj->bci", weights, v).reshape(x.shape)
    torch.testing.assert_close(block(x), x + block.proj_out(mixed), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [8, 12])
def test_resnet_block(width: int) -> None:
    block = ResnetBlock(8, width, 4)
    x = torch.randn(2, 8, 4, 4)
    h = block.conv1(F.silu(F.group_norm(x, 4, block.norm1.weight, block.norm1.bias, eps=1e-6)))
    h = block.conv2(F.silu(F.group_norm(h, 4, block.norm2.weight, block.norm2.bias, eps=1e-6)))
    shortcut = x if width == 8 else block.nin_shortcut(x)
    torch.testing.assert_close(block(x), shortcut + h)
    assert any(name.startswith("nin_shortcut") for name in block.state_dict()) == (width != 8)


@pytest.mark.parametrize("mult", [(1,), (1, 2), (2, 1, 2)])
def test_each_level_but_the_last_halves(mult: tuple[int, ...]) -> None:
    encoder = ConvEncoder(3, 8, mult, 1, 5, 4)
    decoder = ConvDecoder(3, 8, mult, 1, 5, 4)
    side = 2 ** (len(mult) - 1)
    z = encoder(torch.randn(2, 3, 4 * side, 6 * side))
    assert z.shape == (2, 5, 4, 6)
    assert decoder(z).shape == (2, 3, 4 * side, 6 * side)
    assert [len(level.attn) for level in encoder.down] == [0] * (len(mult) - 1) + [1]
    assert [len(level.block) for level in decoder.up] == [2] * len(mult)
