"""Distilled Decoding 2: all codes of an image in one call, distilled from a raster model (arXiv:2510.21003).

The teacher gives probabilities P of each code c_j after those before it. Along x_t = (1 - t) q + t e, from a code q at
t = 0 to noise e at t = 1, the score of that mixture is known in closed form, and so is its mean code::

    D(x, t) = sum_j w_j c_j,   w = softmax(log P_j - |x - (1 - t) c_j|^2 / 2 t^2)
    score(x, t) = -(x - (1 - t) D(x, t)) / t^2

A generator reads the noise of all places, shifted by one, and makes a code vector of each place's own noise. A
guidance network of the same form learns the mean code of what the generator makes, given what it made before. The
generator moves along the difference of the two scores, summed over places, with prefixes held fixed (the
reverse KL divergence).

Differs from its neighbour, `sjd`, in that it draws in a single call and does not keep the law.

The official code is not published. Both networks start from the teacher's layers; the generator first learns the map of
the probability flow from noise to the teacher's own codes (the regression of Distilled Decoding 1), with identity-like
heads. The paper's SiD form of the loss and the teacher's correction of the last places are left out.

Legend: B rows, L codes, V codes of the codebook, c width of a code.
"""

from __future__ import annotations

from typing import Any

from arcore.catalog import System

SYSTEM = System(
    name="dd2",
    title="Distilled Decoding 2",
    paper="arXiv:2510.21003",
    paper_title="Distilled Decoding 2: One-step Sampling of Image Auto-regressive Models with Conditional "
    "Score Distillation",
    topic="raster",
    kind="model",
    model="OneStepCodes",
    builds_on=("llamagen", "vq16"),
    ops=("block_sparse_attention",),
    recipe="own",
    summary="All codes of an image in one call, by a generator distilled from a raster model's exact scores.",
    claim=(
        "The closed-form score is the gradient of the log-density; on two tied tokens, distilling takes pairs that the "
        "teacher never gives from about a half to at most 5 per cent and keeps both modes."
    ),
    checked_on="synthetic data",
)


def __getattr__(name: str) -> Any:
    # The recipe needs the packages for training; the networks do not.
    if name == "RECIPE":
        from arcore.zoo.raster.dd2.recipe import RECIPE

        return RECIPE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
