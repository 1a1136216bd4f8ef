"""Attention masks as data.

    from arcore import masks

    mask = masks.next_scale((1, 2, 3, 4))     # IntervalMask(nq=30, nk=30, intervals=1, density=0.697)
    mask.plot(path="mask.png")

`IntervalMask` holds at most two key ranges per query row, `TreeMask` a token tree after a prefix. The constructors
make the masks of the field by name; docs/masks.md shows each with a picture.
"""

from arcore.masks.constructors import (
    block_causal,
    causal,
    documents,
    full,
    next_scale,
    next_scale_markov,
    prefix_lm,
    skip_causal,
    skip_causal_step,
    sliding_window,
    tree,
)
from arcore.masks.interval_mask import IntervalMask
from arcore.masks.labels import Labels, Segment
from arcore.masks.tile_plan import TilePlan, reference_tile_plan
from arcore.masks.tree_mask import TreeMask

from_bool = IntervalMask.from_bool
from_block_mask = IntervalMask.from_block_mask

__all__ = [
    "IntervalMask",
    "Labels",
    "Segment",
    "TilePlan",
    "TreeMask",
    "block_causal",
    "causal",
    "documents",
    "from_block_mask",
    "from_bool",
    "full",
    "next_scale",
    "next_scale_markov",
    "prefix_lm",
    "reference_tile_plan",
    "skip_causal",
    "skip_causal_step",
    "sliding_window",
    "tree",
]
