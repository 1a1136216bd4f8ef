"""What claims of this topic share: images made of few codes and a model of them."""

from arcore.zoo.raster._digits import digit_codes, train_raster

__all__ = ["digit_codes", "train_raster"]
