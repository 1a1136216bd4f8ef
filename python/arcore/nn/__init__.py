"""Building blocks that systems share, and the protocols between models and decoders."""

from arcore.nn.adaln import AdaLNBlock, AdaLNHead, DropPath, Modulation, modulated_norm
from arcore.nn.attention import SelfAttention
from arcore.nn.cache import KVCache
from arcore.nn.conv import ConvDecoder, ConvEncoder
from arcore.nn.embed import ClassEmbedding, LevelEmbedding
from arcore.nn.mlp import MLP
from arcore.nn.protocols import ScaleModel, ScaleTokenizer

__all__ = [
    "MLP",
    "AdaLNBlock",
    "AdaLNHead",
    "ClassEmbedding",
    "ConvDecoder",
    "ConvEncoder",
    "DropPath",
    "KVCache",
    "LevelEmbedding",
    "Modulation",
    "ScaleModel",
    "ScaleTokenizer",
    "SelfAttention",
    "modulated_norm",
]
