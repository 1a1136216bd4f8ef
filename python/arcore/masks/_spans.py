"""Arithmetic on half-open ranges, vectorised over rows.

Normal form: the ranges of a row are sorted, disjoint and not adjacent; absent ranges are (0, 0) and come last.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_RANGES = 2


def unite(row: Tensor, lo: Tensor, hi: Tensor, num_rows: int, nk: int) -> tuple[Tensor, Tensor]:
    """Unions of key ranges in normal form.

    Args:
        row, lo, hi: int64 ``[n]``; range i, ``[lo[i], hi[i])`` within ``[0, nk]``, belongs to row ``row[i]``. In any
            order; ranges may overlap, touch or be empty.
        num_rows: number of rows.
        nk: number of keys.

    Returns:
        int32 ``[num_rows, 4]``, the first two ranges of each row, and int64 ``[num_rows]``, how many it has.
    """
    present = lo < hi
    row, lo, hi = row[present], lo[present], hi[present]
    # One number line for all rows; a row's stretch is one point longer than its keys, so two rows never touch.
    base = row * (nk + 1)
    start, by = torch.sort(base + lo)
    reach = torch.cummax((base + hi)[by], 0).values
    opens = torch.ones_like(start, dtype=torch.bool)
    opens[1:] = start[1:] > reach[:-1]
    closes = torch.ones_like(opens)
    closes[:-1] = opens[1:]
    start, stop = start[opens], reach[closes]

    row = start.div(nk + 1, rounding_mode="floor")
    count = torch.bincount(row, minlength=num_rows)
    place = torch.arange(row.numel(), device=row.device) - (count.cumsum(0) - count)[row]
    fits = place < MAX_RANGES
    bounds = torch.zeros(num_rows, MAX_RANGES, 2, dtype=torch.int32, device=row.device)
    ranges = torch.stack([start, stop], -1) - (row * (nk + 1)).unsqueeze(-1)
    bounds[row[fits], place[fits]] = ranges[fits].to(torch.int32)
    return bounds.flatten(1), count


def allowed_pairs(bounds: Tensor, key_bounds: Tensor | None, queries: Tensor, keys: Tensor) -> Tensor:
    """Which of the pairs queries x keys are allowed.

    Args:
        bounds: ``[..., R, 2 * I]``, the key ranges of the queries.
        key_bounds: ``[..., C, 2]``, the query ranges of the keys, or None.
        queries, keys: int ``[R]`` and ``[C]``, positions.

    Returns:
        bool ``[..., R, C]``.
    """
    allowed = (keys >= bounds[..., 0:1]) & (keys < bounds[..., 1:2])
    if bounds.shape[-1] == 4:
        allowed |= (keys >= bounds[..., 2:3]) & (keys < bounds[..., 3:4])
    if key_bounds is not None:
        lo, hi = key_bounds.unsqueeze(-3).unbind(-1)  # [..., 1, C]
        position = queries.unsqueeze(-1)
        allowed = allowed & (position >= lo) & (position < hi)
    return allowed


def name_row(index: int, batch: int, heads: int, rows: int) -> str:
    """ "row 5", with batch and head where there are several; `index` counts through [batch, heads, rows]."""
    parts = [f"batch {index // (heads * rows)}"] if batch > 1 else []
    parts += [f"head {index // rows % heads}"] if heads > 1 else []
    return ", ".join([*parts, f"row {index % rows}"])


def check_fits(count: Tensor, where: str) -> None:
    """Raises a ValueError that names the first row with more than two ranges; `count` is ``[B, H, Nq]``."""
    bad = count.flatten() > MAX_RANGES
    if bad.any():
        first = int(bad.nonzero()[0])
        raise ValueError(
            f"{where}: expected at most {MAX_RANGES} key ranges per row but "
            f"{name_row(first, *count.shape)} has {int(count.flatten()[first])}; an IntervalMask cannot hold this mask"
        )
