"""Images to discrete codes and back: the classes of the systems of the topic "tokenizers", loaded on first use."""

from __future__ import annotations

from typing import Any

from arcore.catalog.lookup import class_named, class_names


def __getattr__(name: str) -> Any:
    return class_named(name, __name__, topic="tokenizers")


def __dir__() -> list[str]:
    return sorted({*globals(), *class_names(topic="tokenizers")})
