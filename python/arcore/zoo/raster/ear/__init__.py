"""EAR: erasing a concept from an autoregressive image model (arXiv:2506.20151).

The attention of the first layers is trained so that, in the images of the erased class, each code is predicted from
what another class would give. Three images advance together: a positive one of the class to erase, a neutral and a
target one of the class to move toward. At each code the last hidden state of the trained model on the positive image is
drawn to::

    h_target - strength * (h_positive - h_neutral)

all three from the model as it was. The loss is summed over a window of codes, and each window is an update, unless its
loss is at most a threshold already.

Differs from fine-tuning on other labels (`arcore.recipes.raster`) in that it needs no images, and in what it changes:
the result is a patch of attention weights; `patched` puts it in and takes it out again, bit for bit.

The released code feeds one code at a time without a cache after the first, so its later losses see a context of length
1. `context="full"` reads what stands before each code, `context="official"` repeats that.

The method has no term that keeps the other classes; `keep` adds one here (a KL divergence); 0 is the published method.

Legend: B pairs of prompts, L codes, C width.
"""

from __future__ import annotations

from arcore.catalog import System

SYSTEM = System(
    name="ear",
    title="EAR",
    paper="arXiv:2506.20151",
    paper_title="EAR: Erasing Concepts from Unified Autoregressive Models",
    topic="raster",
    kind="objective",
    builds_on=("llamagen",),
    ops=("block_sparse_attention", "sample"),
    summary="Erases a class from a trained raster image model by a patch of the first layers' attention weights.",
    claim=(
        "After erasing a digit an independent classifier finds it in at most a tenth of its samples, the others in at "
        "least 0.8 of theirs; without the patch the model is what it was, bit for bit."
    ),
    checked_on="real data",
)
