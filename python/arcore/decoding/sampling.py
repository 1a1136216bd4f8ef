"""Drawing tokens from logits, in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def filter_logits(
    logits: Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Applies temperature, then top-k, then nucleus filtering; dropped logits become -inf.

    Args:
        logits: ``[..., V]``.
        temperature: divides the logits; > 0.
        top_k: keep the logits that are at least the k-th largest (ties are kept); None or >= V keeps all.
        top_p: keep the smallest set of most likely tokens whose mass reaches `top_p` in (0, 1]; the most likely one
            always stays; None keeps all.

    Returns:
        ``[..., V]`` in the dtype of `logits`.

    Raises:
        ValueError: a parameter is out of its range.
    """
    if not temperature > 0 or not math.isfinite(temperature):
        raise ValueError(f"expected temperature > 0 but got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"expected top_k >= 1 but got {top_k}; use None to keep all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"expected top_p in (0, 1] but got {top_p}")
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p is not None and top_p < 1:
        ascending, order = logits.sort(dim=-1)
        dropped = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        dropped[..., -1] = False
        logits = logits.masked_fill(dropped.scatter(-1, order, dropped), -math.inf)
    return logits


def row_generators(seed: int | Sequence[int], rows: int, device: torch.device | str = "cpu") -> list[torch.Generator]:
    """One random stream per row, so that what a row draws does not depend on the rows beside it.

    Args:
        seed: one number, from which each row's stream is derived with its index, or one number per row.
        rows: number of rows.
        device: where the logits lie.
    """
    if isinstance(seed, int):
        # Distinct odd multipliers keep (seed, row) pairs apart; the generator itself scrambles the bits.
        seeds = [(seed * 0x9E3779B97F4A7C15 + row * 0xD1B54A32D192ED03) % 2**63 for row in range(rows)]
    else:
        seeds = list(seed)
        if len(seeds) != rows:
            raise ValueError(f"expected one seed per row, {rows}, but got {len(seeds)}")
    return [torch.Generator(device).manual_seed(s) for s in seeds]


def sample_rows(logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """One token per position, each row from its own stream.

    Args:
        logits: ``[B, N, V]``, at least one finite logit per position.
        generators: one per row.

    Returns:
        int64 ``[B, N]``.
    """
    weights = logits.float().softmax(dim=-1)
    drawn = [torch.multinomial(w, 1, generator=g) for w, g in zip(weights, generators, strict=True)]
    return torch.cat(drawn, dim=1).T if drawn else logits.new_empty(logits.shape[:2], dtype=torch.int64)
