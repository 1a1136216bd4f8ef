"""Checks of the constructors' arguments: one sentence that names the argument, what was expected and what came."""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
from torch import Tensor

# Positions are stored as int32.
MAX_LENGTH = 2**31 - 1


def length(where: str, name: str, value: object, minimum: int = 0) -> int:
    """`value` as an int of at least `minimum` that int32 can hold."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(
            f"arcore.masks.{where}: expected {name} to be an integer but got {value!r} of type {type(value).__name__}"
        ) from None
    if not minimum <= number <= MAX_LENGTH:
        limit = f"at least {minimum}" if number < minimum else f"at most {MAX_LENGTH}"
        raise ValueError(f"arcore.masks.{where}: expected {name} to be {limit} but got {number}")
    return number


def lengths(where: str, name: str, values: object, minimum: int = 0) -> list[int]:
    """`values` as a list of ints of at least `minimum`, whose sum int32 can hold."""
    if isinstance(values, Tensor):
        if values.dim() != 1:
            raise ValueError(
                f"arcore.masks.{where}: expected {name} of shape [n] but got {tuple(values.shape)}"
            )
        values = values.tolist()
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(
            f"arcore.masks.{where}: expected {name} to be a sequence of integers but got {type(values).__name__}"
        )
    sizes = list(values)
    if not all(type(value) is int and value >= minimum for value in sizes):
        sizes = [length(where, f"{name}[{i}]", value, minimum) for i, value in enumerate(sizes)]
    if not sizes:
        raise ValueError(f"arcore.masks.{where}: expected {name} to hold at least one entry but it is empty")
    length(where, f"the sum of {name}", sum(sizes))
    return sizes


def numbers(where: str, name: str, x: object) -> Tensor:
    """`x`, an integer, a (nested) sequence of integers or an integer tensor, as an int64 tensor on the CPU."""
    if not isinstance(x, Tensor):
        try:
            x = torch.as_tensor(x, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{where}: expected {name} to be made of integers but got {x!r}") from error
        x = x.to(torch.int64) if x.numel() == 0 else x
    return integers(where, name, x)


def integers(where: str, name: str, x: object) -> Tensor:
    """`x`, a tensor of some integer dtype, as an int64 tensor on the CPU."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{where}: expected {name} to be an integer tensor but got {type(x).__name__}")
    if x.dtype == torch.bool or x.is_floating_point() or x.is_complex():
        got = str(x.dtype).removeprefix("torch.")
        raise TypeError(f"{where}: expected {name} of an integer dtype but got {got}")
    return x.detach().to(device="cpu", dtype=torch.int64)
