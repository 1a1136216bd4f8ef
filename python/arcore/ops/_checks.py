"""Checks of arguments that every op makes in the same words, in the public function and in its fake."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for the device of a tensor; some devices, such as meta, have none."""
    kind = x.device.type
    # Before 2.12 the question whether there is one breaks the graph.
    return (kind in ("cpu", "cuda") or torch.amp.is_autocast_available(kind)) and torch.is_autocast_enabled(
        kind
    )


def same_device(op: str, **tensors: Tensor | Sequence[Tensor] | None) -> None:
    """Raise unless all `tensors` are tensors and lie where the first one does; None stands for one not given.

    torch runs an op's fake as soon as one argument is a meta tensor, so a check in the kernel alone is skipped then and
    memory that nobody wrote comes back. Public functions and fakes both call this.

    Args:
        op: how messages name the op, ``"arcore.sample"``.
        tensors: by the name of the argument; a sequence of tensors counts as one argument.

    Raises:
        TypeError: something else than a tensor.
        ValueError: a tensor on another device.
    """
    device = first = None
    for name, value in tensors.items():
        if value is None:
            continue
        for tensor in value if isinstance(value, (list, tuple)) else (value,):
            if not isinstance(tensor, Tensor):
                inside = "" if tensor is value else f" with {type(tensor).__name__}"
                raise TypeError(
                    f"{op}: expected {name} to be a tensor but got {type(value).__name__}{inside}; "
                    f"make one with torch.as_tensor({name})"
                )
            if device is None:
                device, first = tensor.device, name
            elif tensor.device != device:
                raise ValueError(
                    f"{op}: expected {name} on the device of {first}, {device}, but got {tensor.device}; "
                    f"move it with {name}.to('{device}')"
                )


def integer(op: str, name: str, value: Any) -> int:
    """`value` as an int; fractions, floats without one and bools are refused with a TypeError, not rounded."""
    if isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    if not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{op}: expected {name} to be an integer but got {value!r}; convert it with int({name})")


def int64(op: str, name: str, value: Any) -> int:
    """As `integer`, and it must fit into 64 bits: a ValueError else."""
    number = integer(op, name, value)
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{op}: expected {name} to fit into int64 but got {value}")
    return number


# What a call with unfit arguments may raise before it has changed anything, where a public function tries its op first
# and looks for the words only when the op refuses.
REFUSALS = (RuntimeError, TypeError, ValueError, AttributeError, IndexError)


class WrongValue(ValueError, RuntimeError):
    """A value in a tensor, or a layout, that an op cannot work with. Kernels find it and raise a RuntimeError."""


def checked_call(op: str, kernel: Callable[..., Any], *args: Any) -> Any:
    """``kernel(*args)`` for the public function `op`, in whose name the kernel's complaints are raised."""
    if torch.compiler.is_compiling():
        return kernel(*args)
    try:
        return kernel(*args)
    except RuntimeError as error:
        refused = in_words(op, error)
        if refused is error:
            raise
    raise refused


def in_words(op: str, error: Exception) -> Exception:
    """What the public function `op` raises where its kernel raised `error`.

    Complaints about arguments become a `WrongValue`. A tensor that torch could not make for a kernel is told as such:
    kernels reach torch through its stable interface, which names itself rather than the tensor.
    """
    text = str(error).partition("\n")[0]
    kernel, _, complaint = text.partition(": expected ")
    if complaint and kernel.startswith("arcore::"):
        return WrongValue(f"arcore.{op}: expected {complaint}")
    # From 2.14 on torch says which, before that it names its interface alone.
    told = "torch_call_dispatcher(" in text and "memory" in text
    if told or text.startswith(("torch_call_dispatcher(", "arcore: could not make a tensor")):
        return RuntimeError(
            f"arcore.{op}: torch could not make a tensor for the results or for scratch: they are larger than the "
            "memory that is left; work on fewer rows at a time"
        )
    return error
