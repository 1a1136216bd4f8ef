"""arcore: kernels and a model zoo for autoregressive models that are not plain causal language models.

Submodules load on first use, so that `import arcore` stays light:

    import arcore
    from arcore import masks
    from arcore.ops import block_sparse_attention
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from arcore import _extension as _extension
from arcore._version import __version__

if TYPE_CHECKING:
    from arcore import decoding, masks, models, nn, objectives, ops, tokenizers
    from arcore.matmul import float32_matmul, half_matmul
    from arcore.models import create_model, list_models, model_info

_SUBMODULES = ("data", "decoding", "masks", "models", "nn", "objectives", "ops", "tokenizers", "training")
_FROM_MODELS = ("create_model", "list_models", "model_info")
_FROM_MATMUL = ("float32_matmul", "half_matmul")

__all__ = [
    "__version__",
    "create_model",
    "decoding",
    "float32_matmul",
    "half_matmul",
    "list_models",
    "masks",
    "model_info",
    "models",
    "nn",
    "objectives",
    "ops",
    "tokenizers",
]


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"arcore.{name}")
    if name in _FROM_MODELS:
        return getattr(importlib.import_module("arcore.models"), name)
    if name in _FROM_MATMUL:
        return getattr(importlib.import_module("arcore.matmul"), name)
    raise AttributeError(f"module 'arcore' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBMODULES, *_FROM_MODELS, *_FROM_MATMUL})
