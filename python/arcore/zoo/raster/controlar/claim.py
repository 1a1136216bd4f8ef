"""ControlAR's claim: nothing at first, edges that are followed after training, half the sequence of a prefix."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore.catalog import create_model
from arcore.catalog.claims import Claim, Row, at_least, at_most, equals, shaken, steps
from arcore.data.edges import canny, edge_overlap
from arcore.decoding import generate
from arcore.zoo.raster._digits import digit_codes, level_images, train_raster


def edges(images: Tensor) -> Tensor:
    """Edges of small digits."""
    return canny(images, sigma=0.5, low=0.15, high=0.3)


def flops_share(tokens: int, dim: int, hidden: int) -> float:
    """Multiplications of a layer that reads `tokens` codes over those of one with as many control codes in front.

    Args:
        tokens: codes of an image.
        dim: width.
        hidden: of the gated feed-forward network.
    """

    def layer(n: int) -> float:
        # Projections, feed-forward network, and scores and values of the causal triangle.
        return n * (4 * dim * dim + 3 * dim * hidden) + n * n * dim

    return layer(tokens) / layer(2 * tokens)


def train_control(base: nn.Module, count: int) -> Any:
    """A model with control on the digits' codes, started from a base model."""
    model: Any = create_model("controlar_tiny", dim=64)
    model.start_from(base)
    codes, labels = digit_codes("train")
    controls = edges(level_images(codes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.05)
    for step in steps(count, "training with control"):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / count)
        rows = torch.randint(len(codes), (32,))
        dropped = torch.rand(32) < 0.1
        kept = torch.where(dropped, 10, labels[rows])
        control = torch.where(dropped[:, None, None, None], 0.0, controls[rows])
        loss = F.cross_entropy(model(codes[rows], kept, control).flatten(0, 1), codes[rows].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


@torch.no_grad()
def _first(base: Any) -> tuple[Row, ...]:
    """A new model against its base, and what a code's control reaches."""
    model: Any = create_model("controlar_tiny", dim=64).eval()
    model.start_from(base)
    codes, labels = torch.randint(4, (3, 64)), torch.tensor([1, 5, 10])
    control = torch.randint(2, (3, 1, 8, 8)).float() * 2 - 1
    apart = int((model(codes, labels, control) != base(codes, labels)).sum())
    model = shaken(model)
    vectors = model.control_encoder(control)
    vectors.requires_grad_(True)
    with torch.enable_grad():
        bound = model.controlled(control)
        bound._added = torch.stack([layer(vectors) for layer in model.condition_layers])
        logits = bound.logits(bound.hidden(torch.cat([bound.prompt(labels), codes[:, :-1]], 1)))
        (reach,) = torch.autograd.grad(logits[:, 20].square().sum(), vectors)
    return (
        equals("logits of a new model that differ from the base model's", apart, 0),
        equals("gradient of code 20's logits to the control of later codes", reach[:, 21:].abs().max(), 0),
        at_least("the same to its own", reach[:, 20].abs().max(), 1e-6),
        at_most(
            "multiplications over those with 1024 control codes in front", flops_share(1024, 1280, 3584), 0.55
        ),
    )


def claim(*, quick: bool) -> Claim:
    """Digits of four grey levels: the base model at first; in full also edges of samples against their control."""
    base = train_raster(3 if quick else 300)
    rows = _first(base)
    if quick:
        return Claim(rows)
    model = train_control(base, 700)
    codes, labels = digit_codes("test")
    codes, labels = codes[:100], labels[:100]
    wanted = edges(level_images(codes))
    drawn = {}
    with torch.no_grad():
        for what, strength in (("with", 1.0), ("without", 0.0)):
            guided = model.controlled(wanted, strength).guided(1.5)
            drawn[what] = generate(guided, model.prompt(labels), max_new_tokens=64, seed=3).ids
    overlap = {what: edge_overlap(edges(level_images(found)), wanted).mean() for what, found in drawn.items()}

    def picture(figure: Any) -> None:
        axes = figure.subplots(3, 1)
        rows = (wanted[:12], level_images(drawn["with"][:12]), level_images(drawn["without"][:12]))
        for place, images, title in zip(axes, rows, ("control", "with it", "without it"), strict=True):
            place.imshow(images[:, 0].permute(1, 0, 2).flatten(1), cmap="gray")
            place.set(ylabel=title, xticks=[], yticks=[])

    return Claim(
        (
            *rows,
            at_least("overlap of edges of samples with their control", overlap["with"], 0.6),
            at_most("the same without control", overlap["without"], 0.3),
        ),
        draw=picture,
        size=(9.0, 3.0),
    )
