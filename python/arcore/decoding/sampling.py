"""Drawing tokens from logits.

Each row of a batch has its own generator, keyed by its own seed, and each draw takes one uniform number (inverse of
the cumulative distribution). What a row gets therefore depends neither on the other rows nor on its place in the
batch, as far as the logits themselves do not.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor


class RowSeeds:
    """One random generator per row.

    The numbers are drawn on the CPU, so that a GPU sees the same ones.

    Args:
        seed: a number, from which row i gets a seed derived from (seed, i); or one number per row.
        batch: rows.

    Raises:
        ValueError: another number of seeds than rows.
    """

    def __init__(self, seed: int | Sequence[int], batch: int) -> None:
        if isinstance(seed, int):
            seeds = [derive_seed(seed, row) for row in range(batch)]
        else:
            if len(seed) != batch:
                raise ValueError(f"expected one seed, or {batch} of them, one per row, but got {len(seed)}")
            seeds = [derive_seed(int(one)) for one in seed]
        self._generators = [torch.Generator().manual_seed(one) for one in seeds]

    def uniforms(self, count: int, device: torch.device | str = "cpu") -> Tensor:
        """The next `count` numbers of every row, float64 `[B, count]` in [0, 1)."""
        rows = [torch.rand(count, generator=g, dtype=torch.float64, device="cpu") for g in self._generators]
        return (
            torch.stack(rows).to(device)
            if rows
            else torch.empty(0, count, dtype=torch.float64, device=device)
        )


def derive_seed(*keys: int) -> int:
    """A 63-bit seed of some numbers; other numbers give unrelated seeds."""
    digest = hashlib.blake2b("/".join(map(str, keys)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def filter_logits(
    logits: Tensor, *, top_k: int | None = None, top_p: float | None = None, min_p: float | None = None
) -> Tensor:
    """Set unlikely tokens to -inf: all but the `top_k` best, then the tail outside `top_p`, then those below `min_p`.

    Args:
        logits: `[..., V]`.
        top_k: keeps every logit that is at least the k-th largest, ties included; None keeps all.
        top_p: drops, from the least likely upwards, tokens whose probabilities add up to at most `1 - top_p`; the
            likeliest always stays. None keeps all.
        min_p: drops tokens less likely than `min_p` times the likeliest. None keeps all.

    Returns:
        `[..., V]`, a new tensor where something was dropped.

    Raises:
        ValueError: `top_k` is below 1, `top_p` not in (0, 1] or `min_p` not in [0, 1].
    """
    if top_k is not None and top_k < 1:
        raise ValueError(f"expected top_k >= 1 but got {top_k}; None keeps all tokens")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"expected 0 < top_p <= 1 but got {top_p}; None keeps all tokens")
    if min_p is not None and not 0.0 <= min_p <= 1.0:
        raise ValueError(f"expected 0 <= min_p <= 1 but got {min_p}; None keeps all tokens")
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    if top_p is not None and top_p < 1.0:
        ascending, order = logits.sort(dim=-1, stable=True)
        dropped = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1.0 - top_p
        dropped[..., -1] = False
        logits = logits.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), -math.inf)
    if min_p:
        least = logits.amax(dim=-1, keepdim=True) + math.log(min_p)
        logits = logits.masked_fill(logits < least, -math.inf)
    return logits


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens that occurred before less likely (arXiv:1909.05858, section 4.1, in the form in common use).

    Args:
        logits: `[..., V]`.
        seen: bool, broadcast to logits: which tokens occurred.
        penalty: positive logits of seen tokens are divided by it, negative ones multiplied; 1 changes nothing.

    Returns:
        `[..., V]`, a new tensor.

    Raises:
        ValueError: the penalty is not positive.
    """
    if not penalty > 0:
        raise ValueError(f"expected penalty > 0 but got {penalty}; 1 changes nothing")
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def sample(
    logits: Tensor,
    uniforms: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """Draw one token per position.

    Args:
        logits: `[B, N, V]`.
        uniforms: float64 `[B, N]` in [0, 1), one per draw, e.g. of `RowSeeds`.
        temperature: divides the logits before anything else; 0 takes the likeliest token.
        top_k, top_p, min_p: see `filter_logits`.

    Returns:
        int64 `[B, N]`.

    Raises:
        ValueError: a setting is out of range or shapes do not fit.
    """
    if logits.shape[:-1] != uniforms.shape:
        raise ValueError(
            f"expected uniforms of shape {tuple(logits.shape[:-1])} but got {tuple(uniforms.shape)}"
        )
    if not 0.0 <= temperature < math.inf:
        raise ValueError(f"expected a finite temperature >= 0 but got {temperature}")
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    kept = filter_logits(logits.float() / temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    cumulative = kept.double().softmax(dim=-1).cumsum(dim=-1)
    total = cumulative[..., -1:]
    # Strictly below the total, so that the search cannot run past the last token of positive probability.
    level = torch.minimum(uniforms.unsqueeze(-1) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, level, right=True).squeeze(-1)
