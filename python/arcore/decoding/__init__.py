"""Decoding loops. They know the protocols of `arcore.nn`, never a model."""

from arcore.decoding.next_scale import NextScaleOutput, generate_next_scale
from arcore.decoding.sampling import filter_logits, row_generators, sample_rows

__all__ = ["NextScaleOutput", "filter_logits", "generate_next_scale", "row_generators", "sample_rows"]
