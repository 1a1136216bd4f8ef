"""Loops that turn models into samples. They know the protocols of `arcore.nn.protocols` and no model."""

from arcore.decoding.autoregressive import GenerateOutput, generate, stream
from arcore.decoding.block_diffusion import generate_blocks, stream_blocks
from arcore.decoding.draws import row_seeds
from arcore.decoding.frame_diffusion import generate_frames, stream_frames
from arcore.decoding.masked_autoregressive import generate_masked, masked_counts
from arcore.decoding.next_scale import NextScaleOutput, generate_next_scale

__all__ = [
    "GenerateOutput",
    "NextScaleOutput",
    "generate",
    "generate_blocks",
    "generate_frames",
    "generate_masked",
    "generate_next_scale",
    "masked_counts",
    "row_seeds",
    "stream",
    "stream_blocks",
    "stream_frames",
]
