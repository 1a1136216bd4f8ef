"""Between `IntervalMask` and FlexAttention's `BlockMask`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from arcore.masks import _spans
from arcore.masks._arguments import length

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from arcore.masks.interval_mask import IntervalMask

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Lookup = Callable[[Tensor, Tensor, Tensor], Tensor]

# Elements of mask_mod evaluated at once; bounds the extra memory.
_ELEMENTS_AT_ONCE = 1 << 22


def to_block_mask(mask: IntervalMask, block_size: int | tuple[int, int]) -> BlockMask:
    """See `IntervalMask.to_block_mask`."""
    from torch.nn.attention.flex_attention import BlockMask

    sizes = block_size if isinstance(block_size, tuple) else (block_size, block_size)
    if len(sizes) != 2:
        raise ValueError(f"arcore.masks.to_block_mask: expected one or two block sizes but got {block_size}")
    block_q, block_k = (length("to_block_mask", "block_size", size, 1) for size in sizes)
    if mask.nq == 0 or mask.nk == 0:
        raise ValueError(
            f"arcore.masks.to_block_mask: expected at least one query and one key but got {mask.nq} and {mask.nk}"
        )
    plan = mask.plan(block_q, block_k)
    columns = plan.col_order.shape[2]
    row = torch.arange(plan.order.numel(), device=mask.device).repeat_interleave(
        (plan.row_ptr[..., 1:] - plan.row_ptr[..., :-1]).flatten()
    )
    # Like create_block_mask, leave the check of blocks that reach over the end to mask_mod.
    whole = (row % plan.order.shape[2] < mask.nq // block_q) & (plan.col_idx < mask.nk // block_k)
    full = (plan.full == 1) & whole

    def lists(chosen: Tensor) -> tuple[Tensor, Tensor]:
        held = torch.zeros(plan.order.numel(), columns, dtype=torch.bool, device=mask.device)
        held[row[chosen], plan.col_idx[chosen]] = True
        held = held.view(*plan.order.shape, columns)
        indices = torch.argsort(held.to(torch.int8), dim=-1, descending=True, stable=True)
        return held.sum(-1, dtype=torch.int32), indices.to(torch.int32).contiguous()

    return BlockMask.from_kv_blocks(
        *lists(~full),
        *lists(full),
        BLOCK_SIZE=(block_q, block_k),
        mask_mod=_mask_mod(mask),
        seq_lengths=(mask.nq, mask.nk),
    )


def _mask_mod(mask: IntervalMask) -> MaskMod:
    lo, hi = _lookup(mask.bounds[..., 0]), _lookup(mask.bounds[..., 1])

    def in_range(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (kv >= lo(b, h, q)) & (kv < hi(b, h, q))

    allowed: MaskMod = in_range
    if mask.num_intervals == 2:
        lo2, hi2 = _lookup(mask.bounds[..., 2]), _lookup(mask.bounds[..., 3])

        def in_ranges(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return in_range(b, h, q, kv) | ((kv >= lo2(b, h, q)) & (kv < hi2(b, h, q)))

        allowed = in_ranges
    if mask.key_bounds is None:
        return allowed
    first, last = (_lookup(edge.unsqueeze(1)) for edge in mask.key_bounds.unbind(-1))

    def in_ranges_and_key_bounds(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return allowed(b, h, q, kv) & (q >= first(b, h, kv)) & (q < last(b, h, kv))

    return in_ranges_and_key_bounds


def _lookup(table: Tensor) -> Lookup:
    """Reads ``table[b, h, i]`` of a table ``[Bm, Hm, N]`` whose first two sizes may be 1."""
    one_batch, one_head = table.shape[0] == 1, table.shape[1] == 1
    if one_batch and one_head:
        shared = table[0, 0].contiguous()
        return lambda b, h, i: shared[i]
    if one_head:
        per_batch = table[:, 0].contiguous()
        return lambda b, h, i: per_batch[b, i]
    if one_batch:
        per_head = table[0].contiguous()
        return lambda b, h, i: per_head[h, i]
    own = table.contiguous()
    return lambda b, h, i: own[b, h, i]


def read_block_mask(block_mask: BlockMask) -> tuple[Tensor, int]:
    """Bounds ``[B, H, Nq, 4]`` and number of keys of the mask that `block_mask` stands for."""
    from torch.nn.attention.flex_attention import BlockMask

    where = "arcore.masks.from_block_mask"
    if not isinstance(block_mask, BlockMask):
        raise TypeError(f"{where}: expected a FlexAttention BlockMask but got {type(block_mask).__name__}")
    nq, nk = block_mask.seq_lengths
    block_q, block_k = block_mask.BLOCK_SIZE
    counts = block_mask.kv_num_blocks
    if counts.dim() != 3:
        raise ValueError(
            f"{where}: expected kv_num_blocks of shape [B, H, blocks] but got {tuple(counts.shape)}"
        )
    batch, heads = counts.shape[:2]

    parts = [_partial_ranges(block_mask)]
    if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
        b, h, m, n = _listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
        query = m.unsqueeze(1) * block_q + torch.arange(block_q, device="cpu")  # [blocks, block_q]
        row = ((b * heads + h) * nq).unsqueeze(1) + query
        lo = (n * block_k).unsqueeze(1).expand_as(query)
        real = query < nq
        parts.append((row[real], lo[real], (lo[real] + block_k)))
    row, lo, hi = (torch.cat(column) for column in zip(*parts, strict=True))
    bounds, count = _spans.unite(row, lo.clamp(max=nk), hi.clamp(max=nk), batch * heads * nq, nk)
    _spans.check_fits(count.view(batch, heads, nq), where)
    return bounds.view(batch, heads, nq, 4).to(counts.device), nk


def _partial_ranges(block_mask: BlockMask) -> tuple[Tensor, Tensor, Tensor]:
    """Runs of allowed keys in the blocks on which mask_mod decides: row, lo, hi."""
    from torch.nn.attention.flex_attention import create_mask

    nq, nk = block_mask.seq_lengths
    block_q, block_k = block_mask.BLOCK_SIZE
    heads = block_mask.kv_num_blocks.shape[1]
    device = block_mask.kv_num_blocks.device
    blocks = torch.stack(_listed(block_mask.kv_num_blocks, block_mask.kv_indices), -1)
    step = max(1, _ELEMENTS_AT_ONCE // (block_q * block_k))
    none = torch.zeros(0, dtype=torch.int64, device="cpu")
    parts = [(none, none, none)]
    for chunk in blocks.split(step) if len(blocks) else ():
        b, h, m, n = chunk.unbind(-1)
        table = chunk.to(device)

        def of_block(p: Tensor, _: Tensor, i: Tensor, j: Tensor, table: Tensor = table) -> Tensor:
            # mask_mod may look up tensors by position: do not ask it about positions after the end.
            query = (table[p, 2] * block_q + i).clamp(max=nq - 1)
            key = (table[p, 3] * block_k + j).clamp(max=nk - 1)
            return block_mask.mask_mod(table[p, 0], table[p, 1], query, key)

        allowed = create_mask(of_block, len(chunk), 1, block_q, block_k, device=device)[:, 0].cpu()
        allowed = allowed & (m.unsqueeze(1) * block_q + torch.arange(block_q, device="cpu") < nq).unsqueeze(2)
        allowed = allowed & (n.unsqueeze(1) * block_k + torch.arange(block_k, device="cpu") < nk).unsqueeze(1)
        edge = torch.nn.functional.pad(allowed, (1, 1))
        block, query, lo = (edge[..., 1:] & ~edge[..., :-1]).nonzero().unbind(-1)
        hi = (edge[..., :-1] & ~edge[..., 1:]).nonzero()[:, 2]
        row = (b * heads + h)[block] * nq + m[block] * block_q + query
        start = n[block] * block_k
        parts.append((row, start + lo, start + hi))
    row, lo, hi = (torch.cat(column) for column in zip(*parts, strict=True))
    return row, lo, hi


def _listed(num_blocks: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Batch, head, query block and key block of each entry of BlockMask's lists."""
    num_blocks, indices = num_blocks.cpu(), indices.cpu()
    valid = torch.arange(indices.shape[-1], device="cpu") < num_blocks.unsqueeze(-1)
    b, h, m, _ = valid.nonzero().unbind(-1)
    return b, h, m, indices[valid].to(torch.int64)
