"""Building blocks that systems share, and the protocols between models and decoders."""

from arcore.nn.adaln import AdaLNBlock, AdaLNHead, DropPath, Modulation, modulated_norm
from arcore.nn.attention import CrossAttention, SelfAttention
from arcore.nn.blocks import PreNormBlock, init_mamba_encoder
from arcore.nn.cache import KVCache
from arcore.nn.conv import ConvDecoder, ConvEncoder
from arcore.nn.embed import ClassEmbedding, LevelEmbedding, sincos_positions
from arcore.nn.linear import Linear, linear
from arcore.nn.mlp import MLP, SwiGLU
from arcore.nn.norm import GatedRMSNorm, RMSNorm
from arcore.nn.patches import PatchEmbed
from arcore.nn.protocols import ScaleModel, ScaleTokenizer, TokenModel
from arcore.nn.ssm import CausalConv1d, Mamba2Mixer, MambaMixer, SelectiveSSM
from arcore.nn.state import StateCache, StateSnapshot

__all__ = [
    "MLP",
    "AdaLNBlock",
    "AdaLNHead",
    "CausalConv1d",
    "ClassEmbedding",
    "ConvDecoder",
    "ConvEncoder",
    "CrossAttention",
    "DropPath",
    "GatedRMSNorm",
    "KVCache",
    "LevelEmbedding",
    "Linear",
    "Mamba2Mixer",
    "MambaMixer",
    "Modulation",
    "PatchEmbed",
    "PreNormBlock",
    "RMSNorm",
    "ScaleModel",
    "ScaleTokenizer",
    "SelectiveSSM",
    "SelfAttention",
    "StateCache",
    "StateSnapshot",
    "SwiGLU",
    "TokenModel",
    "init_mamba_encoder",
    "linear",
    "modulated_norm",
    "sincos_positions",
]
