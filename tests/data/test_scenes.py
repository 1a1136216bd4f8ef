"""Scenes of two digits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from arcore.data import load_mnist, load_scenes, open_dataset


def test_scenes_hold_their_digits():
    scenes = load_scenes("test")
    assert scenes.images.shape == (1000, 1, 24, 24)
    assert scenes.class_names[37] == "a 3 and a 7"
    assert torch.equal(scenes.labels, scenes.digits[:, 0] * 10 + scenes.digits[:, 1])
    assert torch.equal(scenes.digits[:, 0], load_mnist("test").labels)
    for row in (0, 7, 999):
        for side in (0, 1):
            half = scenes.images[row, 0, :, 12 * side : 12 * side + 12]
            small = F.interpolate(
                scenes.subjects[row, side][None], size=(12, 12), mode="bilinear", antialias=True
            )[0, 0]
            assert min((half[top : top + 12] - small).abs().max() for top in range(13)) < 1e-5
    assert scenes.digest() == load_scenes("test").digest()


def test_scenes_by_name():
    assert open_dataset("scenes", image_size=16, channels=1, split="test").image_shape == (1, 16, 16)
    with pytest.raises(ValueError, match="grey but the model takes 3"):
        open_dataset("scenes", image_size=16, channels=3)
    with pytest.raises(ValueError, match="even number of pixels"):
        load_scenes(image_size=17)
