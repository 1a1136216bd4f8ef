"""The claim of the multi-scale binary tokenizer: codes are bits, and scale by scale a picture comes closer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from arcore.catalog import create_model
from arcore.catalog.claims import Claim, at_least, at_most, equals, shaken, steps


def claim(*, quick: bool) -> Claim:
    """Bits and codes are one to one; in full a tokenizer of scenes of digits, trained, on held-out ones."""
    tokenizer: Any = shaken(create_model("msbsq_tiny")).eval()
    codes = torch.arange(tokenizer.vocab_size)
    bits = tokenizer.bits_of(codes)
    rows = [
        equals("codes of 256 that come back from their bits", (tokenizer.codes_of(bits) == codes).sum(), 256),
        equals("different rows of bits among them", len(torch.unique(bits, dim=0)), 256),
    ]
    if quick:
        return Claim(tuple(rows))
    from arcore.data import load_scenes

    tokenizer = trained_tokenizer(2500)
    held_out = load_scenes("test").images[::15]
    with torch.no_grad():
        found = tokenizer.encode_bits(held_out)
        latent, left = tokenizer.empty_latent(len(held_out)), []
        for k, part in enumerate(found):
            latent = tokenizer.add_scale(k, part, latent)
            left.append(F.mse_loss(tokenizer.decode_latent(latent), held_out).item())
        plain = F.mse_loss(held_out.mean(0).expand_as(held_out), held_out).item()
        shares = torch.cat([part.flatten(0, 1) for part in found]).float().mean(0)
    rows += [
        at_most(
            "error of held-out scenes after the last scale over that after the first", left[-1] / left[0], 0.4
        ),
        at_most("the same over that of the mean scene", left[-1] / plain, 0.3),
        at_least("smallest share of a bit's rarer value", torch.minimum(shares, 1 - shares).min(), 0.05),
    ]
    return Claim(tuple(rows))


def trained_tokenizer(count: int) -> Any:
    """`msbsq_tiny` after some steps on scenes of digits, frozen."""
    from arcore.data import load_scenes

    images = load_scenes("train").images
    tokenizer: Any = create_model("msbsq_tiny")
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=3e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=count)
    for _ in steps(count, "training the tokenizer"):
        batch = images[torch.randint(len(images), (32,))]
        out = tokenizer(batch)
        optimizer.zero_grad()
        (F.mse_loss(out.reconstruction, batch) + out.vq_loss).backward()
        optimizer.step()
        schedule.step()
    return tokenizer.eval().requires_grad_(False)
