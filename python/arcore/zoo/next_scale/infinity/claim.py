"""Infinity's claim: steps give one pass, and a model that read flipped bits corrects them."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from arcore.catalog import create_model
from arcore.catalog.claims import Claim, at_least, at_most, shaken, steps
from arcore.zoo.next_scale.infinity.model import bit_loss
from arcore.zoo.next_scale.infinity.text import Text, word_vectors
from arcore.zoo.tokenizers.multi_scale_bsq.claim import trained_tokenizer

FLIPPED = 0.2


def claim(*, quick: bool) -> Claim:
    """Exact properties; in full two models of scenes of digits, trained with and without flipped bits."""
    with torch.no_grad():
        rows = _exact()
    if quick:
        return Claim(tuple(rows))
    from arcore.data import load_scenes

    tokenizer = trained_tokenizer(600)
    train, held_out = load_scenes("train"), load_scenes("test")
    every = word_vectors(train.class_names, 64)
    models = []
    for noise in (0, 30):
        torch.manual_seed(1)
        model: Any = create_model("infinity_tiny")
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
        for _ in steps(500, f"training with up to {noise} % of bits flipped"):
            batch = torch.randint(len(train), (32,))
            strengths = torch.randint(noise + 1, (len(tokenizer.patch_nums),)) / 100
            bits, inputs = tokenizer.corrected(tokenizer.latent(train.images[batch]), strengths)
            optimizer.zero_grad()
            bit_loss(model(inputs, _named(every, train.labels[batch])), bits).backward()
            optimizer.step()
        models.append(model.eval())
    losses = []
    with torch.no_grad():
        pictures, text = held_out.images[::15], _named(every, held_out.labels[::15])
        torch.manual_seed(2)
        flipped = tokenizer.corrected(
            tokenizer.latent(pictures), torch.full((len(tokenizer.patch_nums),), FLIPPED)
        )
        losses = [bit_loss(model(flipped[1], text), flipped[0]) for model in models]
    rows.append(
        at_most(
            "nats per bit where a fifth is flipped, trained with flips over trained without",
            losses[1] / losses[0],
            1,
        )
    )
    return Claim(tuple(rows))


def _named(every: Text, labels: torch.Tensor) -> Text:
    return Text(every.vectors[labels], every.lengths[labels])


def _exact() -> list[Any]:
    model: Any = shaken(create_model("infinity_tiny"), scale=0.2).eval()
    text = word_vectors(["a 3 and a 7", "four"], model.config.text_dim)
    inputs = torch.randn(2, model.config.num_tokens - 1, model.bits)
    whole, told, cache = model(inputs, text), model.tell(text), model.make_cache(2)
    parts = [
        model.scale_logits(k, None if k == 0 else inputs[:, start - 1 : stop - 1], told, cache)
        for k, (start, stop) in enumerate(itertools.pairwise(model.scale_starts))
    ]
    longer = Text(torch.cat([text.vectors, torch.randn(2, 3, model.config.text_dim)], 1), text.lengths)
    other = model(inputs, word_vectors(["a 4 and a 7", "four"], model.config.text_dim))
    return [
        at_most(
            "one pass against steps, largest difference", (torch.cat(parts, 1) - whole).abs().max(), 1e-5
        ),
        at_most(
            "change of the logits with what stands behind a text's end",
            (model(inputs, longer) - whole).abs().max(),
            1e-5,
        ),
        at_least("the same with one word of the first text", (other - whole)[0].abs().max(), 0.01),
    ]
