"""Building blocks that more than one system uses, and the protocols between models and decoders."""

from arcore.nn.adaln import AdaLNHead, modulate
from arcore.nn.cache import KVCache
from arcore.nn.drop_path import DropPath
from arcore.nn.mlp import MLP
from arcore.nn.protocols import ScaleModel, ScaleTokenizer

__all__ = ["MLP", "AdaLNHead", "DropPath", "KVCache", "ScaleModel", "ScaleTokenizer", "modulate"]
