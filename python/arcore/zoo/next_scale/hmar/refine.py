"""Drawing with refinement within a scale."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from arcore.decoding import Kept, NextScaleOutput
from arcore.decoding._arguments import check_drawn, check_guidance, check_kind, check_labels, dtype_of
from arcore.decoding._evaluating import evaluating
from arcore.decoding.draws import row_seeds
from arcore.nn.protocols import ScaleTokenizer
from arcore.ops import sample
from arcore.zoo.next_scale.hmar.model import HMAR, HMARConfig
from arcore.zoo.next_scale.hmar.schedule import own_inputs, published_schedule


def with_refinement(model: HMAR) -> HMAR:
    """A model of the first stage with a second branch: copies of its last blocks and head. The argument stays."""
    new = HMAR(HMARConfig(**{**vars(model.config), "refinement": True})).to(model.pos_embed)
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("mask_")}
    for name in list(state):
        if name.startswith("ns_"):
            state["mask_" + name.removeprefix("ns_")] = state[name]
    new.load_state_dict(state | {"mask_embed": new.mask_embed.detach()})
    return new


@torch.no_grad()
def generate_refined(
    model: HMAR,
    tokenizer: ScaleTokenizer,
    labels: Tensor,
    *,
    schedule: Sequence[Sequence[int]] | None = None,
    cfg_scale: float = 1.7,
    top_k: int | None = 1000,
    top_p: float | None = 0.99,
    temperature: float = 1.0,
    seed: int | Sequence[int] = 0,
    kept: Kept | None = None,
) -> NextScaleOutput:
    """Draw images scale by scale; in each, draw the least certain tokens anew, given the others (section 3.3).

    All tokens of a scale are drawn at once as VAR's are. Of a row (a_0, a_1, ...) of the schedule, the a_0 likeliest
    stay; the others are masked and drawn anew by the second branch, without guidance; the a_1 likeliest of these stay,
    and so on. A token's likelihood is that under the law that it was drawn from.

    Args:
        model: with a second branch, unless the schedule asks for one pass per scale.
        tokenizer: the tokenizer that the model was trained with.
        labels: int64 `[B]`.
        schedule: a row per scale, which sums to its tokens; `published_schedule` by default.
        cfg_scale, top_k, top_p, temperature, seed, kept: as for `arcore.decoding.generate_next_scale`, which a schedule
            of one pass per scale agrees with. What is kept is never drawn anew.

    Returns:
        Images and codes; no previews.

    Raises:
        ValueError: a row of the schedule does not fit, or as `generate_next_scale` does.
        TypeError: likewise.
    """
    check_kind("tokenizer", tokenizer, ScaleTokenizer)
    check_labels(labels)
    check_guidance(cfg_scale)
    sides = model.patch_nums
    if tuple(tokenizer.patch_nums) != tuple(sides) or tokenizer.vocab_size != model.vocab_size:
        raise ValueError(
            "expected model and tokenizer to have the same scales and codes but got "
            f"{sides} and {model.vocab_size} against {tuple(tokenizer.patch_nums)} and {tokenizer.vocab_size}"
        )
    rows = [tuple(row) for row in (published_schedule(sides) if schedule is None else schedule)]
    if (
        [sum(row) for row in rows] != [side * side for side in sides]
        or min(map(min, rows)) < 1
        or len(rows[0]) > 1
    ):
        raise ValueError(
            f"expected a schedule with a row of positive numbers for each scale, summing to {[s * s for s in sides]}, "
            f"the first of one pass, but got {rows}"
        )
    guided = cfg_scale > 0 and len(sides) > 1
    both = torch.cat([labels, torch.full_like(labels, model.null_class)]) if guided else labels
    seeds = row_seeds(seed, len(labels), labels.device).unsqueeze(1)
    dtype = dtype_of(model)
    latent = tokenizer.empty_latent(len(labels))
    indices: list[Tensor] = []
    if kept is not None:
        kept.check(len(labels), sides)

    def draw(logits: Tensor, k: int, uncond: Tensor | None = None, again: int = 0) -> tuple[Tensor, Tensor]:
        # Draws of later passes use positions behind those of all tokens.
        start = model.scale_starts[k] + again * model.scale_starts[-1]
        drawn = sample(
            logits.float(),
            uncond=None if uncond is None else uncond.float(),
            cfg_scale=None if uncond is None else 1 + cfg_scale * k / (len(sides) - 1),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seeds,
            offset=torch.arange(start, start + logits.shape[1], device=logits.device),
            return_prob=True,
            check=True,
        )
        assert not isinstance(drawn, Tensor) and drawn.prob is not None
        return drawn.tokens, drawn.prob

    with evaluating(model, tokenizer):
        cache = model.make_cache(len(both))
        for k, row in enumerate(rows):
            inputs = None if k == 0 else tokenizer.next_input(k - 1, latent).to(dtype)
            doubled = torch.cat([inputs, inputs]) if guided and inputs is not None else inputs
            logits = model.scale_logits(k, doubled, both, cache)
            uncond = None
            if guided:
                logits, uncond = logits.chunk(2)
            codes, prob = draw(logits, k, uncond)
            stays = torch.zeros_like(codes, dtype=torch.bool)
            if kept is not None:
                stays = kept.places(k, sides).to(codes.device).expand_as(codes)
                codes = torch.where(stays, kept.indices[k].to(codes.device), codes)
                prob = prob.masked_fill(stays, torch.inf)
            masked = torch.ones_like(codes, dtype=torch.bool)
            for again in range(1, len(row)):
                assert inputs is not None
                # Settled tokens come last in the order, so that the first ones are the least certain of the others.
                order = prob.masked_fill(~masked, torch.inf).argsort(dim=1, stable=True)
                masked = torch.zeros_like(masked).scatter(1, order[:, : sum(row[again:])], True) & ~stays
                known = own_inputs(tokenizer, k, codes).to(dtype)
                fresh, chance = draw(model.refine_logits(k, inputs, known, masked, labels), k, again=again)
                codes, prob = torch.where(masked, fresh, codes), torch.where(masked, chance, prob)
            indices.append(codes)
            latent = tokenizer.add_scale(k, codes, latent)
        images = tokenizer.decode_latent(latent)
    check_drawn(images, "the decoded images")
    return NextScaleOutput(images, indices, [])
