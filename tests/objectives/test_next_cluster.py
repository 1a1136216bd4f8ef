from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from arcore.data import load_photos
from arcore.objectives import next_cluster_loss, next_cluster_targets

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def photos() -> Tensor:
    return load_photos("test", image_size=96).images[:6]


@pytest.mark.parametrize("patch_size", [8, 4])
def test_perfect_prediction_costs_nothing_at_both_scales(photos: Tensor, patch_size: int):
    block = 6 if patch_size == 8 else 12
    sizes = {"patch_size": patch_size, "block": block}
    targets = next_cluster_targets(photos, patch_size=patch_size)
    assert targets.shape == (6, (96 // patch_size) ** 2 - 16, patch_size**2 * 3)
    perfect = next_cluster_loss(targets, photos, **sizes)
    assert [part.item() for part in perfect] == [0.0, 0.0, 0.0]
    # The released form of the second term compares unlike values, about as bad as unrelated ones of variance 1.
    released = next_cluster_loss(targets, photos, **sizes, official_quirks=True)
    assert released.patches.item() == 0.0
    assert 1.6 < released.blocks.item() < 2.1
    assert released.loss.item() == pytest.approx(0.1 * released.blocks.item())


def released_block_term(targets: Tensor, predictions: Tensor) -> Tensor:
    """The block term as the released code lays it out for 12 x 12 patches, by loops over blocks and patches."""
    padded = torch.cat([torch.zeros_like(predictions[:, :16]), predictions], dim=1)  # read as raster order
    terms = []
    for index in range(1, 4):
        top, left = (6 * part for part in divmod(index, 2))
        places = [(top + i) * 12 + left + j for i in range(6) for j in range(6)]
        channel_major = torch.stack([padded[:, place] for place in places], dim=2).flatten(1)
        patch_major = torch.stack([targets[:, place] for place in places], dim=1).flatten(1)
        terms.append((channel_major - patch_major).square().mean())
    return torch.stack(terms).mean()


def test_terms_are_their_formulas(photos: Tensor):
    # Flat patches divide by a small deviation: in float64 the formula itself is exact to far below the tolerance.
    raw = photos.double().unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1).reshape(6, 144, 192)
    targets = (raw - raw.mean(-1, keepdim=True)) / (raw.var(-1, keepdim=True) + 1e-6).sqrt()
    places = [
        (4 * cluster_row + i) * 12 + 4 * cluster_column + j
        for cluster_row in range(3)
        for cluster_column in range(3)
        for i in range(4)
        for j in range(4)
    ][16:]
    torch.testing.assert_close(
        next_cluster_targets(photos, patch_size=8), targets[:, places].float(), rtol=0, atol=1e-4
    )
    predictions = torch.randn(6, 128, 192)
    found = next_cluster_loss(predictions, photos, patch_size=8, block_weight=0.3)
    error = (predictions - targets[:, places].float()).square()
    torch.testing.assert_close(found.patches, error.mean())
    outside = [index for index, place in enumerate(places) if place // 12 >= 6 or place % 12 >= 6]
    assert len(outside) == 108
    torch.testing.assert_close(found.blocks, error[:, outside].mean())
    torch.testing.assert_close(found.loss, found.patches + 0.3 * found.blocks)
    released = next_cluster_loss(predictions, photos, patch_size=8, official_quirks=True)
    torch.testing.assert_close(released.blocks, released_block_term(targets.float(), predictions))


def test_predicting_zero_costs_about_one():
    zero = next_cluster_loss(torch.zeros(6, 128, 192), torch.randn(6, 3, 96, 96), patch_size=8)
    assert zero.patches.item() == pytest.approx(191 / 192, rel=1e-3)


def test_half_precision_predictions_are_compared_in_float32(photos: Tensor):
    targets = next_cluster_targets(photos, patch_size=8)
    out = next_cluster_loss(targets.bfloat16(), photos, patch_size=8)
    assert out.loss.dtype == torch.float32
    assert 0 < out.loss.item() < 1e-4
    assert math.isfinite(out.loss.item())


@pytest.mark.parametrize(
    ("shape", "images", "options", "message"),
    [
        ((2, 128, 48), (2, 3, 48, 48), {"patch_size": 4, "block": 5}, "blocks of 5 x 5 patches"),
        ((2, 128, 48), (2, 3, 48, 48), {"patch_size": 4, "block": 3}, "at least 4 x 4"),
        ((2, 128, 48), (2, 3, 48, 96), {"patch_size": 4}, "expected square images"),
        (
            (2, 144, 48),
            (2, 3, 48, 48),
            {"patch_size": 4},
            r"expected predictions of shape \(2, 128, 48\).*got \(2, 144, 48\)",
        ),
        ((2, 128, 48), (2, 3, 48, 48), {"patch_size": 5}, "multiples of 5"),
    ],
)
def test_bad_shapes(shape: tuple, images: tuple, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        next_cluster_loss(torch.zeros(shape), torch.zeros(images), **options)
