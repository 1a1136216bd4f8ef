"""Why a call failed, in arcore's words: which argument does not fit, read from the traceback and from the docstring.

Everything here runs after an error, so a call that succeeds pays nothing for it.
"""

from __future__ import annotations

import functools
import inspect
import linecache
import re
import sys
from collections.abc import Iterator, Mapping
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# What is told anew; other errors, such as of files and of memory, are not about arguments.
TOLD = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_LEFT = (RecursionError, torch.OutOfMemoryError)
# Whose code an error may pass through and still be about arguments; a user's own function has its own errors.
_KNOWN = frozenset({"arcore", "torch", "numpy", "scipy", *sys.stdlib_module_names})
# What PyTorch says of the machine, of gradients and of files.
_NOT_OF_ARGUMENTS = re.compile(
    r"memory|CUDA error|cuBLAS|cuDNN|NCCL|does not require grad|grad_fn|backward through|gradient computation"
    r"|in-place|inplace|leaf [Vv]ariable|deterministic|vmap|functorch|[Bb]atching rule|state_dict|process group"
    r"|DataLoader|mmap|file|inference tensor",
)
_SHAPE = re.compile(r"`\[([^`]*?)\]`")
_DTYPE = re.compile(r"\b(int64|int32|uint8|bool|float\w*|any dtype)\b")
_WHOLE = frozenset({"int64", "bool"})
_SECTION = re.compile(r"^(?:Args|Arguments|Attributes):\s*$", re.MULTILINE)
_ENTRY = re.compile(r"^ {4}(\w+(?:, \w+)*): (.*)$")


class Failure(NamedTuple):
    """What a guard says of a failed call.

    Attributes:
        words: the message.
        kind: of the error.
        certain: whether one argument was found that does not fit.
    """

    words: str
    kind: type[Exception]
    certain: bool

    def error(self, root: BaseException) -> Exception:
        """The error to raise from the one that was met."""
        told = self.kind(self.words)
        told.told_of = (root, self.certain)  # type: ignore[attr-defined]
        return told


def told_of(error: BaseException) -> tuple[BaseException, bool]:
    """The error that a guard inside met, and whether that guard found the argument; the error itself where none did."""
    found: tuple[BaseException, bool] = getattr(error, "told_of", (error, False))
    return found


def raised_in(error: BaseException) -> str:
    """The module of arcore whose `raise` an error comes from, and which has said what is wrong; else nothing."""
    place = _last(error)
    if place is None or _package(place.tb_frame) != "arcore":
        return ""
    line = linecache.getline(place.tb_frame.f_code.co_filename, place.tb_lineno)
    return _module(place.tb_frame) if line.lstrip().startswith("raise") else ""


def is_of_call(error: BaseException) -> bool:
    """Whether Python refused the call itself: an argument is missing, or unknown."""
    place = error.__traceback__
    return isinstance(error, TypeError) and place is not None and place.tb_next is None


def is_foreign(error: BaseException, function: Any) -> bool:
    """Whether it came through code of others than who wrote the function, such as one that a user handed over."""
    known = _KNOWN | {function.__module__.partition(".")[0]}
    return any(_package(frame) not in known for frame in _frames(error))


def explained(function: Any, where: str, given: Mapping[str, Any], root: BaseException) -> Failure | None:
    """What to say of an error that PyTorch or Python raised while a public function ran; None: nothing better.

    Args:
        function: that was called, without its guard.
        where: its name, for the message.
        given: its arguments by name, without `self`.
        root: the error.
    """
    complaint = (
        _missing_attribute(function, given, root) or _by_docstring(function, given) or _by_layer(given, root)
    )
    if complaint is not None:
        kind = TypeError if isinstance(root, AttributeError) or "dtype" in complaint else ValueError
        return Failure(f"{where}: {complaint}", kind, True)
    if not _is_about_arguments(root, function):
        return None
    written = _written(function)
    came = "; ".join(
        f"{name}={_shown(value)}{_wanted(written.get(name)) if isinstance(value, Tensor) else ''}"
        for name, value in given.items()
    )
    says = " ".join(str(root).split("\n")[0].split())
    return Failure(
        f"{where}: expected arguments that fit each other and the settings but got {came}. The first that did not fit: "
        f"{says} ({type(root).__name__})",
        TypeError if isinstance(root, TypeError) else ValueError,
        False,
    )


