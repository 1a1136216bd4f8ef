"""Generation scale by scale with classifier-free guidance (VAR, arXiv:2404.02905, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from arcore.decoding._arguments import check_drawn, check_guidance, check_kind, check_labels, dtype_of
from arcore.decoding._evaluating import evaluating
from arcore.decoding.draws import check_settings, row_seeds
from arcore.nn.protocols import ScaleModel, ScaleTokenizer
from arcore.ops import sample


@dataclass(frozen=True)
class NextScaleOutput:
    """What a run of `generate_next_scale` made.

    Attributes:
        images: `[B, C, H, W]` in [-1, 1].
        indices: codes of each scale, int64 `[B, p_k^2]`.
        previews: the image after each scale, coarse to fine, if asked for; else empty.
    """

    images: Tensor
    indices: list[Tensor]
    previews: list[Tensor]


@torch.no_grad()
def generate_next_scale(
    model: ScaleModel,
    tokenizer: ScaleTokenizer,
    labels: Tensor,
    *,
    cfg_scale: float = 1.5,
    top_k: int | None = None,
    top_p: float | None = None,
    temperature: float = 1.0,
    seed: int | Sequence[int] = 0,
    previews: bool = False,
) -> NextScaleOutput:
    """Draw images scale by scale, with a cache that is allocated once.

    Guidance grows with the scales: at scale k of K, with t = cfg_scale * k / (K - 1), the logits are
    (1 + t) * conditional - t * unconditional. Both come from one batch of 2B rows. A model with a single scale is not
    guided. Model and tokenizer are put into evaluation mode for the time of the call.

    Args:
        model: the model.
        tokenizer: the tokenizer that the model was trained with.
        labels: int64 `[B]`, on the model's device.
        cfg_scale: strength of guidance, >= 0; 0 runs the conditional rows alone.
        top_k: see `arcore.ops.sample`, likewise the next two.
        top_p: mass of the nucleus.
        temperature: 0 takes the likeliest codes.
        seed: one number, or one per row; see `row_seeds`. A code's draw depends on its row's seed, its place in the
            sequence of all codes and its logits, never on the rest of the batch.
        previews: also decode after every scale.

    Returns:
        Images, codes and previews.

    Raises:
        ValueError: model and tokenizer differ in scales or codes, an argument is out of range, or the model gave NaN.
        TypeError: model or tokenizer is of another kind, or labels are no integers.
    """
    check_kind("model", model, ScaleModel)
    check_kind("tokenizer", tokenizer, ScaleTokenizer)
    check_labels(labels)
    if tuple(model.patch_nums) != tuple(tokenizer.patch_nums) or model.vocab_size != tokenizer.vocab_size:
        raise ValueError(
            "expected model and tokenizer to have the same scales and codes but got "
            f"patch_nums={tuple(model.patch_nums)}, vocab_size={model.vocab_size} for the model and "
            f"patch_nums={tuple(tokenizer.patch_nums)}, vocab_size={tokenizer.vocab_size} for the tokenizer"
        )
    check_guidance(cfg_scale)
    check_settings(temperature=temperature, top_k=top_k, top_p=top_p)
    dtype = dtype_of(model)
    batch, last = len(labels), len(model.patch_nums) - 1
    guided = cfg_scale > 0 and last > 0
    rows = torch.cat([labels, torch.full_like(labels, model.null_class)]) if guided else labels
    seeds = row_seeds(seed, batch, labels.device).unsqueeze(1)
    position = 0
    latent = tokenizer.empty_latent(batch)
    indices: list[Tensor] = []
    shown: list[Tensor] = []
    with evaluating(model, tokenizer):
        cache = model.make_cache(len(rows))
        for k, side in enumerate(model.patch_nums):
            # The tokenizer may have another dtype than the model.
            inputs = None if k == 0 else tokenizer.next_input(k - 1, latent).to(dtype)
            if guided and inputs is not None:
                inputs = torch.cat([inputs, inputs])
            logits = model.scale_logits(k, inputs, rows, cache)  # [B or 2B, p_k^2, V]
            if logits.dtype == torch.float64:
                logits = logits.float()
            uncond, strength = None, None
            if guided:
                logits, uncond = logits.chunk(2)
                strength = 1 + cfg_scale * k / last
            drawn = sample(
                logits,
                uncond=uncond,
                cfg_scale=strength,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seed=seeds,
                offset=torch.arange(position, position + side * side, device=logits.device),
                check=True,
            )
            assert isinstance(drawn, Tensor)
            position += side * side
            indices.append(drawn)
            latent = tokenizer.add_scale(k, drawn, latent)
            if previews:
                shown.append(tokenizer.decode_latent(latent))
        images = shown[-1] if previews else tokenizer.decode_latent(latent)
    check_drawn(images, "the decoded images")
    return NextScaleOutput(images, indices, shown)
