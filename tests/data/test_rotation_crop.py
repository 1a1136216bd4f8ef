from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from arcore.data import adaptive_rotation, load_photos
from arcore.data.rotation_crop import best_windows, local_binary_patterns, pattern_scores, rotate_windows

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def photos() -> Tensor:
    return load_photos("test", image_size=96).images[::3]


def test_patterns_of_a_small_image():
    grey = torch.tensor([[5.0, 1.0, 7.0], [4.0, 4.0, 3.0], [9.0, 2.0, 4.0]])
    # Clockwise from the upper left of the middle: 5 1 7 3 4 2 9 4, of which 5 7 4 9 4 are at least 4.
    assert local_binary_patterns(grey)[1, 1].item() == 0b11010101
    # The border is repeated outwards: around the upper left are 5 5 1 1 4 4 4 5.
    assert local_binary_patterns(grey)[0, 0].item() == 0b10000011
    assert (local_binary_patterns(torch.zeros(2, 4, 5)) == 255).all()


def test_patterns_by_definition(photos: Tensor):
    grey = photos[:2].mean(1)
    codes = local_binary_patterns(grey)
    ring = [(-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1)]
    for y, x in [(1, 1), (40, 3), (94, 94), (17, 80)]:
        expected = sum(int(grey[1, y + dy, x + dx] >= grey[1, y, x]) << k for k, (dy, dx) in enumerate(ring))
        assert codes[1, y, x].item() == expected
    # Brightness and contrast do not matter, a mirror image has other codes.
    assert torch.equal(local_binary_patterns(grey * 0.5), codes)
    assert not torch.equal(local_binary_patterns(grey.flip(-1)).flip(-1), codes)


def test_scores_are_norms_of_histograms(photos: Tensor):
    scores = pattern_scores(photos, 16)
    assert scores.shape == (len(photos), 6, 6)
    codes = local_binary_patterns(photos.mean(1))
    histogram = torch.bincount(codes[2, 16:32, 64:80].flatten(), minlength=256) / 256
    torch.testing.assert_close(scores[2, 1, 4], histogram.norm())
    assert pattern_scores(torch.zeros(1, 1, 8, 12), 4).tolist() == [[[1.0] * 3] * 2]


def brute_force(scores: Tensor, sizes: tuple[int, ...]) -> tuple[int, int, int]:
    rows, columns = scores.shape
    best = max(range(rows * columns), key=lambda place: (scores.flatten()[place].item(), -place))
    for size in sizes:
        options = {}
        for top in range(rows - size + 1):
            for left in range(columns - size + 1):
                if top <= best // columns < top + size and left <= best % columns < left + size:
                    mean = scores[top : top + size, left : left + size].mean().item()
                    options[-mean, top, left] = (top, left, size)
        mean, top, left = min(options)
        if -mean >= scores.mean().item() or size == sizes[-1]:
            return options[mean, top, left]
    raise AssertionError


def test_best_windows_by_exhaustive_search():
    generator = torch.Generator().manual_seed(3)
    # Powers of two in float64: means do not depend on the order of summation.
    scores = 2.0 ** torch.randint(-4, 5, (200, 8, 9), generator=generator).double()
    sparse = torch.zeros(1, 8, 9, dtype=torch.float64)
    sparse[0, 7, 8] = 1.0
    scores = torch.cat([scores, sparse, torch.ones(1, 8, 9, dtype=torch.float64)])
    found = [tuple(window) for window in best_windows(scores, (6, 4, 2)).tolist()]
    assert found == [brute_force(row, (6, 4, 2)) for row in scores]
    assert found[-1] == (0, 0, 6)
    # A bright patch between dark ones: large windows are darker than the image, the smallest is taken anyway.
    scores = torch.ones(1, 12, 12)
    scores[0, 1:11, 1:11] = 0.0
    scores[0, 6, 6] = 1.2
    assert best_windows(scores, (4, 2)).tolist() == [[5, 5, 2]]


def test_a_right_angle_is_exact(photos: Tensor):
    windows = torch.tensor([[0, 1, 4]] * len(photos))
    turned = rotate_windows(photos, windows, torch.full((len(photos),), 90.0), 16)
    inside = photos[:, :, :64, 16:80]
    torch.testing.assert_close(turned[:, :, :64, 16:80], inside.rot90(1, (2, 3)), rtol=0, atol=1e-4)
    outside = torch.ones(96, 96, dtype=torch.bool)
    outside[:64, 16:80] = False
    assert torch.equal(turned[:, :, outside], photos[:, :, outside])


