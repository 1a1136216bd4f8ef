"""Argument checks that several modules make, with one wording."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arcore._kinds import came as came
from arcore._kinds import check_choice as check_choice
from arcore._kinds import check_whole as check_whole
from arcore._kinds import dtype_name as dtype_name
from arcore.ops._checks import autocasts


def check_floating(name: str, x: Tensor, like: Tensor, hint: str) -> None:
    """Raise TypeError unless x has the dtype of the weights `like`, or autocast will give it one.

    Args:
        name: of the argument.
        x: the argument.
        like: weights that it meets.
        hint: the way out for integers.
    """
    if not x.is_floating_point():
        raise TypeError(f"expected {name} of a floating dtype but got {dtype_name(x.dtype)}; {hint}")
    if x.dtype != like.dtype and not autocasts(x):
        raise TypeError(
            f"expected {name} of the weights' dtype {dtype_name(like.dtype)} but got {dtype_name(x.dtype)}"
        )


def check_ids(name: str, ids: Tensor, count: int, hint: str = "") -> None:
    """Raise unless `ids` are int64 in [0, count).

    The range is looked at on the CPU only: on a GPU that would wait for the device.
    """
    if ids.dtype != torch.int64:
        raise TypeError(f"expected {name} of dtype int64 but got {dtype_name(ids.dtype)}")
    if ids.is_cpu and not torch.compiler.is_compiling() and ids.numel():
        lowest, highest = (int(x) for x in ids.aminmax())
        if lowest < 0 or highest >= count:
            raise ValueError(
                f"expected {name} from 0 to {count - 1}{hint} but got {lowest if lowest < 0 else highest}"
            )


def check_patch_nums(patch_nums: Iterable[int]) -> tuple[int, ...]:
    """Side lengths of scales as a tuple; ValueError unless they are positive and grow."""
    sides = tuple(patch_nums)
    if not sides or sides[0] < 1 or any(a >= b for a, b in pairwise(sides)):
        raise ValueError(f"expected patch_nums to be growing side lengths, coarse to fine, but got {sides}")
    return sides


def check_image_sizes(config: Any, names: Iterable[str]) -> None:
    """Raise ValueError unless the named fields are positive and patches tile the image."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"expected {name} to be at least 1 but got {getattr(config, name)}")
    if config.image_size % config.patch_size:
        raise ValueError(
            f"expected patches that tile {config.image_size} x {config.image_size} values but got "
            f"patch_size={config.patch_size}"
        )


def check_text(name: str, value: object, hint: str = "") -> str:
    """`value`, which is a text.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(value, str):
        raise TypeError(f"expected {name} as a text{hint} but got {came(value)}")
    return value


def check_path(name: str, value: object) -> Path:
    """`value` as a path.

    Raises:
        TypeError: it is neither a text nor a path.
    """
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"expected {name} as a path but got {came(value)}")
    path = os.fspath(value)
    if not isinstance(path, str):
        raise TypeError(f"expected {name} as a path but got {came(value)}")
    return Path(path)


def check_tensor(name: str, value: object, hint: str = "") -> None:
    """Raise TypeError unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"expected {name} to be a tensor{hint} but got {came(value)}")


def check_sequence(name: str, value: object, of: str) -> None:
    """Raise TypeError unless `value` has a length and numbered items; a text and a table have none."""
    if (
        isinstance(value, str | bytes | Mapping)
        or not hasattr(value, "__len__")
        or not hasattr(value, "__getitem__")
    ):
        raise TypeError(f"expected {name} as a sequence of {of} but got {came(value)}")


def check_instance(name: str, value: object, kind: Any, hint: str = "") -> None:
    """Raise TypeError unless `value` is of a class or protocol."""
    if not isinstance(value, kind):
        raise TypeError(f"expected {name} to be a {kind.__name__} but got {came(value)}{hint}")


def check_number(name: str, value: object) -> float:
    """`value` as a finite float.

    Raises:
        TypeError: it is no number.
        ValueError: it is infinite or NaN.
    """
    if isinstance(value, bool | str | bytes) or not hasattr(value, "__float__"):
        raise TypeError(f"expected {name} to be a number but got {value!r}")
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"expected {name} to be a number but got {value!r}") from None
    if not math.isfinite(number):
        raise ValueError(f"expected {name} to be a finite number but got {number}")
    return number


def same_values(theirs: Tensor, ours: Tensor, *, rtol: float = 0.0, atol: float = 1e-5) -> bool:
    """Whether a table from a file is ours, up to the precision that it was stored in, now or before.

    Args:
        theirs: of any dtype, such as float16.
        ours: the table as it is computed here.
        rtol, atol: differences that other ways to compute the table make.

    Returns:
        False where shapes differ.
    """
    if theirs.shape != ours.shape:
        return False
    if theirs.is_floating_point():
        # A file of half precision that was converted back still has that precision.
        coarse = (torch.bfloat16, torch.float16)
        info = torch.finfo(
            next((d for d in coarse if torch.equal(theirs.to(d).to(theirs.dtype), theirs)), theirs.dtype)
        )
        # Rounding both to the file's dtype, and one more step, because they may stand on two sides of a tie.
        rtol, atol = max(rtol, 2 * info.eps), max(atol, 2 * info.smallest_normal * info.eps)
    return torch.allclose(theirs.double(), ours.double(), rtol=rtol, atol=atol)
