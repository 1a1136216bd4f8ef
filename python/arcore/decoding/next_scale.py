"""Generation scale by scale with classifier-free guidance (VAR, arXiv:2404.02905, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from arcore.decoding._arguments import check_drawn, check_guidance, check_kind, check_labels, dtype_of
from arcore.decoding._evaluating import evaluating
from arcore.decoding.draws import RowNormals, check_settings, row_seeds
from arcore.nn.kinds import check_kinds
from arcore.nn.protocols import ScaleModel, ScaleTokenizer, VectorTokenizer
from arcore.ops import filter_probs, sample


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


@check_kinds
@dataclass(frozen=True)
class Kept:
    """What of a given picture stays while the rest is drawn anew.

    A code stays where more than half of its place is kept: the region is shrunk to the side of each scale by bilinear
    interpolation, as the authors of VAR do for in-painting, out-painting and class-conditional editing. The first scale
    always stays.

    Attributes:
        indices: codes of the picture, int64 `[B, p_k^2]` per scale, from the tokenizer's `encode`.
        region: bool `[H, W]` or `[B, H, W]` over the picture at any resolution; True is kept.
    """

    indices: Sequence[Tensor]
    region: Tensor

    def check(self, batch: int, patch_nums: Sequence[int]) -> None:
        """Refuses codes of other scales or another batch, and a region that is none.

        Raises:
            TypeError: the region is not boolean.
            ValueError: a shape does not fit.
        """
        shapes = [tuple(codes.shape) for codes in self.indices]
        expected = [(batch, side * side) for side in patch_nums]
        if shapes != expected:
            raise ValueError(f"expected kept.indices of shapes {expected} but got {shapes}")
        region: object = self.region
        if not isinstance(region, Tensor) or region.dtype != torch.bool:
            got = region.dtype if isinstance(region, Tensor) else type(region).__name__
            raise TypeError(f"expected kept.region to be a bool tensor but got {got}")
        if region.dim() not in (2, 3) or not region.numel() or (region.dim() == 3 and len(region) != batch):
            raise ValueError(
                f"expected kept.region of shape [H, W] or [{batch}, H, W] but got {tuple(region.shape)}"
            )

    def places(self, k: int, patch_nums: Sequence[int]) -> Tensor:
        """Which codes of scale k stay, bool `[B or 1, p_k^2]`."""
        side, last = patch_nums[k], patch_nums[-1]
        region = self.region.float().reshape(-1, 1, *self.region.shape[-2:])
        if side == 1:
            return torch.ones(len(region), 1, dtype=torch.bool, device=region.device)
        if region.shape[-2:] != (last, last):
            region = (F.interpolate(region, size=(last, last), mode="area") > 0.5).float()
        shrunk = F.interpolate(region, size=(side, side), mode="bilinear", align_corners=False)
        return (shrunk > 0.5).flatten(1)


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
    smooth: bool = False,
    kept: Kept | None = None,
    progress: Callable[[int, int], None] | None = None,
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
        smooth: feed on mixtures of codes instead of the drawn ones, for smoother pictures (the authors' `more_smooth`):
            at scale k of K, with r = k / (K - 1), code vectors are weighted by the softmax of
            ((1 + r) * logits + Gumbel noise) / max(0.27 * (1 - 0.95 r), 0.005) over the codes that the filters kept.
            `indices` are still the drawn codes, and the picture is not theirs.
        kept: parts of a given picture that stay; None draws all.
        progress: told after each scale how many are drawn, and of how many.

    Returns:
        Images, codes and previews.

    Raises:
        ValueError: model and tokenizer differ in scales or codes, an argument is out of range, or the model gave NaN.
        TypeError: model or tokenizer is of another kind, or labels are no integers.
    """
    check_kind("model", model, ScaleModel)
    check_kind("tokenizer", tokenizer, VectorTokenizer if smooth else ScaleTokenizer)
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
    if kept is not None:
        kept.check(batch, model.patch_nums)
    seeds = row_seeds(seed, batch, labels.device).unsqueeze(1)
    noise = RowNormals(seeds.flatten())
    settings: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
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
                **settings,
                seed=seeds,
                offset=torch.arange(position, position + side * side, device=logits.device),
                check=True,
            )
            assert isinstance(drawn, Tensor)
            position += side * side
            stays = None if kept is None else kept.places(k, model.patch_nums).to(drawn.device)
            if kept is not None and stays is not None:
                drawn = torch.where(stays, kept.indices[k].to(drawn.device), drawn)
            indices.append(drawn)
            if smooth:
                assert isinstance(tokenizer, VectorTokenizer)
                probs = filter_probs(logits, uncond=uncond, cfg_scale=strength, **settings)
                assert isinstance(probs, Tensor)
                vectors = _mixtures(probs, noise, k / max(last, 1)) @ tokenizer.codebook.float()
                if stays is not None:
                    vectors = torch.where(stays.unsqueeze(-1), tokenizer.codebook[drawn].float(), vectors)
                latent = tokenizer.add_vectors(k, vectors, latent)
            else:
                latent = tokenizer.add_scale(k, drawn, latent)
            if previews:
                shown.append(tokenizer.decode_latent(latent))
            if progress is not None:
                progress(k + 1, last + 1)
        images = shown[-1] if previews else tokenizer.decode_latent(latent)
    check_drawn(images, "the decoded images")
    return NextScaleOutput(images, indices, shown)


def _mixtures(probs: Tensor, noise: RowNormals, progress: float) -> Tensor:
    """Weights of the codes `[B, N, V]` from their probabilities, softer at coarse scales."""
    scores = (1 + progress) * probs.log() + noise.draw_gumbel(*probs.shape[1:], device=probs.device)
    return (scores / max(0.27 * (1 - 0.95 * progress), 0.005)).softmax(-1)
