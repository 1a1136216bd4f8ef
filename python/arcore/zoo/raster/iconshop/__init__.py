"""IconShop: vector icons as a text of drawing commands, from words or around what is there (arXiv:2304.14400).

An icon is a row of commands, each followed by its points on a small grid: M (where the pen was, where it goes), L (its
end) and C (two control points and its end). A point is a single token; its embedding is the sum of a table of tokens,
one of columns and one of rows. Words of the icon's name come first. Half of the training icons have a span of commands
cut out and put behind the end, so the model can also fill a gap.

While drawing, a mask allows only what the grammar of commands allows, so every icon is a valid SVG path.

Differs from its neighbour, `llamagen`, in what a token is. The published layout is not kept: the layers are Llama's
with rotary positions instead of learned ones, words come from a table of the training icons' names instead of BERT, and
there is no cross-attention to an empty memory.

Legend: B rows, L tokens, C width, G side of the grid, V tokens of drawings, W words.
"""

from __future__ import annotations

from typing import Any

from arcore.catalog import System

SYSTEM = System(
    name="iconshop",
    title="IconShop",
    paper="arXiv:2304.14400",
    paper_title="IconShop: Text-Guided Vector Icon Synthesis with Autoregressive Transformers",
    topic="raster",
    kind="model",
    model="IconShop",
    builds_on=("llama",),
    ops=("block_sparse_attention", "sample"),
    recipe="own",
    summary="Vector icons as drawing commands, from words, or filled in where a span of commands is missing.",
    claim=(
        "Tokens give every icon back within a pixel of the grid; with the grammar's mask every drawing parses, also of "
        "a model with random weights; a gap is filled between what stands around it."
    ),
    checked_on="real data",
)


def __getattr__(name: str) -> Any:
    # The recipe needs the packages for training; the model does not.
    if name == "RECIPE":
        from arcore.zoo.raster.iconshop.recipe import RECIPE

        return RECIPE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
