"""Argument checks that several modules make, with one wording."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


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
    if x.dtype != like.dtype and not torch.is_autocast_enabled(x.device.type):
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
