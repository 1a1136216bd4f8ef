"""The claim of RoMA's segmentation: pixels of digits on photographs get their digit's class, on held-out pictures."""

from __future__ import annotations

import dataclasses

from arcore.catalog.claims import Claim, at_least, at_most
from arcore.data.pasted import load_mnist_masks
from arcore.zoo.representation._learning import learned, scores_of, squares
from arcore.zoo.representation.roma_segmenter.model import (
    RoMASegmenter,
    RoMASegmenterConfig,
    roma_segmenter_tiny,
)


def claim(*, quick: bool) -> Claim:
    """Intersection over union of eleven classes; in the quick check of three, of squares on noise that it learnt."""
    if quick:
        train = test = squares(pairs=False)
        config = RoMASegmenterConfig(
            embed_dim=32,
            depth=2,
            num_classes=3,
            image_size=24,
            patch_size=4,
            in_channels=1,
            d_state=4,
            drop_path=0.0,
            dropout=0.0,
            channels=16,
            auxiliary_channels=16,
        )
        steps, batch, lr, least = 40, 8, 6e-3, 0.8
    else:
        train, test = load_mnist_masks("train"), load_mnist_masks("test")
        config = dataclasses.replace(roma_segmenter_tiny(), dropout=0.0)
        steps, batch, lr, least = 1200, 16, 4e-3, 0.3
    model = learned(RoMASegmenter(config), train, steps=steps, batch=batch, lr=lr)
    found, ground = scores_of(model, test), scores_of(None, test)
    where = "of the pictures of the training" if quick else "held out"
    return Claim(
        (
            at_least(
                f"mean intersection over union of {len(test.class_names)} classes, {where}",
                found["mIoU"],
                least,
            ),
            at_most("the same where every pixel is called background", ground["mIoU"], 0.4 if quick else 0.1),
        )
    )
