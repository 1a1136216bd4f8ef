"""The check of the claim."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from arcore.catalog.claims import Claim, at_least, at_most, equals
from arcore.data import concept_pairs
from arcore.decoding import generate
from arcore.zoo.raster._digits import accuracy, digit_codes, level_images, train_classifier, train_raster
from arcore.zoo.raster.ear.erasing import (
    Erasing,
    class_samples,
    erase,
    erase_loss,
    last_hidden,
    patched,
    rollout,
)


def claim(*, quick: bool) -> Claim:
    """Erase the 3 toward the 8 in a model of small digits; quick: only that the loss falls and the patch comes off."""
    model = train_raster(5 if quick else 1200)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    how = Erasing(
        updates=4 if quick else 40, pairs=4 if quick else 12, cfg=1.0 if quick else 2.0, threshold=0
    )
    patch = erase(model, 3, 8, how)
    ids, goals = rollout(model, 3, 8, how, how.updates)  # a rollout that was not trained on

    @torch.no_grad()
    def measured() -> tuple[Tensor, Tensor]:
        hidden = last_hidden(model, ids, "full")
        return hidden, erase_loss(hidden, *goals)

    plain = measured()
    with patched(model, patch):
        tuned = measured()
        codes = None if quick else class_samples(model, 20, cfg=2.0, seed=1)
    changed = sum(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    rows = [
        equals("weights of the model that differ after the patch is taken off", changed, 0),
        at_least("largest change of a hidden state while it is on", (tuned[0] - plain[0]).abs().max(), 1e-3),
    ]
    if codes is not None:
        train, labels = digit_codes("train")
        judge = train_classifier(level_images(train), labels, classes=10)
        held_out, truth = digit_codes("test")
        hits = [accuracy(judge, level_images(codes[c]), torch.full((20,), c)) for c in range(10)]
        seen = accuracy(judge, level_images(held_out), truth)
        kept = {right: _pairs_kept(model, judge, right) for right in (True, False)}
        rows += [
            at_least("share of pairs of prompts that the classifier keeps", kept[True], 0.7),
            at_most("the same of a generator that mixes the classes up", kept[False], 0.1),
            at_most("loss with the patch over that without", tuned[1] / plain[1], 0.9),
            at_least("accuracy of the classifier on held-out digits", seen, 0.95),
            at_most("samples of the erased class that are taken for it", hits[3], 0.1),
            at_least(
                "the same of the other classes, mean", sum(hits[c] for c in range(10) if c != 3) / 9, 0.8
            ),
        ]
    return Claim(tuple(rows))


def _pairs_kept(model: Any, judge: nn.Module, right: bool, count: int = 60) -> float:
    """Share of the pairs (a 3, an 8) that `concept_pairs` keeps of a model, or of one with other classes."""

    def draw(prompts: list[str], seeds: list[int]) -> Tensor:
        labels = torch.tensor([(int(prompt[-1]) + (not right)) % 10 for prompt in prompts])
        codes = generate(model.guided(2.0), model.prompt(labels), max_new_tokens=64, seed=seeds).ids
        return level_images(codes)

    def seen(images: Tensor) -> Tensor:
        chance: Tensor = judge(images).softmax(-1)[:, 3]
        return chance

    templates = ("the digit {}", "a {}")
    return concept_pairs(templates, "3", "8", draw, seen, n=count, tries=count, seed=3_000).kept
