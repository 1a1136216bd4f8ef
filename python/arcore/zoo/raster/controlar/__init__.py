"""ControlAR: raster images that follow a control image, such as edges (Li et al., arXiv:2410.02705).

An encoder makes one vector of the control image per code. In some layers, the hidden state *that predicts* a code gets
that code's vector added, through a small network of the layer. The sequence grows no longer, unlike with control codes
in front of the image.

Differs from its neighbour, `llamagen`, in these additions alone. Their last weights start at zero, so a new model is
the base model exactly (the released code overwrites that initialisation). Layers are given as a list (the released rule
fails for a number of layers that 3 does not divide).

Guidance: the branch without a condition has neither class nor control, and training drops both together.

Left out: the published encoder (DINOv2) and text prompts; a few convolutions read the control here.

Legend: B rows, L codes, C width, S side of the code map.
"""

from __future__ import annotations

from typing import Any

from arcore.catalog import System

SYSTEM = System(
    name="controlar",
    title="ControlAR",
    paper="arXiv:2410.02705",
    paper_title="ControlAR: Controllable Image Generation with Autoregressive Models",
    topic="raster",
    kind="model",
    model="ControlAR",
    builds_on=("llamagen",),
    ops=("block_sparse_attention", "sample"),
    recipe="own",
    summary="Raster images that follow a control image, whose vectors are added where each code is predicted.",
    claim=(
        "New, it is the base model exactly; trained, the edges of its samples overlap with the control by at least "
        "0.6, without the control by at most 0.3, at half the sequence of control codes in front."
    ),
    checked_on="real data",
)


def __getattr__(name: str) -> Any:
    # The recipe needs the packages for training; the model does not.
    if name == "RECIPE":
        from arcore.zoo.raster.controlar.recipe import RECIPE

        return RECIPE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
