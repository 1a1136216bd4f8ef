"""Laws of short texts, enumerated, for checks that a decoder draws from them."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from arcore.catalog import create_model
from arcore.catalog.claims import shaken
from arcore.decoding.sampling import Sampling
from arcore.nn.kinds import check_kinds


@check_kinds
def small_model(vocab_size: int, seed: int = 1, layers: int = 2, scale: float = 0.3) -> Any:
    """A random Llama of few tokens that says something."""
    torch.manual_seed(seed)
    model = create_model(
        "llama_tiny",
        dim=32,
        num_layers=layers,
        num_heads=4,
        num_kv_heads=2,
        hidden_dim=48,
        vocab_size=vocab_size,
    )
    return shaken(model, seed=seed, scale=scale).eval().requires_grad_(False)


@torch.no_grad()
@check_kinds
def text_law(model: Any, prompt: list[int], length: int, sampling: Sampling) -> Tensor:
    """Float64 `[V ** length]`: the probability of every continuation, in the order of `itertools.product`."""
    every = torch.tensor(list(itertools.product(range(model.vocab_size), repeat=length)))
    full = torch.cat([torch.tensor(prompt).expand(len(every), -1), every], dim=1)
    probs = sampling.probs(model(full)[:, len(prompt) - 1 : -1, : model.vocab_size])
    return probs.gather(2, every.unsqueeze(2)).squeeze(2).double().prod(1)


@check_kinds
def outcomes(ids: Tensor, vocab_size: int) -> Tensor:
    """Texts `[B, length]` as numbers of outcomes, in the order of `text_law`."""
    return (ids * vocab_size ** torch.arange(ids.shape[1] - 1, -1, -1)).sum(1)


@check_kinds
def g_test(found: Tensor, law: Tensor) -> float:
    """p-value of outcomes under a law; 0 if one of them is impossible.

    Outcomes that are expected fewer than five times count as one: the statistic's distribution does not hold for them.
    """
    counts = torch.bincount(found, minlength=len(law)).double()
    if counts[law == 0].any():
        return 0.0
    expected = law * counts.sum()
    common = expected >= 5
    cells = torch.stack([counts, expected])[:, common]
    rest = torch.stack([counts, expected])[:, ~common].sum(1, keepdim=True)
    if rest[1] > 0:
        cells = torch.cat([cells, rest], dim=1)
    counts, expected = cells[:, cells[0] > 0]
    statistic = 2 * (counts * (counts / expected).log()).sum()
    half = torch.tensor((cells.shape[1] - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half, statistic / 2))
