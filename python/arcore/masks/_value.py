"""The base of the masks: a value, frozen after construction, compared and hashed by content."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
V = TypeVar("V", bound="Value")


class Value:
    """Immutable, equal by content, hashable, picklable; a copy is the object itself.

    A subclass names the constructor arguments that hold its content in `_CONTENT`, a tensor first, and those that are
    only decoration in `_DECORATION`; each is an attribute of that name. What can be computed from the content is kept
    by `_cached`, which neither comparison nor pickling sees.
    """

    __slots__ = ("__weakref__", "_cache")
    _CONTENT: tuple[str, ...] = ()
    _DECORATION: tuple[str, ...] = ()
    _cache: dict[Any, Any]

    def _freeze(self, **attributes: Any) -> None:
        for name, value in attributes.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "_cache", {})

    def _cached(self, key: Any, compute: Callable[[], T]) -> T:
        if key not in self._cache:
            self._cache[key] = compute()
        value: T = self._cache[key]
        return value

    @property
    def device(self) -> torch.device:
        """Where the tensors lie."""
        tensor: Tensor = getattr(self, self._CONTENT[0])
        return tensor.device

    def to(self: V, device: torch.device | str) -> V:
        """This mask on `device`, itself if it is there already. The copy is kept, so repeating the call is free."""
        wanted = torch.empty(0, device=device).device
        if wanted == self.device:
            return self
        return self._cached(("to", wanted), lambda: self._moved(wanted))

    def _moved(self: V, device: torch.device) -> V:
        moved = object.__new__(type(self))
        names = type(self).__slots__
        values = {name: getattr(self, name) for name in names}
        with torch.inference_mode(False):
            moved._freeze(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in values.items()})
        return moved

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise AttributeError(
            f"{type(self).__name__} is immutable: cannot set {name!r}; build a new mask instead"
        )

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"{type(self).__name__} is immutable: cannot delete {name!r}")

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if type(other) is not type(self):
            return NotImplemented
        return all(_same(getattr(self, name), getattr(other, name)) for name in self._CONTENT)

    def __hash__(self) -> int:
        def compute() -> int:
            return hash((type(self), *(_key(getattr(self, name)) for name in self._CONTENT)))

        return self._cached("hash", compute)

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = {name: getattr(self, name) for name in (*self._CONTENT, *self._DECORATION)}
        return _restore, (type(self), arguments)

    def __copy__(self: V) -> V:
        return self

    def __deepcopy__(self: V, memo: dict[int, Any]) -> V:
        return self


def _restore(cls: Callable[..., T], arguments: dict[str, Any]) -> T:
    return cls(**arguments)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.device == b.device and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)


def _key(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    host = x.cpu().contiguous()
    return tuple(x.shape), ctypes.string_at(host.data_ptr(), host.numel() * host.element_size())
