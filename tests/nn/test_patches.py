from __future__ import annotations

import math

import pytest
import torch

from arcore.nn import PatchEmbed, sincos_positions
from arcore.nn.patches import cluster_order, inverse_order, patchify, standardized, unpatchify


def test_patchify_cuts_and_unpatchify_joins():
    images = torch.arange(2 * 3 * 8 * 8).reshape(2, 3, 8, 8).float()
    patches = patchify(images, 4)
    assert patches.shape == (2, 4, 48)
    # Row by row, column by column, channels last.
    assert torch.equal(patches[1, 2].view(4, 4, 3), images[1, :, 4:, :4].permute(1, 2, 0))
    assert torch.equal(unpatchify(patches, 4), images)
    wide = patchify(images[:, :, :4], 2)
    assert torch.equal(wide[0, 3].view(2, 2, 3), images[0, :, :2, 6:].permute(1, 2, 0))


def test_patchify_refuses_sides_that_do_not_divide():
    with pytest.raises(ValueError, match=r"multiples of 3 but got \(1, 1, 9, 8\)"):
        patchify(torch.zeros(1, 1, 9, 8), 3)
    with pytest.raises(ValueError, match=r"\[B, C, H, W\]"):
        patchify(torch.zeros(1, 8, 8), 4)


def test_patch_embedding_is_a_linear_map_of_each_patch():
    embed, images = PatchEmbed(2, 5, 3), torch.randn(2, 2, 9, 9)
    weight = embed.proj.weight.permute(0, 2, 3, 1).flatten(1)
    expected = patchify(images, 3) @ weight.T + embed.proj.bias
    torch.testing.assert_close(embed(images), expected)


@pytest.mark.parametrize(("side", "cluster"), [(12, 4), (12, 6), (4, 4), (5, 1), (6, 2)])
def test_cluster_order_is_a_permutation_with_an_inverse(side: int, cluster: int):
    order = cluster_order(side, cluster)
    assert sorted(order.tolist()) == list(range(side * side))
    x = torch.randn(2, side * side, 3)
    assert torch.equal(x[:, order][:, inverse_order(order)], x)
    assert torch.equal(inverse_order(inverse_order(order)), order)
    tokens = cluster * cluster
    for index in range((side // cluster) ** 2):
        top, left = (cluster * part for part in divmod(index, side // cluster))
        square = torch.arange(side * side).view(side, side)[top : top + cluster, left : left + cluster]
        assert order[index * tokens : (index + 1) * tokens].tolist() == square.flatten().tolist()


def test_cluster_order_of_rasters_and_bad_sizes():
    assert cluster_order(4, 1).tolist() == list(range(16))
    for side, cluster in ((12, 5), (0, 1), (4, 0)):
        with pytest.raises(ValueError, match=f"tile {side} x {side} patches but got {cluster} x {cluster}"):
            cluster_order(side, cluster)


def test_standardized_patches():
    patches = torch.randn(2, 5, 48, dtype=torch.float64) * 3 + 2
    out, mean, std = standardized(patches)
    torch.testing.assert_close(out.mean(-1), torch.zeros(2, 5, dtype=torch.float64))
    torch.testing.assert_close(out.std(-1), torch.ones(2, 5, dtype=torch.float64), rtol=1e-5, atol=0)
    torch.testing.assert_close(out * std + mean, patches)
    flat, _, std = standardized(torch.full((1, 1, 16), 0.3))
    assert flat.abs().max() <= 1e-4
    assert std.item() == pytest.approx(1e-3, rel=1e-4)


def test_positions_are_sines_and_cosines_of_column_and_row():
    table = sincos_positions(5, 16)
    assert table.shape == (1, 25, 16)
    row, column = 3, 2
    for channel in range(4):
        rate = 10000 ** (-channel / 4)
        found = table[0, row * 5 + column]
        assert found[channel].item() == pytest.approx(math.sin(column * rate), abs=1e-6)
        assert found[4 + channel].item() == pytest.approx(math.cos(column * rate), abs=1e-6)
        assert found[8 + channel].item() == pytest.approx(math.sin(row * rate), abs=1e-6)
        assert found[12 + channel].item() == pytest.approx(math.cos(row * rate), abs=1e-6)
    with pytest.raises(ValueError, match="multiple of 4 but got 6"):
        sincos_positions(3, 6)
