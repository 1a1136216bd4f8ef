"""Transformer parts whose layer norms are modulated by a condition (adaptive layer norm, DiT, arXiv:2212.09748)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore.masks import IntervalMask
from arcore.nn.cache import KVCache
from arcore.nn.kinds import Axes, Features, Size, Tokens, check_kinds, explain_kinds

EPS = 1e-6


@explain_kinds
def modulated_norm(x: Features, scale: Tensor, shift: Tensor) -> Tensor:
    """Layer norm without learned weights, then `x * (1 + scale) + shift`.

    Args:
        x: `[B, N, C]`.
        scale, shift: broadcast to x, usually `[B, 1, C]`.
    """
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift


@check_kinds
class Modulation(nn.Module):
    """Linear map from a condition to the vectors that modulate a block.

    Args:
        cond_dim: width of the condition.
        dim: width C of the block.
        parts: number of vectors.
    """

    def __init__(self, cond_dim: Size, dim: Size, parts: Size) -> None:
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(cond_dim, parts * dim)

    def forward(self, cond: Features) -> tuple[Tensor, ...]:
        """`[B, cond_dim]` to `parts` tensors `[B, 1, C]`, or `[B, G, cond_dim]`, one per group, to `[B, G, 1, C]`."""
        vectors: Tensor = self.linear(F.silu(cond))
        return vectors.unsqueeze(-2).chunk(self.parts, dim=-1)


@explain_kinds
def modulate_once(cond: Tensor, cache: KVCache | None, make: Callable[[Tensor], list[Any]]) -> list[Any]:
    """What blocks make of a condition, once for all calls with one cache: while images are drawn it does not change.

    Args:
        cond: `[B, cond_dim]`.
        cache: keeps the result while cond stays the same and no gradients are recorded; None keeps nothing.
        make: from cond to one entry per block.
    """
    if cache is None or torch.is_grad_enabled():
        return make(cond)
    kept = cache.notes.get("modulation")
    if kept is None or not torch.equal(kept[0], cond):
        kept = cache.notes["modulation"] = (cond, make(cond))
    vectors: list[Any] = kept[1]
    return vectors


@check_kinds
class SharedModulation(nn.Module):
    """One linear map from the condition for all blocks; what a block adds of its own is a `ModulationTable`.

    Args:
        cond_dim: width of the condition.
        dim: width C of the blocks.
        parts: number of vectors.
    """

    def __init__(self, cond_dim: Size, dim: Size, parts: Size) -> None:
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(cond_dim, parts * dim)

    def forward(self, cond: Features) -> Tensor:
        """`[B, cond_dim]` to `[B, 1, parts, C]`."""
        vectors: Tensor = self.linear(F.silu(cond))
        out: Tensor = vectors.unflatten(-1, (self.parts, -1)).unsqueeze(-3)
        return out


@check_kinds
class ModulationTable(nn.Module):
    """The vectors of a block under a `SharedModulation`: a learned table added to the shared ones.

    Args:
        dim: width C of the block.
        parts: number of vectors.
    """

    def __init__(self, dim: Size, parts: Size) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 1, parts, dim) / dim**0.5)

    def forward(self, shared: Tensor) -> tuple[Tensor, ...]:
        """`[B, 1, parts, C]`, from `SharedModulation`, to `parts` tensors `[B, 1, C]`."""
        return (self.table + shared).unbind(-2)


@check_kinds
class DropPath(nn.Module):
    """Leaves a residual branch out for a random part of the batch while training (stochastic depth).

    Args:
        rate: probability that a row loses the branch; kept rows grow by 1 / (1 - rate).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"arcore.nn.DropPath: expected 0 <= rate < 1 but got {rate}")
        self.rate = rate

    def forward(self, x: Annotated[Tensor, Axes("B ...")]) -> Tensor:
        """`[B, ...]` to the same shape."""
        if self.rate == 0.0 or not self.training:
            return x
        keep = torch.rand(x.shape[0], *[1] * (x.dim() - 1), device=x.device) >= self.rate
        return x * keep.to(x.dtype) / (1.0 - self.rate)


@check_kinds
class AdaLNBlock(nn.Module):
    """Pre-norm transformer block: attention and feed-forward, each modulated and gated by the condition.

    `x += gate1 * Attn(LN(x) (1 + scale1) + shift1)`, then `x += gate2 * FFN(LN(x) (1 + scale2) + shift2)`. The six
    vectors come from one `Modulation` in the order gate1, gate2, scale1, scale2, shift1, shift2.

    Args:
        dim: width C.
        cond_dim: width of the condition.
        attn: module called as `attn(x, mask, cache, layer)`.
        ffn: module from `[B, N, C]` to `[B, N, C]`.
        drop_path: rate of `DropPath` on both branches.
        shared: the condition comes from a `SharedModulation`, and the block has a table of its own.
    """

    def __init__(
        self,
        dim: Size,
        cond_dim: Size,
        *,
        attn: nn.Module,
        ffn: nn.Module,
        drop_path: float = 0.0,
        shared: bool = False,
    ) -> None:
        super().__init__()
        self.attn = attn
        self.ffn = ffn
        self.modulation = ModulationTable(dim, parts=6) if shared else Modulation(cond_dim, dim, parts=6)
        self.drop_path = DropPath(drop_path)

    def forward(
        self,
        x: Tokens,
        cond: Annotated[Tensor, Axes("B D", floating=True)] | tuple[Tensor, ...],
        mask: IntervalMask,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """Apply the block.

        Args:
            x: `[B, N, C]`.
            cond: `[B, cond_dim]`, or `[B, 1, 6, C]` where the modulation is shared; or what `self.modulation`
                made of it.
            mask, cache, layer: see `SelfAttention.forward`.

        Returns:
            `[B, N, C]`.
        """
        vectors = self.modulation(cond) if isinstance(cond, Tensor) else cond
        gate1, gate2, scale1, scale2, shift1, shift2 = vectors
        attended = self.attn(modulated_norm(x, scale1, shift1), mask, cache, layer)
        x = x + self.drop_path(gate1 * attended)
        x = x + self.drop_path(gate2 * self.ffn(modulated_norm(x, scale2, shift2)))
        return x


@check_kinds
class AdaLNHead(nn.Module):
    """Modulated norm and the last linear layer.

    Args:
        dim: width C.
        cond_dim: width of the condition.
        out_dim: outputs per token.
    """

    def __init__(self, dim: Size, cond_dim: Size, out_dim: Size) -> None:
        super().__init__()
        self.modulation = Modulation(cond_dim, dim, parts=2)
        self.linear = nn.Linear(dim, out_dim)

    def forward(self, x: Features, cond: Features) -> Tensor:
        """`[B, N, C]` and `[B, cond_dim]` to float32 `[B, N, out_dim]`."""
        # Logits need float32 also under autocast.
        with torch.autocast(x.device.type, enabled=False):
            scale, shift = self.modulation(cond.to(self.linear.weight.dtype))
            out: Tensor = self.linear(modulated_norm(x.to(scale.dtype), scale, shift))
        return out.float()
