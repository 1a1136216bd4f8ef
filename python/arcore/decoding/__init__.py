"""Loops that turn models into samples. They know the protocols of `arcore.nn.protocols` and no model."""

from arcore.decoding.autoregressive import generate, stream
from arcore.decoding.bans import allow_without_repeats, allow_without_words
from arcore.decoding.block_diffusion import generate_blocks, stream_blocks
from arcore.decoding.drafters import (
    AboveDrafter,
    Context,
    Draft,
    Drafter,
    LookupDrafter,
    ModelDrafter,
    NGramDrafter,
    TreeShape,
)
from arcore.decoding.draws import row_seeds
from arcore.decoding.frame_diffusion import generate_frames, stream_frames
from arcore.decoding.guided import GuidedModel, MixedModel
from arcore.decoding.jacobi import copy_above, jacobi, random_tokens, repeat_last
from arcore.decoding.masked_autoregressive import generate_masked, masked_counts
from arcore.decoding.next_scale import Kept, NextScaleOutput, generate_next_scale
from arcore.decoding.next_token import GenerateOutput, Step, next_token
from arcore.decoding.rollouts import draw_rollout
from arcore.decoding.sampling import Sampling
from arcore.decoding.search import Session
from arcore.decoding.speculative import (
    SpeculativeOutput,
    exact,
    relaxed,
    speculative_chain,
    speculative_tree,
    typical,
)

__all__ = [
    "AboveDrafter",
    "Context",
    "Draft",
    "Drafter",
    "GenerateOutput",
    "GuidedModel",
    "Kept",
    "LookupDrafter",
    "MixedModel",
    "ModelDrafter",
    "NGramDrafter",
    "NextScaleOutput",
    "Sampling",
    "Session",
    "SpeculativeOutput",
    "Step",
    "TreeShape",
    "allow_without_repeats",
    "allow_without_words",
    "copy_above",
    "draw_rollout",
    "exact",
    "generate",
    "generate_blocks",
    "generate_frames",
    "generate_masked",
    "generate_next_scale",
    "jacobi",
    "masked_counts",
    "next_token",
    "random_tokens",
    "relaxed",
    "repeat_last",
    "row_seeds",
    "speculative_chain",
    "speculative_tree",
    "stream",
    "stream_blocks",
    "stream_frames",
    "typical",
]
