"""Images to discrete codes and back. Files load on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from arcore.tokenizers.multi_scale_vq import MultiScaleVQ, MultiScaleVQConfig, MultiScaleVQOutput

_FILES = {
    "multi_scale_vq": ("MultiScaleVQ", "MultiScaleVQConfig", "MultiScaleVQOutput"),
}

__all__ = ["MultiScaleVQ", "MultiScaleVQConfig", "MultiScaleVQOutput"]


def __getattr__(name: str) -> Any:
    for file, names in _FILES.items():
        if name in names:
            return getattr(importlib.import_module(f"arcore.tokenizers.{file}"), name)
    raise AttributeError(f"module 'arcore.tokenizers' has no attribute {name!r}")