def _last(error: BaseException) -> TracebackType | None:
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return place


def _frames(error: BaseException) -> Iterator[FrameType]:
    """From where it was raised outwards."""
    places = []
    place = error.__traceback__
    while place is not None:
        places.append(place.tb_frame)
        place = place.tb_next
    return reversed(places)


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _is_about_arguments(root: BaseException, function: Any) -> bool:
    if isinstance(root, _LEFT) or 'required "forward"' in str(root):
        return False
    if is_foreign(root, function) or any(
        re.search("_dynamo|_inductor", _module(frame)) for frame in _frames(root)
    ):
        return False
    if isinstance(root, RuntimeError):
        return not _NOT_OF_ARGUMENTS.search(str(root))
    return not isinstance(root, AttributeError)


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _missing_attribute(function: Any, given: Mapping[str, Any], root: BaseException) -> str | None:
    """An argument that lacks what is asked of it."""
    if not isinstance(root, AttributeError) or root.name is None:
        return None
    parameters = inspect.signature(function).parameters
    # None may be what was left out, and then it is not to blame.
    blamed = [
        name
        for name, value in given.items()
        if value is root.obj and (value is not None or parameters[name].default is not None)
    ]
    if len(blamed) != 1:
        return None
    kind = "None" if root.obj is None else f"a {type(root.obj).__name__}"
    return f"expected {blamed[0]} to have {root.name!r}, but {kind} has none"


class _Written(NamedTuple):
    """What a docstring says of a tensor: its shapes and its dtype."""

    shapes: tuple[str, ...]
    dtype: str | None


@functools.cache
def _written(function: Any) -> Mapping[str, _Written]:
    """What the docstring says of each argument; for `__init__`, that of the class."""
    doc = inspect.getdoc(function) or ""
    if function.__name__ == "__init__":
        owner: Any = sys.modules.get(function.__module__)
        for part in function.__qualname__.split(".")[:-1]:
            owner = getattr(owner, part, None)
        doc = inspect.getdoc(owner) or ""
    section = _SECTION.search(doc)
    found: dict[str, _Written] = {}
    if section is None:
        return found
    entries: list[tuple[str, list[str]]] = []
    for line in doc[section.end() :].splitlines():
        entry = _ENTRY.match(line)
        if line.strip() and not line.startswith(" "):
            break
        if entry:
            entries.append((entry[1], [entry[2]]))
        elif entries:
            entries[-1][1].append(line.strip())
    for names, lines in entries:
        text = " ".join(lines)
        shapes = tuple(dict.fromkeys(_SHAPE.findall(text)))
        dtypes = set(_DTYPE.findall(text.partition("`[")[0])) if shapes else set()
        if shapes:
            written = _Written(shapes, dtypes.pop() if len(dtypes & _WHOLE) == len(dtypes) == 1 else None)
            found.update(dict.fromkeys(names.split(", "), written))
    return found


def _wanted(written: _Written | None) -> str:
    return "" if written is None else f" for {' or '.join(f'[{shape}]' for shape in written.shapes)}"


@functools.cache
def ids_of(function: Any) -> frozenset[str]:
    """Arguments that the docstring says to be int64: ids, of which fractions would be cut off silently."""
    return frozenset(name for name, one in _written(function).items() if one.dtype == "int64")


