"""Building blocks that systems share, and the protocols between models and decoders."""

from arcore.nn.adaln import (
    AdaLNBlock,
    AdaLNHead,
    DropPath,
    Modulation,
    ModulationTable,
    SharedModulation,
    modulated_norm,
)
from arcore.nn.attention import CrossAttention, SelfAttention
from arcore.nn.block_weight import BlockWeight, quantise
from arcore.nn.blocks import PostNormBlock, PreNormBlock, init_mamba_encoder
from arcore.nn.branches import PackedBranches, branch_hidden, pack_branches
from arcore.nn.cache import Cache, KVCache, KVSnapshot
from arcore.nn.conv import ConvDecoder, ConvEncoder
from arcore.nn.decoder import DecoderLayer, GatedMLP, GroupedAttention, attend, pairs_to_halves
from arcore.nn.diffusion_head import DiffusionHead
from arcore.nn.dit import DiTAttention, DiTBlock, DiTHead, TimestepEmbedding, init_dit, modulate
from arcore.nn.embed import (
    ClassEmbedding,
    ContextEmbedding,
    LevelEmbedding,
    sincos_positions,
    sincos_sequence,
)
from arcore.nn.linear import Linear, linear
from arcore.nn.mlp import MLP, SwiGLU
from arcore.nn.norm import GatedRMSNorm, RMSNorm
from arcore.nn.patches import PatchEmbed
from arcore.nn.protocols import (
    BlockModel,
    DraftableModel,
    Extended,
    FrameModel,
    MaskedModel,
    ScaleModel,
    ScaleTokenizer,
    TokenModel,
    VectorTokenizer,
)
from arcore.nn.ring_cache import RingCache
from arcore.nn.rollout import PairwiseRater, PreferenceBatch, RewardFn, Rollout, TokenStats
from arcore.nn.rope import Rope, axis_base, rope_table
from arcore.nn.rotary import Angles, RotaryTable, signed_angles
from arcore.nn.ssm import CausalConv1d, Mamba2Mixer, MambaMixer, SelectiveSSM
from arcore.nn.state import StateCache, StateSnapshot
from arcore.nn.token_cache import TokenCache, TokenSnapshot

__all__ = [
    "MLP",
    "AdaLNBlock",
    "AdaLNHead",
    "Angles",
    "BlockModel",
    "BlockWeight",
    "Cache",
    "CausalConv1d",
    "ClassEmbedding",
    "ContextEmbedding",
    "ConvDecoder",
    "ConvEncoder",
    "CrossAttention",
    "DecoderLayer",
    "DiTAttention",
    "DiTBlock",
    "DiTHead",
    "DiffusionHead",
    "DraftableModel",
    "DropPath",
    "Extended",
    "FrameModel",
    "GatedMLP",
    "GatedRMSNorm",
    "GroupedAttention",
    "KVCache",
    "KVSnapshot",
    "LevelEmbedding",
    "Linear",
    "Mamba2Mixer",
    "MambaMixer",
    "MaskedModel",
    "Modulation",
    "ModulationTable",
    "PackedBranches",
    "PairwiseRater",
    "PatchEmbed",
    "PostNormBlock",
    "PreNormBlock",
    "PreferenceBatch",
    "RMSNorm",
    "RewardFn",
    "RingCache",
    "Rollout",
    "Rope",
    "RotaryTable",
    "ScaleModel",
    "ScaleTokenizer",
    "SelectiveSSM",
    "SelfAttention",
    "SharedModulation",
    "StateCache",
    "StateSnapshot",
    "SwiGLU",
    "TimestepEmbedding",
    "TokenCache",
    "TokenModel",
    "TokenSnapshot",
    "TokenStats",
    "VectorTokenizer",
    "attend",
    "axis_base",
    "branch_hidden",
    "init_dit",
    "init_mamba_encoder",
    "linear",
    "modulate",
    "modulated_norm",
    "pack_branches",
    "pairs_to_halves",
    "quantise",
    "rope_table",
    "signed_angles",
    "sincos_positions",
    "sincos_sequence",
]
