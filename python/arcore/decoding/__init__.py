"""Loops that turn models into samples. They know the protocols of `arcore.nn.protocols` and no model."""

from arcore.decoding.next_scale import NextScaleOutput, generate_next_scale
from arcore.decoding.sampling import RowSeeds, filter_logits, sample

__all__ = [
    "NextScaleOutput",
    "RowSeeds",
    "filter_logits",
    "generate_next_scale",
    "sample",
]