def _by_docstring(function: Any, given: Mapping[str, Any]) -> str | None:
    """A tensor of another dtype or other axes than the docstring says."""
    known: dict[str, tuple[int, str]] = {}
    for name, written in _written(function).items():
        value = given.get(name)
        if not isinstance(value, Tensor):
            continue
        came = str(value.dtype).removeprefix("torch.")
        if written.dtype is not None and came != written.dtype:
            return f"expected {name} of dtype {written.dtype} but got {came}"
        shapes = [shape for shape in written.shapes if _fits_axes(shape, value)]
        if not shapes:
            wanted = " or ".join(f"[{shape}]" for shape in written.shapes)
            return f"expected {name} of shape {wanted} but got {tuple(value.shape)}"
        axes = _axes(shapes[0])
        if len(written.shapes) > 1 or "..." in axes:
            continue
        for axis, size in zip(axes, value.shape, strict=True):
            if axis.isidentifier():
                first = known.setdefault(axis, (size, name))
                if first[0] != size:
                    return (
                        f"expected {name} of shape [{shapes[0]}] with {axis}={first[0]}, as {first[1]} has, but got "
                        f"{tuple(value.shape)}"
                    )
    return None


def _axes(shape: str) -> list[str]:
    return [axis.strip() for axis in re.split(r",(?![^(]*\))", shape) if axis.strip()]


def _fits_axes(shape: str, value: Tensor) -> bool:
    axes = _axes(shape)
    if any("..." in axis for axis in axes):
        return value.dim() >= len(axes) - 1
    return value.dim() == len(axes) and all(
        int(axis) == size for axis, size in zip(axes, value.shape, strict=True) if axis.isdigit()
    )


def _by_layer(given: Mapping[str, Any], root: BaseException) -> str | None:
    """An argument that met a layer of another size: a table of embeddings, a linear layer, a convolution, a norm."""
    tensors = dict(_tensors(given))
    for frame in _frames(root):
        inside = frame.f_locals
        layer, x = inside.get("self"), inside.get("input", inside.get("x"))
        if not isinstance(x, Tensor):
            continue
        if frame.f_code.co_name == "embedding" and isinstance(inside.get("weight"), Tensor):
            count = inside["weight"].shape[0]
            for name, value in tensors.items():
                if not value.is_floating_point() and value.numel():
                    lowest, highest = (int(end) for end in value.aminmax())
                    if lowest < 0 or highest >= count:
                        got = lowest if lowest < 0 else highest
                        return f"expected {name} from 0 to {count - 1} but got {got}"
            return None
        size = _size_of_layer(layer, inside.get("weight"))
        if size is None:
            continue
        axis, wanted = size
        if x.dim() < abs(axis) or x.shape[axis] == wanted:
            continue
        for name, value in tensors.items():
            if value.is_floating_point() and value.dim() >= abs(axis) and value.shape[axis] == x.shape[axis]:
                place = "its last axis" if axis == -1 else "the axis of channels"
                return f"expected {name} with {wanted} values in {place} but got {tuple(value.shape)}"
        return None
    return None


def _tensors(given: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in given.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, list | tuple):
            yield from (
                (f"{name}[{place}]", one) for place, one in enumerate(value) if isinstance(one, Tensor)
            )


def _size_of_layer(layer: object, weight: object) -> tuple[int, int] | None:
    """The axis that a layer looks at, and how many values it takes there."""
    if isinstance(layer, nn.Linear):
        return -1, layer.in_features
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return -len(layer.kernel_size) - 1, layer.in_channels
    if isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) == 1:
        return -1, layer.normalized_shape[0]
    if layer is None and isinstance(weight, Tensor) and weight.dim() == 2:
        return -1, weight.shape[1]
    return None


def _shown(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, nn.Module) or callable(value):
        return f"a {type(value).__name__}"
    if isinstance(value, list | tuple | dict) and len(value) > 4:
        return f"a {type(value).__name__} of {len(value)}"
    shown = " ".join(repr(value).split())
    return shown if len(shown) <= 40 else shown[:40] + "..."
