from __future__ import annotations

import pytest
import torch

from arcore.data import load_digits, load_photos, open_dataset

pytest.importorskip("sklearn")


def test_photos_are_crops_of_the_real_ones():
    from sklearn.datasets import load_sample_image

    photos = load_photos("train", image_size=64)
    china = torch.tensor(load_sample_image("china.jpg")).permute(2, 0, 1)
    torch.testing.assert_close(photos.images[1], china[:, :64, 32:96] / 127.5 - 1)
    assert photos.image_shape == (3, 64, 64)
    assert photos.class_names == ("china", "flower")
    assert photos.labels.bincount().tolist() == [len(photos) // 2] * 2
    grey = load_photos("train", image_size=64, channels=1)
    torch.testing.assert_close(grey.images[5, 0], photos.images[5].mean(0))


def test_held_out_photos_share_no_pixels_with_the_others():
    train, test, both = (load_photos(split, image_size=32) for split in ("train", "test", "all"))
    assert len(train) + len(test) == len(both)
    assert 0.1 < len(test) / len(both) < 0.25
    seen = {tuple(column) for column in train.images[:, 0, :, :4].flatten(1).tolist()}
    assert not any(tuple(column) in seen for column in test.images[:, 0, :, :4].flatten(1).tolist())


def test_digits_fill_larger_images():
    small, large = load_digits("test"), load_digits("test", image_size=48)
    assert large.image_shape == (1, 48, 48)
    assert torch.equal(large.labels, small.labels)
    tiles = large.images.unfold(2, 16, 16).unfold(3, 16, 16)  # [N, 1, 3, 3, 16, 16]
    assert (tiles == tiles[:, :, :1, :1]).all()
    # Four pixels of the enlarged digit around a corner of four original ones average to their mean.
    middle = tiles[:, :, 0, 0, 1:15, 1:15]
    original = torch.nn.functional.avg_pool2d(small.images, 2, stride=1)
    torch.testing.assert_close(torch.nn.functional.avg_pool2d(middle, 2), original)
    assert large.images.min() == -1
    assert large.images.max() <= 1
    for size in (12, 24, 0, -16):
        with pytest.raises(ValueError, match=f"multiple of 16, but not {size}"):
            load_digits("test", image_size=size)


def test_names_of_built_in_data():
    assert open_dataset("photos", image_size=40, channels=3, split="test").image_shape == (3, 40, 40)
    assert open_dataset("digits", image_size=32, channels=1).image_shape == (1, 32, 32)
    with pytest.raises(ValueError, match="the model takes 1 x 12 x 12"):
        open_dataset("digits", image_size=12, channels=1)
    for options in ({"image_size": 129}, {"channels": 2}, {"image_size": 1}):
        with pytest.raises(ValueError, match="1 or 3 channels and an image_size from 2 to 128"):
            load_photos(**options)
    with pytest.raises(ValueError, match="but got 'valid'"):
        load_photos("valid")
