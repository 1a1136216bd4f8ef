"""Drawing pictures bit by bit, with guidance by any number of conditions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from arcore.decoding._evaluating import evaluating
from arcore.decoding.draws import row_seeds
from arcore.ops import sample

# Called with the number of scales that are drawn, and of all.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Drawn:
    """What was drawn.

    Attributes:
        images: `[B, C, H, W]` in [-1, 1].
        bits: of each scale, bool `[B, p_k^2, d]`.
    """

    images: Tensor
    bits: list[Tensor]


def per_scale(name: str, values: float | Sequence[float], scales: int) -> list[float]:
    """One number for each scale.

    Raises:
        ValueError: there is neither one number nor one per scale.
    """
    given = [float(value) for value in values] if isinstance(values, Sequence) else [float(values)]
    if len(given) not in (1, scales):
        raise ValueError(f"expected one {name}, or {scales} of them, one per scale, but got {len(given)}")
    return given * scales if len(given) == 1 else given


@torch.no_grad()
def draw_bits(
    model: Any,
    tokenizer: Any,
    told: Any,
    *,
    guidance: Sequence[float | Sequence[float]] = (),
    temperature: float | Sequence[float] = 1.0,
    top_p: float | None = None,
    guide_at: int = 0,
    seed: int | Sequence[int] = 0,
    progress: Progress | None = None,
) -> Drawn:
    """Draw pictures scale by scale; the bits of a code are drawn independently of each other.

    The rows of `told` are copies of the B pictures, one behind the other, from the fullest condition to none. With
    G strengths there are G + 1 copies, and the logits are those of the last copy plus, for each of the others, its
    strength times its difference from the copy behind it. With two copies that is
    strength * conditional + (1 - strength) * unconditional.

    Args:
        model: `Infinity` or one that extends it.
        tokenizer: `MultiScaleBSQ`.
        told: from `model.tell`, of (G + 1) B rows.
        guidance: G strengths, each a number or one per scale.
        temperature: one number, or one per scale; 0 takes the likelier value of each bit.
        top_p: drop a bit's less likely value where the other has at least this probability.
        guide_at: 0 guides the logits; -n guides what leaves the n-th block from the end instead, and the copies go on
            alike. For one strength.
        seed: one number, or one per picture. A bit's draw depends on its picture's seed, its place in the sequence of
            all bits and its logits, never on the rest of the batch.
        progress: told after each scale.

    Raises:
        ValueError: model and tokenizer differ in scales or bits, or an argument is out of range.
    """
    if tuple(model.patch_nums) != tuple(tokenizer.patch_nums) or model.bits != tokenizer.bits:
        raise ValueError(
            "expected model and tokenizer to have the same scales and bits but got "
            f"patch_nums={tuple(model.patch_nums)}, bits={model.bits} for the model and "
            f"patch_nums={tuple(tokenizer.patch_nums)}, bits={tokenizer.bits} for the tokenizer"
        )
    scales, copies = len(model.patch_nums), len(guidance) + 1
    rows = len(told.pooled)
    if rows % copies:
        raise ValueError(f"expected {copies} copies of each picture but got {rows} rows")
    depth = len(model.blocks)
    if guide_at > 0 or (guide_at and (copies != 2 or -guide_at >= depth)):
        raise ValueError(
            f"expected guide_at to be 0, or from {1 - depth} to -1 with one strength, but got {guide_at} with "
            f"{copies - 1}"
        )
    strengths = [per_scale("strength of guidance", one, scales) for one in guidance]
    heats = per_scale("temperature", temperature, scales)
    batch = rows // copies
    seeds = row_seeds(seed, batch, told.pooled.device).view(-1, 1)
    latent = tokenizer.empty_latent(batch)
    dtype = model.pos_start.dtype
    drawn: list[Tensor] = []
    position = 0

    def between(layer: int, x: Tensor) -> Tensor:
        if layer != depth + guide_at:
            return x
        one, two = x.chunk(2)
        mixed = strengths[0][len(drawn)] * one + (1 - strengths[0][len(drawn)]) * two
        return torch.cat([mixed, mixed])

    with evaluating(model, tokenizer):
        cache = model.make_cache(rows)
        for k, side in enumerate(model.patch_nums):
            inputs = None if k == 0 else tokenizer.next_input(k - 1, latent).to(dtype).repeat(copies, 1, 1)
            logits = model.scale_logits(k, inputs, told, cache, between if guide_at else None)
            parts = list(logits.float().flatten(1, 2).chunk(copies))  # [B, p_k^2 d, 2]
            given: dict[str, Any] = {}
            if copies > 1 and not guide_at:
                at = [one[k] for one in strengths]
                given["weights"] = [now - before for before, now in zip([0.0, *at], [*at, 1.0], strict=True)]
            count = side * side * model.bits
            tokens = sample(
                parts if given else parts[0],
                **given,
                temperature=heats[k],
                top_p=top_p,
                seed=seeds,
                offset=torch.arange(position, position + count, device=logits.device),
                check=True,
            )
            assert isinstance(tokens, Tensor)
            position += count
            drawn.append(tokens.unflatten(1, (side * side, model.bits)) == 1)
            latent = tokenizer.add_scale(k, drawn[-1], latent)
            if progress is not None:
                progress(k + 1, scales)
        images = tokenizer.decode_latent(latent)
    return Drawn(images, drawn)
