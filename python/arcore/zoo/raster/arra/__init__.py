"""ARRA: hidden states of an image language model aligned with an encoder while it trains (arXiv:2503.07334).

A model of codes learns to predict the next one. ARRA adds a second loss on the hidden states behind its first layers:
through a small adaptor they should point to the same direction as one vector that a frozen encoder has for the whole
picture. The adaptor is thrown away after training, so the model, its files and its decoding are those of the base.

The base here is LlamaGen. In the paper an external vision encoder gives the vector; here it is that of any trained
network of the zoo with a method `features`, or the first principal components of the training images (`pca`).

Left out: the <REP> token, which the paper compares its choice with.

Legend: B images, L codes, C width, F width of the encoder's vector.
"""

from __future__ import annotations

from typing import Any

from arcore.catalog import System

SYSTEM = System(
    name="arra",
    title="ARRA",
    paper="arXiv:2503.07334",
    paper_title="Unleashing the Potential of Large Language Models for Text-to-Image Generation through "
    "Autoregressive Representation Alignment",
    topic="raster",
    kind="model",
    model="ARRA",
    builds_on=("llamagen",),
    ops=("block_sparse_attention", "sample"),
    recipe="own",
    summary="Trains an image language model with its hidden states aligned to an encoder's vector of the picture.",
    claim="Alignment grows by .3 in cosine at no more than 2 % of likelihood, and the weights stay those of the base.",
    checked_on="real data",
)


def __getattr__(name: str) -> Any:
    # The recipe needs the packages for training; the model does not.
    if name == "RECIPE":
        from arcore.zoo.raster.arra.recipe import RECIPE

        return RECIPE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
