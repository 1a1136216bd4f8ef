"""Which tokens of a batch belong together: padding, and several sequences packed into a row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from arcore.masks import IntervalMask
from arcore.nn.checks import dtype_name


def packed_ids(
    ids: Tensor,
    *,
    mask: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor | None:
    """The sequence of each token.

    Args:
        ids: int64 `[B, L]`, whose shape counts.
        mask: bool `[B, L]`, False at padding.
        seq_idx: int32 `[B, L]`, which sequence of its row each token belongs to; negative means padding.
        cu_seqlens: `[S + 1]`, the same for a single row: starts of S sequences, and L.

    Returns:
        int32 `[B, L]`, negative at padding; None when every row is one sequence.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape is wrong, or both `seq_idx` and `cu_seqlens` are given.
    """
    if seq_idx is not None and cu_seqlens is not None:
        raise ValueError("expected seq_idx or cu_seqlens, not both")
    if cu_seqlens is not None:
        if len(ids) != 1 or cu_seqlens.dim() != 1:
            raise ValueError(
                f"expected cu_seqlens of shape [S + 1] with one row of ids but got {tuple(cu_seqlens.shape)} with "
                f"{len(ids)} rows; use seq_idx for several"
            )
        bounds = cu_seqlens.tolist()
        if not bounds or bounds != sorted(bounds) or (bounds[0], bounds[-1]) != (0, ids.shape[1]):
            raise ValueError(f"expected cu_seqlens to rise from 0 to {ids.shape[1]} but got {bounds}")
        places = torch.arange(ids.shape[1], device=ids.device)
        seq_idx = torch.bucketize(places, cu_seqlens[1:-1], right=True, out_int32=True).unsqueeze(0)
    for name, given in (("mask", mask), ("seq_idx", seq_idx)):
        if given is not None and given.shape != ids.shape:
            raise ValueError(f"expected {name} of shape {tuple(ids.shape)} but got {tuple(given.shape)}")
    if mask is None:
        return seq_idx
    if mask.dtype != torch.bool:
        raise TypeError(f"expected mask of dtype bool but got {dtype_name(mask.dtype)}")
    ones = torch.zeros_like(ids, dtype=torch.int32) if seq_idx is None else seq_idx
    return ones.masked_fill(~mask, -1)


class Packing(NamedTuple):
    """How causal attention reads a batch.

    Attributes:
        mask: tokens see those before them of their own sequence, and themselves.
        positions: int64 `[B, L]`, place of each token in its sequence, padding not counted.
    """

    mask: IntervalMask
    positions: Tensor


def causal_packing(sequence: Tensor, window: int | None = None) -> Packing:
    """The mask and the positions of packed or padded rows.

    Args:
        sequence: integers `[B, L]` from `packed_ids`, negative at padding; a sequence's tokens stand together, apart
            from padding between them.
        window: a token sees only as many places back, itself included; None for all.

    Raises:
        ValueError: a window over padding inside of a sequence, which is no range of keys.
    """
    batch, length = sequence.shape
    index = torch.arange(length, device=sequence.device).expand(batch, length)
    real = sequence >= 0
    # Padding continues the sequence before it, so that a gap does not split one.
    latest = torch.where(real, index, -1).cummax(1).values
    filled = sequence.gather(1, latest.clamp(min=0)).where(latest >= 0, -1)
    before = torch.cat([filled.new_full((batch, 1), -2), filled[:, :-1]], 1)
    start = torch.where(filled != before, index, 0).cummax(1).values
    count = real.long().cumsum(1)
    positions = (count - 1 - (count - real.long()).gather(1, start)).clamp(min=0)
    low = start
    if window is not None:
        if not torch.compiler.is_compiling() and bool((positions != index - start)[real].any()):
            raise ValueError("expected no padding between the tokens of a sequence with a sliding window")
        low = torch.maximum(start, index - (window - 1))
    bounds = torch.stack([low, index + 1], -1).where(real.unsqueeze(-1), 0).unsqueeze(1)
    seen_by = torch.tensor([0, length], device=sequence.device).where(real.unsqueeze(-1), 0)
    return Packing(IntervalMask(bounds, length, key_bounds=None if bool(real.all()) else seen_by), positions)
