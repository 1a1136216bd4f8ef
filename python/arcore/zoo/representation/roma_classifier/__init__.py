"""The image classifier of RoMA (arXiv:2503.10392): its pretrained encoder, scanned in four directions.

Pretraining reads an image in one direction (`RoMA`). For classification a class token stands in the middle of the
patches, and each layer scans the image along rows and along columns, forwards and backwards, with a convolution and a
state space of its own for each direction; the mean of the four is projected out. All directions start as copies of the
pretrained one. In the released code a backward scan flips its inputs and its result; here the ops run backwards.

Legend: B rows, G patches per side, L = G^2 + 1 tokens, C width.
"""

from arcore.catalog import System

SYSTEM = System(
    name="roma_classifier",
    title="RoMA classifier",
    paper="arXiv:2503.10392",
    paper_title="RoMA: Scaling up Mamba-based Foundation Models for Remote Sensing",
    topic="representation",
    kind="model",
    model="RoMAClassifier",
    builds_on=("roma",),
    ops=("selective_scan",),
    recipe="classifier",
    summary="Classifies images with RoMA's encoder, scanned in four directions.",
    claim=(
        "Backward and column-wise scans give the result of scanning flipped and transposed copies, "
        "gradients included."
    ),
    checked_on="published layout, random weights",
)
