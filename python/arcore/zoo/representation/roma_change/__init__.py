"""Change detection with RoMA's encoder (arXiv:2503.10392) and a U-Net (arXiv:1505.04597).

One encoder reads the picture before and the picture after. Transposed convolutions and pooling make maps of four
resolutions of each. Where the two differ, and by how much, is all that the decoder sees: it goes from the absolute
differences of the coarsest maps to those of the finest, and on to the pixels. `roma_segmenter` has the same encoder
for one picture, and another decoder.

Legend: B rows, G patches per side, C width of the encoder.
"""

from arcore.catalog import System

SYSTEM = System(
    name="roma_change",
    title="RoMA change detection",
    paper="arXiv:2503.10392",
    paper_title="RoMA: Scaling up Mamba-based Foundation Models for Remote Sensing",
    topic="representation",
    kind="model",
    model="RoMAChange",
    builds_on=("roma", "roma_classifier", "roma_segmenter"),
    ops=("selective_scan",),
    recipe="segmentation",
    summary="Marks what changed between two pictures of a place with RoMA's encoder and a U-Net.",
    claim=(
        "On pairs of photographs with digits of MNIST that come and go in other light, changed pixels are found that a "
        "threshold on the difference does not find."
    ),
    checked_on="synthetic data",
    reported="F1 55.63 on OSCD (base)",
)
