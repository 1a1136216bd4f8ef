"""Semantic segmentation with RoMA's encoder (arXiv:2503.10392) and UPerNet (arXiv:1807.10221).

The encoder of the classifier, without its class token's output, gives one map. Transposed convolutions and pooling make
maps of four resolutions from it. UPerNet pools the coarsest at several scales, adds what it knows to the finer maps one
by one, and classifies the pixels of all maps together. Training has a second, small head on one map, whose loss counts
0.4. The classifier (`roma_classifier`) says what is in an image; this says where.

Legend: B rows, G patches per side, C width of the encoder, D channels of the head.
"""

from arcore.catalog import System

SYSTEM = System(
    name="roma_segmenter",
    title="RoMA segmentation",
    paper="arXiv:2503.10392",
    paper_title="RoMA: Scaling up Mamba-based Foundation Models for Remote Sensing",
    topic="representation",
    kind="model",
    model="RoMASegmenter",
    builds_on=("roma", "roma_classifier"),
    ops=("selective_scan",),
    recipe="segmentation",
    summary="Names the class of every pixel with RoMA's encoder and UPerNet.",
    claim="On photographs with pasted digits of MNIST, whose masks are known exactly, pixels get their digit's class.",
    checked_on="synthetic data",
    reported="mean F1 79.50 on SpaceNet v1 (base)",
)
