"""Generation scale by scale with classifier-free guidance (VAR, arXiv:2404.02905)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from arcore.decoding.sampling import filter_logits, row_generators, sample_rows
from arcore.nn.protocols import ScaleModel, ScaleTokenizer


@dataclass(frozen=True)
class NextScaleOutput:
    """What `generate_next_scale` made.

    Attributes:
        images: ``[B, C, H, W]`` in [-1, 1].
        indices: int64 ``[B, p²]`` for every scale, coarse to fine.
    """

    images: Tensor
    indices: list[Tensor]


@torch.no_grad()
def generate_next_scale(
    model: ScaleModel,
    tokenizer: ScaleTokenizer,
    labels: Tensor,
    *,
    cfg_scale: float = 1.5,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | Sequence[int] = 0,
) -> NextScaleOutput:
    """Draws one image per label.

    Guidance grows with the scale, as in the official sampler: at scale k of K the logits are
    ``(1 + t) conditional - t unconditional`` with ``t = cfg_scale * k / (K - 1)``. Both halves of the guided pair run
    as one batch with one cache.

    Args:
        model: predicts the scales; put it in eval mode.
        tokenizer: must have the same `patch_nums` and `vocab_size`.
        labels: int64 ``[B]`` in [0, num_classes].
        cfg_scale: guidance at the finest scale; 0 turns it off and halves the work.
        temperature: see `filter_logits`.
        top_k: see `filter_logits`.
        top_p: see `filter_logits`.
        seed: one number for the batch or one per image; an image depends on its own stream only.

    Returns:
        Images and their codes.

    Raises:
        ValueError: model and tokenizer do not fit, or a parameter is out of its range.
    """
    if tuple(model.patch_nums) != tuple(tokenizer.patch_nums) or model.vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"expected a tokenizer with patch_nums={tuple(model.patch_nums)} and vocab_size={model.vocab_size} but got "
            f"{tuple(tokenizer.patch_nums)} and {tokenizer.vocab_size}"
        )
    if not cfg_scale >= 0:
        raise ValueError(f"expected cfg_scale >= 0 but got {cfg_scale}")
    batch, last = labels.shape[0], len(model.patch_nums) - 1
    guided = cfg_scale > 0
    rows = torch.cat([labels, torch.full_like(labels, model.num_classes)]) if guided else labels
    cache = model.make_cache(rows.shape[0])
    generators = row_generators(seed, batch, labels.device)
    f_hat = tokenizer.empty_latent(batch, device=labels.device)
    inputs: Tensor | None = None
    indices = []
    for scale in range(last + 1):
        logits = model.scale_logits(scale, inputs, rows, cache)
        if guided:
            t = cfg_scale * scale / last if last else cfg_scale
            conditional, unconditional = logits.chunk(2)
            logits = (1 + t) * conditional - t * unconditional
        logits = filter_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p)
        indices.append(sample_rows(logits, generators))
        f_hat = tokenizer.add_scale(scale, indices[-1], f_hat)
        if scale < last:
            inputs = tokenizer.next_input(scale, f_hat)
            inputs = torch.cat([inputs, inputs]) if guided else inputs
    return NextScaleOutput(tokenizer.decode_latent(f_hat), indices)
