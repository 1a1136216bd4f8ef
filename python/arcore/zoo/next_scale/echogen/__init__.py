"""EchoGen: pictures of a text with the subject of a reference picture (arXiv:2509.26127).

An `infinity` model reads a reference in two ways. Semantic tokens, of an encoder such as DINOv2, join the text in one
softmax, and their summary goes in front of the first scale and into the modulation. Content tokens, the latent of an
autoencoder, have a branch of their own through all blocks: they attend to each other and to the text, never to the
picture, so they are computed once, and the picture's tokens read them by a second attention, whose result is added.
Guidance has two strengths: of the text against nothing, and of text and reference against the text.

Legend: that of `infinity`; S semantic tokens and their summary, M content tokens.

The published model's encoders are not part of it: DINOv2 and the autoencoder of FLUX are read by transformers and
diffusers from local folders. The tiny preset has patches of pixels for the one and the tokenizer's own latent for the
other.
"""

from __future__ import annotations

from typing import Any

from arcore.catalog import System

SYSTEM = System(
    name="echogen",
    title="EchoGen",
    paper="arXiv:2509.26127",
    paper_title="EchoGen: Generating Visual Echoes in Any Scene via Feed-Forward Subject-Driven Auto-Regressive Model",
    topic="next_scale",
    kind="model",
    model="EchoGen",
    builds_on=("infinity", "msbsq"),
    ops=("block_sparse_attention", "sample"),
    recipe="own",
    summary="Draws the subject of a reference picture where a text says, on Infinity.",
    claim="The drawn subject is nearer to the reference than to 19 others of its class, and by chance without it.",
    checked_on="real data",
)


def __getattr__(name: str) -> Any:
    # The recipe needs the packages for training; the model does not.
    if name == "RECIPE":
        from arcore.zoo.next_scale.echogen.recipe import RECIPE

        return RECIPE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
