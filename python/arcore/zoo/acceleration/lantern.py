"""LANTERN: drafts of image codes are accepted for their neighbours' probability too (arXiv:2410.03355).

Image tokenizers have many codes that look alike, so the model spreads its probability and drafts are rejected. LANTERN
lets a drafted code x also stand for its nearest codes, as long as these carry at most probability delta;
LANTERN++ bounds them by delta times the draft's own probability instead.

The loop is `arcore.decoding.speculative_tree` with `relaxed` verification; any drafter serves. Here are the paper's
settings and the check of what is and what is not bounded: delta bounds the relaxed target of *one* draft, not the law
of what is emitted. SJD is the lossless neighbour.

Left out: the paper's trained drafter (EAGLE's layer); a draft model or SJD's guesses take its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from arcore.catalog import System
from arcore.catalog.claims import Claim, at_least, at_most, equals
from arcore.decoding import (
    Drafter,
    ModelDrafter,
    SpeculativeOutput,
    TreeShape,
    exact,
    relaxed,
    speculative_tree,
)
from arcore.decoding.laws import small_model
from arcore.nn.protocols import DraftableModel
from arcore.ops import verify_relaxed
from arcore.ops.speculative import codebook_neighbours

SYSTEM = System(
    name="lantern",
    title="LANTERN",
    paper="arXiv:2410.03355",
    topic="acceleration",
    kind="decoder",
    builds_on=("llamagen",),
    ops=("speculative", "sample"),
    summary="Speculative decoding of image codes that accepts a draft for its neighbours in the codebook; lossy.",
    claim="At delta 0 nothing changes; acceptance rises with delta, which bounds one draft's target and not the law.",
    checked_on="synthetic data",
)

NEIGHBOURS, DELTA = 1000, 0.1


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


def claim(*, quick: bool) -> Claim:
    """One drawn draft against random codebooks, in closed form and by the op; exactness at delta 0 on texts."""
    vocab, count, near_count = 64, 20 if quick else 200, 10
    codes = torch.randn(vocab, 4)
    near = codebook_neighbours(codes, near_count)
    p = (1.5 * torch.randn(count, vocab)).softmax(-1)
    q = (p.log() + torch.randn(count, vocab)).softmax(-1)
    accepted, largest, emitted = {}, 0.0, {}
    for delta in (0.0, 0.05, 0.1, 0.2):
        target = relaxed_target(p, near, delta)
        own = target.diagonal(dim1=-2, dim2=-1)
        chance = (own / q).clamp(max=1.0)
        accepted[delta] = float((q * chance).sum(-1).mean())
        distance = 0.5 * (target - p.unsqueeze(-2)).abs().sum(-1).max()
        largest = max(largest, float(distance) - delta)
        rest = (target - q.unsqueeze(-2)).clamp(min=0)
        rest = rest / rest.sum(-1, keepdim=True).clamp(min=1e-30)
        law = q * chance + ((q * (1 - chance)).unsqueeze(-1) * rest).sum(-2)
        emitted[delta] = float(0.5 * (law - p).abs().sum(-1).mean())
    tries = 2000 if quick else 20000
    drafts = q[:1].expand(tries, -1).multinomial(1)
    found = verify_relaxed(
        torch.stack([p[:1], p[:1]], 1).expand(tries, 2, vocab).contiguous(),
        drafts,
        near,
        draft_probs=q[:1].unsqueeze(1).expand(tries, 1, vocab).contiguous(),
        seed=torch.arange(tries),
        offset=0,
        delta=0.1,
    )
    own = relaxed_target(p[:1], near, 0.1).diagonal(dim1=-2, dim2=-1)
    expected = float((q[:1] * (own / q[:1]).clamp(max=1)).sum())
    error = abs(float(found.accepted.double().mean()) - expected)
    model = small_model(11)
    drafter = ModelDrafter(small_model(11, seed=2, layers=1), shape=TreeShape.full(3, 2))
    texts = [
        speculative_tree(model, drafter, [[1, 2], [3]], max_new_tokens=30, seed=3, verify=verify).ids
        for verify in (exact(), relaxed(codebook_neighbours(torch.randn(11, 3), 5), delta=0.0))
    ]
    rises = min(b - a for a, b in pairwise(accepted.values()))
    return Claim(
        (
            equals("tokens that delta 0 changes", int((texts[0] != texts[1]).sum()), 0),
            at_most("total variation of the emitted law at delta 0", emitted[0.0], 1e-5),
            at_least("least rise of the acceptance from one delta to the next", rises, 0.0),
            at_least("acceptance at delta 0.2 over that at 0", accepted[0.2] / accepted[0.0], 1.2),
            at_most("excess of a relaxed target's total variation over delta", largest, 1e-5),
            at_least("total variation of the emitted law at delta 0.1: not bounded by it", emitted[0.1], 0.1),
            at_most("error of the op's acceptance rate", error, 4 * 0.5 / tries**0.5),
        )
    )
