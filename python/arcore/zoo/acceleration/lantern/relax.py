"""Images by relaxed verification, and the relaxed targets written out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from arcore.decoding import Drafter, SpeculativeOutput, relaxed, speculative_tree
from arcore.nn.kinds import check_kinds
from arcore.nn.protocols import DraftableModel
from arcore.ops.speculative import codebook_neighbours

NEIGHBOURS, DELTA = 1000, 0.1


@check_kinds
def decode_image(
    model: DraftableModel,
    drafter: Drafter,
    codebook: Tensor,
    prompt: Tensor | Sequence[Sequence[int]],
    *,
    side: int,
    delta: float = DELTA,
    neighbours: int = NEIGHBOURS,
    multiplicative: bool = False,
    **options: Any,
) -> SpeculativeOutput:
    """The codes of a square image.

    Args:
        model: of the codes.
        drafter: proposes codes.
        codebook: `[V, z]`, the codes' vectors.
        prompt: what stands before the codes.
        side: codes of a side.
        delta: bound of the moved probability; 0 is exact.
        neighbours: codes that a draft may stand for.
        multiplicative: LANTERN++'s bound, delta times the draft's own probability.
        **options: those of `arcore.decoding.speculative_tree`.
    """
    near = codebook_neighbours(codebook, min(neighbours, len(codebook) - 1))
    verify = relaxed(near, delta=delta, bound="multiplicative" if multiplicative else "additive")
    return speculative_tree(model, drafter, prompt, max_new_tokens=side * side, verify=verify, **options)


@check_kinds
def relaxed_target(p: Tensor, near: Tensor, delta: float) -> Tensor:
    """The relaxed targets of every draft: float `[..., V, V]`, row x for draft x.

    Args:
        p: distributions `[..., V]`.
        near: `[V, k]`, nearest first.
        delta: bound of the moved probability.
    """
    vocab = p.shape[-1]
    of_near = p[..., near.long()]  # [..., V, k]
    moved = of_near * (of_near.cumsum(-1) <= delta)
    target = p.unsqueeze(-2).expand(*p.shape[:-1], vocab, vocab).clone()
    gone = torch.where(moved > 0, -of_near, 0.0)
    target.scatter_add_(-1, near.long().expand(*p.shape[:-1], *near.shape), gone)
    diagonal = torch.arange(vocab)
    target[..., diagonal, diagonal] += moved.sum(-1)
    return target
