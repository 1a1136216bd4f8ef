"""LANTERN: drafts of image codes are accepted for their neighbours' probability too (arXiv:2410.03355).

Image tokenizers have many codes that look alike, so the model spreads its probability and drafts are rejected. LANTERN
lets a drafted code x also stand for its nearest codes, as long as these carry at most probability delta;
LANTERN++ bounds them by delta times the draft's own probability instead.

The loop is `arcore.decoding.speculative_tree` with `relaxed` verification; any drafter serves. Here are the paper's
drafter (EAGLE's, arXiv:2401.15077: one more layer that predicts the model's next hidden state from the last one and the
code that was drawn), its settings, and the check of what is and what is not bounded: delta bounds the relaxed target of
*one* draft, not the law of what is emitted. SJD is the lossless neighbour.

Under guidance the drafter sees the conditional model's states and proposes without guidance; what is emitted is guided.

Left out: the released files of drafters.
"""

from __future__ import annotations

from typing import Any

from arcore.catalog import System

SYSTEM = System(
    name="lantern",
    title="LANTERN",
    paper="arXiv:2410.03355",
    paper_title="LANTERN: Accelerating Visual Autoregressive Models with Relaxed Speculative Decoding",
    topic="acceleration",
    kind="decoder",
    model="FeatureDrafter",
    builds_on=("llamagen",),
    ops=("speculative", "sample"),
    recipe="own",
    summary="Speculative decoding of image codes that accepts a draft for its neighbours in the codebook; lossy.",
    claim="At delta 0 nothing changes; acceptance rises with delta, which bounds one draft's target and not the law.",
    checked_on="real data",
)


def __getattr__(name: str) -> Any:
    # The recipe needs the packages for training; the decoder does not.
    if name == "RECIPE":
        from arcore.zoo.acceleration.lantern.recipe import RECIPE

        return RECIPE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
