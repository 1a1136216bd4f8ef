"""RoMA's claim: clusters of an image are learnt from the ones before them, and from nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from arcore.catalog.claims import Claim, at_least, at_most, equals, steps
from arcore.data import adaptive_rotation, load_digits
from arcore.objectives import next_cluster_loss, next_cluster_targets
from arcore.zoo.representation.roma.model import RoMA, roma_tiny


def claim(*, quick: bool) -> Claim:
    """A training on mosaics of real digits, held-out ones predicted; and where the gradient of a cluster comes from.

    Quickly: half as wide, with patches twice as large, a quarter of the tokens, in as many clusters.
    """
    config, count, batch_size, lr = roma_tiny(), 400, 16, 5e-3
    if quick:
        # Initial weights with which some dozen steps are enough.
        torch.manual_seed(1)
        config = replace(config, embed_dim=32, d_state=4, patch_size=8, cluster=2, block=3)
        count, batch_size, lr = 80, 4, 8e-3
    model = RoMA(config)
    images = load_digits("train", image_size=48).images
    _train(model, images, count=count, batch_size=batch_size, lr=lr)
    test = load_digits("test", image_size=48).images[:: 5 if quick else 1]
    patches: dict[str, Any] = {"patch_size": config.patch_size, "cluster": config.cluster}
    of_the_mean = next_cluster_targets(test, **patches).square().mean().item()
    model.eval()
    with torch.no_grad():
        error = next_cluster_loss(model(test), test, **patches, block=config.block).patches.item()
    test = test[:2].clone().requires_grad_()
    tokens = config.cluster**2
    model(test)[:, 3 * tokens : 4 * tokens].square().sum().backward()
    grad = test.grad
    assert grad is not None
    reached = [bool(square.any()) for square in _clusters(grad, config.cluster * config.patch_size)]
    return Claim(
        (
            at_most("held-out error, relative to predicting each patch's mean", error / of_the_mean, 0.9),
            at_least("earlier clusters that the fifth cluster's prediction reads", sum(reached[:4]), 4),
            equals("later clusters that it reads", sum(reached[4:]), 0),
        )
    )


def _train(model: RoMA, images: Tensor, *, count: int, batch_size: int, lr: float) -> None:
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    config = model.config
    for step in steps(count, "training"):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 10) * (1 - step / count)
        batch = images[torch.randint(len(images), (batch_size,), generator=generator)]
        seen = adaptive_rotation(batch, config.patch_size, generator=generator)
        predictions = model(seen.images, seen.windows)
        loss = next_cluster_loss(
            predictions,
            batch,
            patch_size=config.patch_size,
            cluster=config.cluster,
            block=config.block,
        ).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()


def _clusters(images: Tensor, side: int) -> list[Tensor]:
    """The squares of `[B, c, H, W]` in raster order."""
    squares = images.unfold(2, side, side).unfold(3, side, side)  # [B, c, rows, columns, side, side]
    return list(squares.flatten(2, 3).unbind(2))
