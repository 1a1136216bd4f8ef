"""Loops that turn models into samples. They know the protocols of `arcore.nn.protocols` and no model."""

from arcore.decoding.autoregressive import GenerateOutput, generate, stream
from arcore.decoding.next_scale import NextScaleOutput, generate_next_scale
from arcore.decoding.sampling import RowSeeds, filter_logits, penalize_repetition, sample

__all__ = [
    "GenerateOutput",
    "NextScaleOutput",
    "RowSeeds",
    "filter_logits",
    "generate",
    "generate_next_scale",
    "penalize_repetition",
    "sample",
    "stream",
]
