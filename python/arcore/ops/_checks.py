"""Checks of arguments that every op makes in the same words, in the public function and in its fake."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


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


class WrongValue(ValueError, RuntimeError):
    """A value in a tensor that an op cannot work with. Kernels find it; they can only raise a RuntimeError."""


def checked_call(kernel: Callable[..., Any], *args: Any) -> Any:
    """``kernel(*args)``, whose complaints about values in tensors become a `WrongValue` of the public function."""
    if torch.compiler.is_compiling():
        return kernel(*args)
    try:
        return kernel(*args)
    except RuntimeError as error:
        text = str(error).partition("\n")[0]
        if not text.startswith("arcore::") or ": expected " not in text:
            raise
        message = text.replace("arcore::", "arcore.", 1)
    raise WrongValue(message)
