"""HMAR's claim: the mask, passes and steps, and what they cost."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence

import torch

from arcore import masks
from arcore.catalog.claims import Claim, at_least, at_most, equals, shaken
from arcore.masks import IntervalMask
from arcore.ops import block_sparse_attention
from arcore.zoo.next_scale.hmar.model import HMAR, HMARConfig
from arcore.zoo.next_scale.hmar.schedule import SIDES_256, SIDES_512, SIDES_1024
from arcore.zoo.next_scale.var import VAR, VARConfig


def _pairs(mask: IntervalMask) -> int:
    return mask.num_pairs


def _attention_seconds(sides: Sequence[int], repeats: int = 5) -> list[float]:
    """Median process time of forward and backward of two heads under VAR's mask and under HMAR's, in turns."""
    length = sum(side * side for side in sides)
    seconds: list[list[float]] = [[], []]
    both = (masks.next_scale(sides), masks.next_scale_markov(sides))
    for turn in range(repeats + 1):
        for times, mask in zip(seconds, both, strict=True):
            q, k, v = (torch.randn(1, 2, length, 64, requires_grad=True) for _ in range(3))
            gradient = torch.randn(1, 2, length, 64)
            start = time.process_time()
            with torch.enable_grad():
                torch.autograd.grad(block_sparse_attention(q, k, v, mask), (q, k, v), gradient)
            if turn:
                times.append(time.process_time() - start)
    return [statistics.median(times) for times in seconds]


@torch.no_grad()
def _passes_seconds(sides: Sequence[int]) -> list[float]:
    """Process time of all passes of one image by two blocks of d16's shape, of VAR with its cache and of HMAR."""
    both = [
        VAR(VARConfig(depth=2, embed_dim=1024, num_heads=16, patch_nums=tuple(sides))).eval(),
        HMAR(
            HMARConfig(
                depth=2, embed_dim=1024, num_heads=16, patch_nums=tuple(sides), tail=1, refinement=False
            )
        ).eval(),
    ]
    inputs = [torch.randn(1, side * side, 32) for side in sides]
    labels, seconds = torch.tensor([3]), [0.0, 0.0]
    for turn in range(3):
        for i, model in enumerate(both):
            cache, start = model.make_cache(1), time.process_time()
            for k, entering in enumerate(inputs):
                model.scale_logits(k, None if k == 0 else entering, labels, cache)
            if turn:
                seconds[i] += time.process_time() - start
    return seconds


@torch.no_grad()
def claim(*, quick: bool) -> Claim:
    """Scales alone against one pass, the cache, the pairs of attention; in full their time at 512 pixels too."""
    config = HMARConfig(
        depth=4,
        embed_dim=64,
        num_heads=4,
        num_classes=5,
        vocab_size=24,
        z_channels=8,
        patch_nums=(1, 2, 3, 4, 6) if quick else SIDES_256,
        tail=2,
    )
    model = shaken(HMAR(config)).eval()
    starts, labels = model.scale_starts, torch.tensor([0, 4, 5])
    inputs = torch.randn(3, starts[-1] - 1, 8)
    whole = model(inputs, labels)
    cache = model.make_cache(3)
    error = 0.0
    for k, (start, stop) in enumerate(itertools.pairwise(starts)):
        part = model.scale_logits(k, None if k == 0 else inputs[:, start - 1 : stop - 1], labels, cache)
        error = max(error, float((part - whole[:, start:stop]).abs().max()))
    own = inputs[:, 4:13]  # scale 2
    codes, masked = torch.randn(3, 9, 8), torch.rand(3, 9) < 0.5
    base = model.refine_logits(2, own, codes, masked, labels)
    hidden = model.refine_logits(2, own, codes + masked.unsqueeze(-1), masked, labels)
    seen = model.refine_logits(2, own, codes + (~masked).unsqueeze(-1), masked, labels)
    rows = [
        at_most("one block-diagonal pass against scales alone, largest difference", error, 1e-5),
        equals("bytes of the cache after all scales", cache.nbytes, 0),
        equals("change of the second branch's logits with the masked tokens", (hidden - base).abs().max(), 0),
        at_least("the same with the visible ones", (seen - base).abs().max(), 0.01),
    ]
    for size, sides in ((256, SIDES_256), (512, SIDES_512)) + (() if quick else ((1024, SIDES_1024),)):
        ratio = _pairs(masks.next_scale_markov(sides)) / _pairs(masks.next_scale(sides))
        rows.append(at_most(f"pairs of attention over VAR's at {size} pixels", ratio, 0.5))
    if not quick:
        ours, theirs = reversed(_attention_seconds(SIDES_512))
        rows.append(
            at_least(
                "time of VAR's attention over ours, a training step at 512 pixels; goal 2, pairs allow 2.15",
                theirs / ours,
                1.5,
            )
        )
        theirs, ours = _passes_seconds(SIDES_512)
        # Both models have the same matrix products, which are most of the time on a CPU.
        rows.append(
            at_least(
                "time of VAR's passes over ours, two blocks of d16 at 512 pixels; goal 1.5 of the published",
                theirs / ours,
                1.0,
            )
        )
    # The comparison can fail: under VAR's mask the one pass is another.
    model.mask = masks.next_scale(model.patch_nums)
    rows.append(
        at_least("the first comparison under VAR's mask", (model(inputs, labels) - whole).abs().max(), 0.1)
    )
    return Claim(tuple(rows))
