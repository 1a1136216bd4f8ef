"""ARRA's claim."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from arcore.catalog import create_model
from arcore.catalog.claims import Claim, at_least, at_most, equals, steps
from arcore.zoo.raster._digits import digit_codes, level_images
from arcore.zoo.raster.arra.model import ARRA, Adaptor, Components, alignment_loss
from arcore.zoo.raster.llamagen import LlamaGen

LAYER, COMPONENTS = 1, 16


def claim(*, quick: bool) -> Claim:
    """A model of digits trained with alignment and without it, for equally many steps from the same start."""
    codes, labels = digit_codes("train")
    unseen, their_labels = digit_codes("test")
    if quick:
        unseen, their_labels = unseen[:60], their_labels[:60]
    encoder = Components(level_images(codes), COMPONENTS)
    count, batch = (40, 16) if quick else (250, 32)
    measured = {}
    for weight in (1.0,) if quick else (0.0, 1.0):
        torch.manual_seed(0)
        model = create_model("arra_tiny")
        adaptor = Adaptor(model.config.dim, COMPONENTS)  # type: ignore[union-attr, arg-type]
        assert isinstance(model, ARRA)
        before = _scores(model, adaptor, encoder, unseen, their_labels)
        optimizer = torch.optim.AdamW(
            [*model.parameters(), *adaptor.parameters()],
            lr=3e-3,
            betas=(0.9, 0.95),
            weight_decay=0.05,
            fused=True,
        )
        for _ in steps(count, f"training with alignment {weight:g}"):
            rows = torch.randint(len(codes), (batch,))
            logits, tap = model.tapped(codes[rows], labels[rows], LAYER)
            features = encoder.features(level_images(codes[rows]))
            loss = F.cross_entropy(logits.flatten(0, 1), codes[rows].flatten())
            # Without alignment the adaptor alone learns, on states that know nothing of it.
            apart = alignment_loss(adaptor(tap if weight else tap.detach()), features)
            optimizer.zero_grad()
            (loss + apart).backward()
            optimizer.step()
        measured[weight] = (before, _scores(model, adaptor, encoder, unseen, their_labels), model)
    before, aligned, model = measured[1.0]
    base = LlamaGen(model.config)
    base.load_state_dict(model.state_dict())
    with torch.no_grad():
        gap = (base(unseen[:5], their_labels[:5]) - model(unseen[:5], their_labels[:5])).abs().max()
    found = [
        at_least(
            "growth of the held-out cosine by alignment", aligned[0] - before[0], 0.05 if quick else 0.3
        ),
        equals("difference of logits when the weights are loaded into the base", gap, 0),
    ]
    if not quick:
        _, plain, _ = measured[0.0]
        found += [
            at_most(
                "held-out negative log-likelihood over that of the base alone", aligned[1] / plain[1], 1.02
            ),
            at_least(
                "held-out cosine over that of an adaptor on the base's states", aligned[0] - plain[0], 0
            ),
        ]
    return Claim(tuple(found))


@torch.no_grad()
def _scores(
    model: ARRA, adaptor: Adaptor, encoder: Components, codes: torch.Tensor, labels: torch.Tensor
) -> tuple[float, float]:
    """Cosine and negative log-likelihood per code."""
    logits, tap = model.tapped(codes, labels, LAYER)
    features = encoder.features(level_images(codes))
    cosine = 1 - alignment_loss(adaptor(tap), features).item()
    return cosine, F.cross_entropy(logits.flatten(0, 1), codes.flatten()).item()
