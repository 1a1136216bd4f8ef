"""The claim of RoMA's change detection: changes are found in spite of other light and noise."""

from __future__ import annotations

import torch

from arcore.catalog.claims import Claim, Row, at_least, at_most
from arcore.data.pasted import load_mnist_changes
from arcore.data.pixels import InMemoryPixels
from arcore.zoo.representation._learning import learned, scores_of, squares
from arcore.zoo.representation.roma_change.model import RoMAChange, RoMAChangeConfig, roma_change_tiny


def claim(*, quick: bool) -> Claim:
    """F1 of the changed pixels beside the best threshold's; in the quick check, of squares on noise that it learnt."""
    if quick:
        # Initial weights with which some dozen steps are enough.
        torch.manual_seed(1)
        train = test = squares(pairs=True)
        config = RoMAChangeConfig(
            embed_dim=32,
            depth=2,
            image_size=24,
            patch_size=4,
            in_channels=1,
            d_state=4,
            drop_path=0.0,
            dropout=0.0,
            decoder_channels=(32, 16, 16),
        )
        steps, batch, lr, least = 60, 8, 6e-3, 0.8
    else:
        train, test = load_mnist_changes("train"), load_mnist_changes("test")
        config, steps, batch, lr, least = roma_change_tiny(), 600, 16, 2e-3, 0.6
    model = learned(RoMAChange(config), train, steps=steps, batch=batch, lr=lr)
    found = scores_of(model, test)["F1"]
    where = "of the pairs of the training" if quick else "held out"
    rows: list[Row] = [at_least(f"F1 of changed pixels, {where}", found, least)]
    if not quick:
        simple = threshold_f1(test)
        rows.append(at_least("F1 above that of the best threshold on the difference", found - simple, 0.1))
    with torch.no_grad():
        pair = torch.rand(2, 2, config.in_channels, config.image_size, config.image_size) * 2 - 1
        rows.append(
            at_most(
                "logits when before and after change places, largest difference",
                (model(pair) - model(pair.flip(1))).abs().max(),
                1e-4,
            )
        )
    return Claim(tuple(rows))


def threshold_f1(data: InMemoryPixels) -> float:
    """F1 of the best threshold on the absolute difference, each picture first brought to mean 0 and deviation 1.

    The threshold is chosen on the data that it is judged by, in its favour.
    """
    values = data.images.float().mean(2)  # [N, 2, H, W]
    mean, deviation = (getattr(values, name)(dim=(2, 3), keepdim=True) for name in ("mean", "std"))
    values = (values - mean) / deviation
    difference, changed = (values[:, 0] - values[:, 1]).abs().flatten(), data.masks.flatten() > 0
    scores = [
        float(2 * (changed & (difference > limit)).sum() / (changed.sum() + (difference > limit).sum()))
        for limit in torch.linspace(0.1, 4, 79).tolist()
    ]
    return max(scores)
