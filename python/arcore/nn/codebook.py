"""What codebooks of image tokenizers share: the running use of codes, and the restart of dead ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

HIT_DECAY = 0.95


@torch.no_grad()
def record_use(
    use: Tensor,
    weight: Tensor,
    indices: Sequence[Tensor],
    vectors: Sequence[Tensor],
    *,
    restart_below: float,
) -> None:
    """Update the use of codes, and move dead ones onto vectors of the batch. No branch depends on data, so it compiles.

    Args:
        use: `[K, V]`, a running mean of how often each of K quantisers used each code per batch; written in place.
        weight: `[V, C]`, the codebook; written in place.
        indices: K tensors of int64 codes.
        vectors: K tensors `[B, N, C]`, what the codes stand for.
        restart_below: codes used less than this fraction of the average restart; 0 switches it off.
    """
    hits = torch.zeros_like(use)
    ones = hits.new_ones(())
    for k, codes in enumerate(indices):
        hits[k].scatter_add_(0, codes.flatten(), ones.expand(codes.numel()))
    several = dist.is_available() and dist.is_initialized()
    if several:
        dist.all_reduce(hits)
    use.lerp_(hits, 1 - HIT_DECAY)
    if not restart_below:
        return
    pool = torch.cat([v.flatten(0, 1) for v in vectors])
    fresh = pool[torch.randint(len(pool), (len(weight),), device=pool.device)]
    if several:
        dist.broadcast(fresh, src=0)
    total = use.sum(0)
    dead = total < restart_below * total.mean()
    weight.copy_(torch.where(dead.unsqueeze(1), fresh.to(weight.dtype), weight))
    # A restarted code counts as averagely used, so that it has time to find its place.
    average = use.mean(1, keepdim=True)
    use.copy_(torch.where(dead, average, use))
