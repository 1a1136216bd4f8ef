"""TiTok's claim with continuous tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from arcore.catalog.claims import Claim, at_least, at_most, shaken
from arcore.data import load_digits
from arcore.zoo.tokenizers.titok_kl.model import TiTokKL, titok_kl_tiny


@torch.no_grad()
def claim(*, quick: bool) -> Claim:
    """One token after the other comes from another image; patches that change are counted. And tokens change places."""
    torch.manual_seed(0)
    shares: list[float] = []
    moved, size = 0.0, 0.0
    for _ in range(2 if quick else 10):
        model = shaken(TiTokKL(titok_kl_tiny())).eval()
        images = load_digits("test").images[:20]
        tokens = model.encode(images)
        for place in range(tokens.shape[1]):
            mixed = tokens.clone()
            mixed[:, place] = tokens.roll(1, 0)[:, place]
            shares.append(_share(model.decode(mixed) - model.decode(tokens)))
        order = torch.randperm(tokens.shape[1])
        whole = model.decode(tokens)
        positions = model.decoder.latent_token_positional_embedding
        positions.copy_(positions[order].clone())
        moved = max(moved, (model.decode(tokens[:, order]) - whole).abs().max().item())
        size = whole.std().item()
    return Claim(
        (
            # Of a grid of 8 places each would have an eighth.
            at_least("share of patches that a token changes, mean", sum(shares) / len(shares), 0.25),
            at_most("change where tokens move with their positions", moved, 1e-5),
            at_least("standard deviation of the pixels", size, 0.05),
        )
    )


def _share(change: Tensor) -> float:
    """Share of 2x2 patches whose mean change is at least a tenth of the largest."""
    patches = F.avg_pool2d(change.abs().mean((0, 1))[None, None], 2)
    return (patches > 0.1 * patches.max()).float().mean().item()
