"""`TilePlan`: which tiles of a mask hold an allowed pair, so that kernels touch nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from arcore import _C
from arcore._kinds import Size, check_kinds

if TYPE_CHECKING:
    from arcore.masks.interval_mask import IntervalMask


@dataclass(frozen=True, eq=False)
class TilePlan:
    """The tiles that hold at least one allowed pair, by rows and by columns of the tile grid.

    Rows of the grid are query tiles, columns key tiles: ``Tq = ceil(Nq / tile_q)``, ``Tk = ceil(Nk / tile_k)``; the
    last tile of a side may reach over the end. All tensors are int32. The tiles of query tile m of (batch b, head h)
    are ``col_idx[row_ptr[b, h, m] : row_ptr[b, h, m + 1]]``, in ascending order.

    Attributes:
        tile_q, tile_k: queries and keys per tile.
        row_ptr: ``[Bm, Hm, Tq + 1]``, positions in `col_idx`, counted over the whole grid.
        col_idx: ``[T]``, key tiles.
        full: ``[T]``, 1 where every pair of the tile (within Nq x Nk) is allowed, so that bounds need not be read.
        order: ``[Bm, Hm, Tq]``, query tiles with the longest list first, ties in ascending order.
        col_ptr, row_idx, col_full, col_order: the same by columns: ``[Bm, Hm, Tk + 1]``, ``[T]``, ``[T]`` and
            ``[Bm, Hm, Tk]``.
    """

    tile_q: int
    tile_k: int
    row_ptr: Tensor
    col_idx: Tensor
    full: Tensor
    order: Tensor
    col_ptr: Tensor
    row_idx: Tensor
    col_full: Tensor
    col_order: Tensor

    @property
    def num_tiles(self) -> int:
        """Number of tiles that hold an allowed pair, over batch and heads."""
        return self.col_idx.numel()

    def __repr__(self) -> str:
        batch, heads, columns = self.col_order.shape
        total = batch * heads * columns * self.order.shape[2]
        full = int(self.full.sum())
        return f"TilePlan({self.tile_q}x{self.tile_k}, {self.num_tiles} of {total} tiles, {full} full)"


def compute_tile_plan(mask: IntervalMask, tile_q: int, tile_k: int) -> TilePlan:
    """The plan of `mask`, on its device; computed on the CPU by csrc/common/tile_plan.h."""
    bounds = mask.bounds.cpu()
    key_bounds = None if mask.key_bounds is None else mask.key_bounds.cpu()
    found = _C.tile_plan(
        bounds=bounds.data_ptr(),
        bounds_batch=bounds.shape[0],
        heads=mask.heads,
        nq=mask.nq,
        intervals=mask.num_intervals,
        key_bounds=0 if key_bounds is None else key_bounds.data_ptr(),
        key_bounds_batch=1 if key_bounds is None else key_bounds.shape[0],
        nk=mask.nk,
        tile_q=tile_q,
        tile_k=tile_k,
    )
    rows, columns = _cdiv(mask.nq, tile_q), _cdiv(mask.nk, tile_k)
    sizes = {"row_ptr": rows + 1, "order": rows, "col_ptr": columns + 1, "col_order": columns}
    with torch.inference_mode(False):
        tensors = {name: _int32(buffer).to(mask.device) for name, buffer in found.items()}
    for name, size in sizes.items():
        tensors[name] = tensors[name].view(mask.batch, mask.heads, size)
    return TilePlan(tile_q, tile_k, **tensors)


@check_kinds
def reference_tile_plan(mask: IntervalMask, tile_q: Size, tile_k: Size) -> TilePlan:
    """The same plan in plain PyTorch from `to_bool`, O(Nq * Nk) memory; the oracle of the tests."""
    allowed = mask.to_bool()
    nq, nk = mask.nq, mask.nk
    rows, columns = _cdiv(nq, tile_q), _cdiv(nk, tile_k)

    def per_tile(pairs: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(pairs, (0, columns * tile_k - nk, 0, rows * tile_q - nq))
        return padded.view(*pairs.shape[:2], rows, tile_q, columns, tile_k).sum((3, 5))

    count = per_tile(allowed.int())
    held = count > 0
    full = count == per_tile(torch.ones(1, 1, nq, nk, dtype=torch.int32, device=mask.device))

    def lists(held: Tensor, full: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        size = held.sum(-1)
        total = size.sum(-1)
        before = total.flatten().cumsum(0).view_as(total) - total
        ptr = torch.nn.functional.pad(size.cumsum(-1), (1, 0)) + before.unsqueeze(-1)
        order = torch.argsort(size, dim=-1, descending=True, stable=True)
        return ptr, held.nonzero()[:, 3], full[held], order

    by_row = lists(held, full)
    by_column = lists(held.transpose(2, 3), full.transpose(2, 3))
    return TilePlan(tile_q, tile_k, *(x.to(torch.int32) for x in (*by_row, *by_column)))


def _int32(buffer: bytearray) -> Tensor:
    return torch.frombuffer(buffer, dtype=torch.int32) if buffer else torch.empty(0, dtype=torch.int32)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
