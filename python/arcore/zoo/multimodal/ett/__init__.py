"""ETT: a language model's loss reaches the image tokenizer that it reads (end-to-end vision tokenizer tuning,
arXiv:2505.10562).

A model that reads codes by their numbers cannot teach the tokenizer anything. Here it reads the codes' vectors, through
two linear layers, and the quantiser passes gradients straight through; so the caption's loss tunes encoder and codebook
together with the language model, while the tokenizer's own loss, weighted by alpha, keeps its pictures whole.

Captions are the names of the classes here. Left out: image generation with the tuned tokenizer, the perceptual,
adversarial and entropy terms of the tokenizer's loss, and the IBQ tokenizer of the paper; the tokenizer here is VQ-16.

Legend: B images, N codes of an image, c width of a code, C width of the language model, T bytes of a caption.
"""

from __future__ import annotations

from typing import Any

from arcore.catalog import System

SYSTEM = System(
    name="ett",
    title="ETT",
    paper="arXiv:2505.10562",
    paper_title="End-to-End Vision Tokenizer Tuning",
    topic="multimodal",
    kind="model",
    model="ETT",
    builds_on=("llama", "vq16"),
    ops=("block_sparse_attention",),
    recipe="own",
    summary="Tunes an image tokenizer through the captioning loss of the language model that reads its codes.",
    claim="The encoder gets a gradient; with the tokenizer's own loss pictures stay whole, without it they decay.",
    checked_on="real data",
)


def __getattr__(name: str) -> Any:
    # The recipe needs the packages for training; the model does not.
    if name == "RECIPE":
        from arcore.zoo.multimodal.ett.recipe import RECIPE

        return RECIPE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
