"""What the loops share: a seed for every row, and settings refused before a model runs."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from arcore.nn.checks import check_whole
from arcore.schedules import NoiseSchedule


def row_seeds(seed: int | Sequence[int], batch: int, device: torch.device | str = "cpu") -> Tensor:
    """The seed of each row, for `arcore.ops.sample`.

    Args:
        seed: a number, from which row i gets a seed derived from (seed, i); or one number per row, used as it is.
        batch: rows.
        device: of the result.

    Returns:
        int64 `[batch]`. Row i is the same for every batch larger than i.

    Raises:
        TypeError: a seed is no whole number.
        ValueError: another number of seeds than rows, or one that has more than 64 bits.
    """
    batch = check_whole("batch", batch, 0)
    given: Any = seed
    if hasattr(given, "__index__") and not getattr(given, "ndim", 0):
        number = check_whole("seed", given, -(2**127))
        seeds = [_derive(number, row) for row in range(batch)]
    else:
        if isinstance(given, str | bytes) or not hasattr(given, "__iter__"):
            raise TypeError(f"expected seed to be a whole number, or one per row, but got {seed!r}")
        seeds = [check_whole("seed", one, -(2**127)) for one in given]
        if len(seeds) != batch:
            raise ValueError(f"expected one seed, or {batch} of them, one per row, but got {len(seeds)}")
        if any(not -(2**63) <= one < 2**63 for one in seeds):
            raise ValueError(f"expected seeds of rows from -2^63 to 2^63 - 1 but got {seeds}")
    return torch.tensor(seeds, dtype=torch.int64, device=device)


class RowNormals:
    """Standard normal or Gumbel numbers, each row's from a generator of its own.

    They are drawn on the CPU, so that a GPU sees the same ones.

    Args:
        seeds: int64 `[batch]`, from `row_seeds`.
    """

    def __init__(self, seeds: Tensor) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]

    def draw(self, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        """The next numbers of every row, float32 `[batch, *shape]`."""
        out = torch.empty(len(self._generators), *shape, device="cpu")
        for row, generator in zip(out, self._generators, strict=True):
            row.normal_(generator=generator)
        return out.to(device)

    def draw_gumbel(self, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        """The next standard Gumbel numbers of every row, float32 `[batch, *shape]`, finite."""
        out = torch.empty(len(self._generators), *shape, device="cpu")
        for row, generator in zip(out, self._generators, strict=True):
            row.exponential_(generator=generator)
        return -out.clamp_(min=torch.finfo(torch.float32).tiny).log_().to(device)


def _derive(seed: int, row: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{row}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def check_grid(schedule: NoiseSchedule, times: Tensor, *, ends_clean: bool = True) -> None:
    """Refuses times of a sampler that do not decrease, with `ends_clean` to clean data.

    Raises:
        TypeError: a wrong dtype.
        ValueError: fewer than two times, times outside the schedule, or times in another order.
    """
    if not isinstance(times, Tensor):
        raise TypeError(f"expected times to be a tensor but got {type(times).__name__}")
    schedule.check_times("times", times)
    if times.dim() != 1 or len(times) < 2 or bool((times.diff() >= 0).any()):
        raise ValueError(f"expected times that decrease, at least two, but got {times.tolist()}")
    if ends_clean and times[-1] != schedule.clean:
        raise ValueError(
            f"expected times that end clean, at {schedule.clean:g}, but the last one is {times[-1].item():g}"
        )


def check_settings(
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> None:
    """Refuses what `arcore.ops.sample` refuses.

    Raises:
        TypeError: a setting is no number.
        ValueError: a setting is out of range.
    """
    for name, value in (("temperature", temperature), ("top_p", top_p), ("min_p", min_p)):
        if value is None and name != "temperature":
            continue
        if isinstance(value, bool | str) or not hasattr(value, "__float__"):
            raise TypeError(f"expected {name} to be a number but got {value!r}")
    if top_k is not None and (isinstance(top_k, bool) or not hasattr(top_k, "__index__")):
        raise TypeError(f"expected top_k to be a whole number but got {top_k!r}")
    if not 0.0 <= temperature < math.inf:
        raise ValueError(f"expected a finite temperature >= 0 but got {temperature}")
    if top_k is not None and top_k < -1:
        raise ValueError(f"expected top_k >= -1 but got {top_k}; None, 0 and -1 keep all tokens")
    if top_p is not None and not 0.0 <= top_p <= 1.0:
        raise ValueError(f"expected 0 <= top_p <= 1 but got {top_p}; None keeps all tokens")
    if min_p is not None and not 0.0 <= min_p <= 1.0:
        raise ValueError(f"expected 0 <= min_p <= 1 but got {min_p}; None keeps all tokens")
