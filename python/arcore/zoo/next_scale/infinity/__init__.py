"""Infinity: pictures of a text, scale by scale and bit by bit (arXiv:2412.04431).

A code of `msbsq` is d bits, and the model gives each bit a probability of its own, so a vocabulary of 2^d codes needs
2 d outputs. While training some bits of what the model reads are flipped, and its targets are the bits of what is then
left of the picture: it learns to correct its own mistakes. Against `var`: bits for codes, a text read by
cross-attention for a class, rotary positions on the finest grid for learned ones.

Legend: B rows, T tokens of a text, L tokens of all scales, p_k side of scale k, C width, c width of a text's vectors,
d bits of a token.
"""

from __future__ import annotations

from typing import Any

from arcore.catalog import System

SYSTEM = System(
    name="infinity",
    title="Infinity",
    paper="arXiv:2412.04431",
    paper_title="Infinity: Scaling Bitwise AutoRegressive Modeling for High-Resolution Image Synthesis",
    topic="next_scale",
    kind="model",
    model="Infinity",
    builds_on=("var", "msbsq"),
    ops=("block_sparse_attention", "sample"),
    recipe="own",
    summary="Draws pictures of a text scale by scale; each code is a row of bits with probabilities of their own.",
    claim="Steps with a cache give one pass; trained with flipped bits, it corrects flipped bits better than without.",
    checked_on="real data",
)


def __getattr__(name: str) -> Any:
    # The recipe needs the packages for training; the model does not.
    if name == "RECIPE":
        from arcore.zoo.next_scale.infinity.recipe import RECIPE

        return RECIPE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
