"""The multi-scale tokenizer's claim: each scale adds detail."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from arcore.catalog.claims import Claim, at_least, at_most, steps
from arcore.data import load_digits
from arcore.zoo.tokenizers.multi_scale_vq.config import MultiScaleVQConfig
from arcore.zoo.tokenizers.multi_scale_vq.quantizer import MultiScaleQuantizer


def claim(*, quick: bool) -> Claim:
    """A codebook trained on pieces of real digits leaves less of held-out ones from scale to scale."""
    config = MultiScaleVQConfig(
        in_channels=1,
        channels=8,
        channel_mult=(1, 2),
        num_res_blocks=1,
        norm_groups=2,
        z_channels=4,
        vocab_size=128,
        patch_nums=(1, 2, 3, 4),
        restart_below=0.03,
    )
    quantizer = MultiScaleQuantizer(config)
    optimizer = torch.optim.AdamW(quantizer.parameters(), lr=0.01)
    train, held_out = _pieces("train"), _pieces("test")
    for _ in steps(250 if quick else 2000, "training"):
        _, loss, _ = quantizer(train[torch.randint(len(train), (64,))])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    quantizer.eval()
    with torch.no_grad():
        left = [(f_hat - held_out).square().mean().item() for _, _, f_hat in quantizer.scales(held_out)]
        codes = torch.cat([codes.flatten() for codes in quantizer(train)[2]])

    def picture(figure: Any) -> None:
        axes = figure.add_subplot()
        axes.plot(range(1, len(left) + 1), left, marker="o")
        axes.set(
            xlabel="scales",
            ylabel="mean square of what is left",
            ylim=(0, None),
            xticks=range(1, len(left) + 1),
        )

    return Claim(
        (
            at_most(
                "left of held-out latents after the last scale, relative to the first",
                left[-1] / left[0],
                0.2,
            ),
            at_least("codes in use, of 128", len(codes.unique()), 101),
        ),
        draw=picture,
    )


def _pieces(split: Any) -> Tensor:
    return F.pixel_unshuffle(load_digits(split).images, 2)  # [N, 4, 4, 4]
