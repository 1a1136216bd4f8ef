"""Blocks of diffusion transformers: passive tokens and the two residual forms, against their formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from arcore import masks
from arcore.nn import DiTBlock, sincos_positions, sincos_sequence


def make(**options: bool) -> DiTBlock:
    torch.manual_seed(0)
    block = DiTBlock(16, 2, 32, **options)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return block


def by_formula(block: DiTBlock, x: Tensor, vectors: Tensor) -> Tensor:
    """`vectors` are those of each token, `[B, N, 6 C]`."""
    shift1, scale1, gate1, shift2, scale2, gate2 = vectors.chunk(6, dim=-1)
    normed = F.layer_norm(x, (16,), eps=1e-6)
    mask = masks.full(x.shape[1], x.shape[1])
    kept = normed if block.residual_from_normed else x
    x = kept + gate1 * block.attn(normed * (1 + scale1) + shift1, mask)
    normed = F.layer_norm(x, (16,), eps=1e-6)
    kept = normed if block.residual_from_normed else x
    return kept + gate2 * block.mlp(normed * (1 + scale2) + shift2)


@torch.no_grad()
@pytest.mark.parametrize("residual_from_normed", [False, True])
@pytest.mark.parametrize("passive", [0, 3, 4, 7, 8])
def test_passive_tokens_are_not_modulated(passive, residual_from_normed):
    """Whether they come in whole groups of 4 or not."""
    block = make(residual_from_normed=residual_from_normed)
    x, cond = torch.randn(2, passive + 8, 16), torch.randn(2, 2, 16)
    idle = torch.cat([torch.zeros(32), torch.ones(16)] * 2).expand(2, passive, -1)
    active = block.modulation.linear(F.silu(cond)).repeat_interleave(4, dim=1)
    expected = by_formula(block, x, torch.cat([idle, active], dim=1))
    mask = masks.full(passive + 8, passive + 8)
    torch.testing.assert_close(block(x, cond, mask, passive=passive), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("residual_from_normed", [False, True])
def test_without_a_condition_all_tokens_are_passive(residual_from_normed):
    block = make(residual_from_normed=residual_from_normed)
    x = torch.randn(2, 5, 16)
    idle = torch.cat([torch.zeros(32), torch.ones(16)] * 2).expand(2, 5, -1)
    torch.testing.assert_close(
        block(x, None, masks.full(5, 5)), by_formula(block, x, idle), rtol=1e-5, atol=1e-5
    )


def test_positions_of_a_sequence():
    table = sincos_sequence(7, 6)[0]
    for place in range(7):
        for k in range(3):
            angle = torch.tensor(place * 10000.0 ** -(k / 3), dtype=torch.float64)
            assert table[place, k] == pytest.approx(angle.sin().item(), abs=1e-6)
            assert table[place, 3 + k] == pytest.approx(angle.cos().item(), abs=1e-6)
    assert torch.equal(sincos_positions(7, 12)[0, :7, :6], table)
    with pytest.raises(ValueError, match="multiple of 2 but got 5"):
        sincos_sequence(4, 5)