def test_half_a_right_angle_fills_the_middle_and_empties_the_corners(photos: Tensor):
    windows = torch.tensor([[1, 1, 4]] * len(photos))
    turned = rotate_windows(photos, windows, torch.full((len(photos),), 45.0), 16)[:, :, 16:80, 16:80]
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    far = (y - 31.5).abs() + (x - 31.5).abs() > 32 * math.sqrt(2) + 1
    assert not turned[:, :, far].any()
    # Turning back gives the middle again, as far as two interpolations of a smooth picture allow.
    smooth = torch.nn.functional.avg_pool2d(photos, 9, stride=1, padding=4)
    back = smooth
    for angle in (30.0, -30.0):
        back = rotate_windows(back, windows, torch.full((len(photos),), angle), 16)
    middle = (slice(None), slice(None), slice(32, 64), slice(32, 64))
    assert (back[middle] - smooth[middle]).abs().mean() < 0.01
    assert (back - smooth)[:, :, 16:80, 16:80].abs().max() > 0.1


def test_rotation_is_seeded_and_rows_are_independent(photos: Tensor):
    out = adaptive_rotation(photos, 16, sizes=(3, 2, 1), generator=torch.Generator().manual_seed(5))
    again = adaptive_rotation(photos, 16, sizes=(3, 2, 1), generator=torch.Generator().manual_seed(5))
    other = adaptive_rotation(photos, 16, sizes=(3, 2, 1), generator=torch.Generator().manual_seed(6))
    assert torch.equal(out.images, again.images)
    assert torch.equal(out.windows, other.windows)
    assert not torch.equal(out.images, other.images)
    angles = torch.linspace(-45, 40, len(photos))
    whole = adaptive_rotation(photos, 16, sizes=(3, 2, 1), angles=angles)
    rows = [3, 0]
    part = adaptive_rotation(photos[rows], 16, sizes=(3, 2, 1), angles=angles[rows])
    assert torch.equal(part.windows, whole.windows[rows])
    torch.testing.assert_close(part.images, whole.images[rows], rtol=0, atol=1e-6)
    for image, turned, (top, left, size) in zip(photos, whole.images, whole.windows.tolist(), strict=True):
        changed = (image != turned).any(0).nonzero()
        assert changed.amin(0).tolist() >= [16 * top, 16 * left]
        assert (changed.amax(0) < 16 * torch.tensor([top + size, left + size])).all()


def test_angles_are_uniform():
    images = torch.zeros(4000, 1, 4, 4)
    images[:, :, 0, 0] = 1.0
    seen = []

    def record(images: Tensor, windows: Tensor, angles: Tensor, patch_size: int) -> Tensor:
        seen.append(angles)
        return images

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("arcore.data.rotation_crop.rotate_windows", record)
        adaptive_rotation(images, 2, sizes=(1,), max_angle=30.0)
    [angles] = seen
    assert angles.abs().max() <= 30
    assert angles.mean().abs() < 1.0
    assert angles.std().item() == pytest.approx(60 / math.sqrt(12), rel=0.05)


def test_no_images():
    out = adaptive_rotation(torch.zeros(0, 3, 96, 96), 16, sizes=(6, 4))
    assert out.images.shape == (0, 3, 96, 96)
    assert out.windows.shape == (0, 3)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 1, 9, 8), {}, r"multiples of 4 but got \(1, 1, 9, 8\)"),
        ((1, 8, 8), {}, "multiples of 4"),
        ((1, 1, 8, 8), {"sizes": (3,)}, "sizes from 2 patches"),
        ((1, 1, 8, 8), {"sizes": ()}, "sizes from 2 patches"),
        ((1, 1, 8, 8), {"sizes": (1, 2)}, "large to small"),
        ((1, 1, 8, 8), {"sizes": (2, 0)}, "down to 1"),
        ((2, 1, 8, 8), {"sizes": (2,), "angles": torch.zeros(1)}, "one angle for each of 2 images"),
    ],
)
def test_bad_arguments(shape: tuple, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        adaptive_rotation(torch.zeros(shape), 4, **options)
