"""Pairs of prompts for erasing a concept, filtered by what a classifier sees in their images (ECGVF of EAR)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from arcore.nn.checks import check_whole
from arcore.nn.kinds import check_kinds

# Prompts and a seed for each to images `[N, C, H, W]`.
Draw = Callable[[list[str], list[int]], Tensor]
# Images to the probability that each shows the concept, `[N]`.
Judge = Callable[[Tensor], Tensor]
# Prompts that are drawn at a time.
_AT_ONCE = 32


@check_kinds
@dataclass(frozen=True)
class ConceptPair:
    """A prompt with the concept and the same prompt with what takes its place.

    Attributes:
        target: with the concept.
        replacement: without.
        seed: of the images that were judged.
        seen: probabilities of the concept in the image of each.
    """

    target: str
    replacement: str
    seed: int
    seen: tuple[float, float]


@check_kinds
@dataclass(frozen=True)
class ConceptPairs:
    """What `concept_pairs` found.

    Attributes:
        pairs: those that were kept.
        tried: pairs that were drawn and judged.
    """

    pairs: tuple[ConceptPair, ...]
    tried: int

    @property
    def kept(self) -> float:
        """Share of the pairs that were kept."""
        return len(self.pairs) / max(self.tried, 1)


@check_kinds
def concept_pairs(
    templates: Sequence[str],
    concept: str,
    replacement: str,
    draw: Draw,
    judge: Judge,
    *,
    tau: float = 0.8,
    n: int = 50,
    tries: int | None = None,
    seed: int = 0,
) -> ConceptPairs:
    """Pairs of prompts whose images differ in the concept, for training and for judging an erasure.

    Templates are taken in turns, with another seed each time. A pair is kept when the classifier sees the concept in
    the target's image with probability `tau` or more and finds it unlikelier than not in the replacement's.

    Args:
        templates: prompts with `{}` where the concept stands.
        concept: what is to be erased.
        replacement: what takes its place.
        draw: the generator.
        judge: the classifier.
        tau: least probability of the concept in the target's image.
        n: pairs to keep.
        tries: pairs to draw at most; 4 n when None.
        seed: of the first pair.

    Returns:
        At most `n` pairs, and how many were tried.

    Raises:
        ValueError: a template has no place for the concept, both words are one, a number is out of range, or `draw` or
            `judge` gives another number of rows.

    Reference: EAR (arXiv:2506.20151), the evaluation of concept erasure with a generator and a visual filter.
    """
    n = check_whole("n", n, 1)
    tries = 4 * n if tries is None else check_whole("tries", tries, 1)
    without = [template for template in templates if "{}" not in template]
    if not templates or without:
        raise ValueError(
            f"expected templates with {{}} for the concept but got {without[0] if without else 'none'!r}"
        )
    if concept == replacement:
        raise ValueError(f"expected a replacement other than the concept {concept!r}")
    if not 0 < tau <= 1:
        raise ValueError(f"expected tau above 0 and at most 1 but got {tau}")
    found: list[ConceptPair] = []
    tried = 0
    while len(found) < n and tried < tries:
        places = range(tried, min(tried + _AT_ONCE, tries))
        seeds = [seed + place for place in places]
        texts = [
            [templates[place % len(templates)].replace("{}", word) for place in places]
            for word in (concept, replacement)
        ]
        seen = [_judged(judge, draw(prompts, seeds), len(seeds)) for prompts in texts]
        for one, other, number, yes, no in zip(*texts, seeds, *seen, strict=True):
            tried += 1
            if yes >= tau and no < 0.5:
                found.append(ConceptPair(one, other, number, (yes, no)))
                if len(found) == n:
                    break
    return ConceptPairs(tuple(found), tried)


def _judged(judge: Judge, images: Tensor, count: int) -> list[float]:
    if len(images) != count:
        raise ValueError(f"expected draw to give {count} images, one per prompt, but got {len(images)}")
    chances = judge(images)
    if chances.shape != (count,) or not bool(((chances >= 0) & (chances <= 1)).all()):
        raise ValueError(
            f"expected judge to give probabilities of shape [{count}] from 0 to 1 but got {tuple(chances.shape)}"
        )
    return [float(chance) for chance in chances.to(torch.float64)]
