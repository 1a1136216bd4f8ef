"""Pairs of prompts that a classifier keeps: nearly all of a good generator, hardly any of mixed classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from arcore.data import concept_pairs

TEMPLATES = ("a photo of a {}", "the {} in a box", "two {}")
WORDS = ("cat", "dog", "church")


def draw(prompts: list[str], seeds: list[int], wrong: bool = False) -> Tensor:
    """Images of one bright pixel, whose place is the word."""
    images = torch.zeros(len(prompts), 1, 1, 3)
    for row, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        place = next(i for i, word in enumerate(WORDS) if word in prompt)
        if wrong:
            place = (place + 1) % 3
        images[row, 0, 0, place] = 1 + 0.1 * (seed % 2)
    return images


def judge(images: Tensor) -> Tensor:
    return (8 * images[:, 0, 0]).softmax(-1)[:, 2]


def test_a_good_generators_pairs_are_kept_and_those_of_mixed_up_classes_are_not() -> None:
    good = concept_pairs(TEMPLATES, "church", "dog", draw, judge, n=20)
    assert len(good.pairs) == 20
    assert good.kept >= 0.9
    first = good.pairs[0]
    assert (first.target, first.replacement) == ("a photo of a church", "a photo of a dog")
    assert {pair.target for pair in good.pairs} == {one.format("church") for one in TEMPLATES}
    assert [pair.seed for pair in good.pairs] == list(range(20))
    assert all(yes >= 0.8 and no < 0.5 for pair in good.pairs for yes, no in [pair.seen])
    mixed = concept_pairs(TEMPLATES, "church", "dog", lambda *asked: draw(*asked, wrong=True), judge, n=20)
    assert mixed.kept <= 0.1
    assert mixed.tried == 80


def test_what_is_refused() -> None:
    for change, complaint in (
        ({"templates": ("a photo",)}, "templates with {} for the concept but got 'a photo'"),
        ({"templates": ()}, "but got 'none'"),
        ({"replacement": "church"}, "other than the concept 'church'"),
        ({"tau": 0.0}, "tau above 0"),
        ({"draw": lambda prompts, seeds: torch.zeros(1, 1, 1, 3)}, "images, one per prompt, but got 1"),
        ({"judge": lambda images: torch.full((len(images),), torch.nan)}, "probabilities of shape"),
    ):
        asked: dict[str, Any] = {"templates": TEMPLATES, "concept": "church", "replacement": "dog"}
        asked |= {"draw": draw, "judge": judge, "n": 2} | change
        with pytest.raises(ValueError, match=complaint):
            concept_pairs(**asked)
    with pytest.raises(ValueError, match="n must be at least 1"):
        concept_pairs(TEMPLATES, "church", "dog", draw, judge, n=0)
