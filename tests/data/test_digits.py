from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from arcore.data import (
    InMemoryImages,
    held_out_mask,
    load_digits,
    load_moving_digits,
    load_photos,
    open_dataset,
)

pytest.importorskip("sklearn")


def test_digits_are_the_real_ones_scaled_to_minus_one_one():
    from sklearn.datasets import load_digits as original

    digits = load_digits("all")
    bunch = original()
    assert digits.images.shape == (1797, 1, 8, 8)
    assert digits.images.dtype == torch.float32
    assert digits.image_shape == (1, 8, 8)
    torch.testing.assert_close(
        (digits.images[:, 0] + 1) * 8, torch.from_numpy(bunch.images).float(), rtol=0, atol=0
    )
    assert digits.labels.tolist() == bunch.target.tolist()
    assert float(digits.images.min()) == -1
    assert float(digits.images.max()) == 1


@pytest.mark.parametrize("load", ["load_digits", "load_photos"])
def test_pictures_of_scikit_learn_are_read_without_importing_it(load):
    code = f"import sys; from arcore.data import {load}; {load}(); print('sklearn' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "False\n"


def test_photos_are_those_of_scikit_learn():
    from sklearn.datasets import load_sample_image

    (first, *_), labels = load_photos("train", image_size=32).images, load_photos("all").labels
    expected = torch.tensor(load_sample_image("china.jpg")[:32, :32]).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(first, expected)
    assert set(labels.tolist()) == {0, 1}


def test_split_is_fixed_disjoint_and_stratified():
    train, test, everything = load_digits("train"), load_digits("test"), load_digits("all")
    assert len(train) + len(test) == len(everything)
    assert (len(train), len(test)) == (1442, 355)
    for digit in range(10):
        share = (test.labels == digit).sum() / (everything.labels == digit).sum()
        assert 0.19 < share <= 0.2
    rows = {tuple(image.flatten().tolist()) for image in train.images}
    assert not any(tuple(image.flatten().tolist()) in rows for image in test.images)
    assert torch.equal(load_digits("test").images, test.images)


def test_items_are_image_and_label():
    digits = load_digits("train")
    image, label = digits[3]
    assert image.shape == (1, 8, 8)
    assert label == int(digits.labels[3])
    assert digits.class_names[label] == str(label)


def test_unknown_split_is_named():
    with pytest.raises(ValueError, match="'train', 'test', 'all' but got 'valid'"):
        load_digits("valid")


def test_digits_do_not_fit_a_large_model():
    with pytest.raises(ValueError, match="the model takes 3 x 256 x 256"):
        open_dataset("digits", image_size=256, channels=3)


def test_held_out_mask_counts_within_each_class():
    labels = torch.tensor([0, 1, 0, 1, 1, 0, 0, 1])
    assert held_out_mask(labels, every=2).tolist() == [False, False, True, True, False, False, True, True]


def test_in_memory_images_check_their_labels():
    with pytest.raises(ValueError, match="labels must lie in \\[0, 2\\)"):
        InMemoryImages(torch.zeros(2, 1, 4, 4), torch.tensor([0, 2]), ("a", "b"))
    with pytest.raises(ValueError, match=r"\[N, C, H, W\]"):
        InMemoryImages(torch.zeros(2, 4, 4), torch.tensor([0, 1]), ("a", "b"))


def test_moving_digits_drift_and_bounce():
    videos, digits = load_moving_digits("test", frames=12), load_digits("test")
    assert videos.images.shape == (355, 12, 1, 16, 16)
    assert videos.image_shape == (12, 1, 16, 16)
    assert torch.equal(videos.labels, digits.labels)
    assert torch.equal(load_moving_digits("test", frames=12).images, videos.images)
    bounced = 0
    for video, digit in zip(videos.images[:40], digits.images, strict=False):
        places = []
        for frame in video[:, 0]:
            windows = frame.unfold(0, 8, 1).unfold(1, 8, 1)  # every 8 x 8 window
            matches = (windows == digit[0]).flatten(2).all(-1).nonzero()
            assert (frame > -1).sum() == (digit > -1).sum()
            # A digit with an empty edge fits more than one window; the mean of its ink tells where it is.
            assert len(matches) >= 1
            ink = frame + 1
            rows, columns = ink.sum(1), ink.sum(0)
            places.append([(line * torch.arange(16)).sum() / line.sum() for line in (rows, columns)])
        steps = torch.tensor(places).diff(dim=0)
        assert (steps.abs() - steps.abs()[0]).abs().max() < 1e-4  # same speed, whichever way
        assert steps.abs()[0].max() == pytest.approx(1, abs=1e-4)
        bounced += bool((steps.sign() != steps[0].sign()).any())
    assert bounced > 10


@pytest.mark.parametrize(
    ("source", "frames", "message"),
    [
        ("digits", 8, "videos of 8 frames but --data digits has images: use moving_digits"),
        ("moving_digits", 1, "takes images but --data moving_digits has videos"),
    ],
)
def test_images_and_videos_are_not_confused(source, frames, message):
    with pytest.raises(ValueError, match=message):
        open_dataset(source, image_size=16, channels=1, frames=frames)


def test_digits_need_room_to_move():
    with pytest.raises(ValueError, match="at least 9 pixels per side"):
        load_moving_digits(image_size=8)
    with pytest.raises(ValueError, match="grey but the model takes 3"):
        open_dataset("moving_digits", image_size=16, channels=3, frames=8)


@pytest.mark.parametrize(
    "call",
    [
        lambda: load_digits(image_size=8.0),
        lambda: load_moving_digits(frames=2.5),
        lambda: load_moving_digits(image_size="16"),
        lambda: load_photos(image_size=24.0),
        lambda: held_out_mask(torch.zeros(4), every=2.5),
        lambda: open_dataset("digits", image_size=8.5, channels=1),
        lambda: open_dataset("moving_digits", image_size=16, channels=1, frames=True),
    ],
)
def test_sizes_are_whole_numbers(call):
    with pytest.raises(TypeError, match="must be a whole number"):
        call()


@pytest.mark.parametrize("source", [None, 3, b"digits"])
def test_sources_are_names_or_paths(source):
    with pytest.raises(TypeError, match="expected data as digits, mnist"):
        open_dataset(source, image_size=8, channels=1)


def test_close_names_are_suggested():
    with pytest.raises(FileNotFoundError, match="did you mean 'digits'"):
        open_dataset("digit", image_size=8, channels=1)
