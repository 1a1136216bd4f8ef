"""Protocols whose attributes may be layers, parameters or buffers of a module."""

from __future__ import annotations

from typing import Any, Protocol

_ProtocolMeta: Any = type(Protocol)


class Offers(_ProtocolMeta):  # type: ignore[misc]
    """Metaclass of runtime-checkable protocols: an object offers what `hasattr` finds.

    From Python 3.12 on `isinstance` does not ask an object's `__getattr__`, by which `torch.nn.Module` gives its
    layers, parameters and buffers, and so denies that a model has them. Before, it did.
    """

    def __instancecheck__(cls, instance: Any) -> bool:
        if super().__instancecheck__(instance):
            return True
        names = getattr(cls, "__protocol_attrs__", ())
        return bool(names) and all(hasattr(instance, name) for name in names)
