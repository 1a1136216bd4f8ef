"""Rows that are hard to filter, combinations of settings, and a random mixture of both."""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from torch import Tensor

INF = math.inf


def adversarial_rows(vocab: int, seed: int = 0) -> dict[str, Tensor]:
    """Named rows `[V]`, float32."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(vocab, generator=generator)
    one_hot = torch.zeros(vocab)
    one_hot[vocab // 2] = 200.0
    two_levels = torch.where(torch.arange(vocab) % 3 == 0, 1.0, 0.0)
    half = torch.where(torch.rand(vocab, generator=generator) < 0.5, -INF, noise)
    half[0] = 0.5
    single = torch.full((vocab,), -INF)
    single[-1] = -1e30
    return {
        "normal": 3 * noise,
        "sharp": 30 * noise,
        "nearly_flat": 1e-6 * noise + 5,
        "ties": (2 * noise).round() / 2,
        "flat": torch.full((vocab,), -7.25),
        "signed_zeros": torch.zeros(vocab) * noise,
        "two_levels": two_levels,
        "one_hot": one_hot,
        "denormals": noise * 1e-40,
        "huge": noise * 1e38,
        "half_forbidden": half,
        "single": single,
        "ascending": torch.linspace(-20, 5, vocab),
        "neighbours": (torch.arange(vocab) + 0x40000000).int().view(torch.float32),
    }


FILTERS: list[dict[str, Any]] = [
    {},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 50, "top_p": 0.9},
    {"top_p": 0.0},
    {"top_p": 0.5},
    {"top_p": 0.999},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"typical_p": 0.2},
    {"typical_p": 0.95},
    {"epsilon": 0.02},
    {"epsilon": 0.9},
    {"eta": 0.02},
    {"eta": 0.9},
    {"top_k": 30, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.9, "epsilon": 1e-3, "eta": 1e-3},
]


def random_call(draw: random.Random, rows: int = 3) -> tuple[Tensor, dict[str, Any]]:
    """Logits `[rows, V]` and arguments of `filter_probs`."""
    vocab = draw.choice([1, 2, 3, 7, 15, 17, 31, 32, 33, 64, 100, 257, 1000, 1025])
    torch.manual_seed(draw.randrange(2**31))
    named = adversarial_rows(vocab, draw.randrange(2**31))
    x = torch.stack([named[draw.choice(list(named))] for _ in range(rows)])
    if draw.random() < 0.1:
        x[draw.randrange(rows), draw.randrange(vocab)] = math.nan
    if draw.random() < 0.1:
        x[draw.randrange(rows), draw.randrange(vocab)] = INF
    if draw.random() < 0.3:
        x = x.to(draw.choice([torch.bfloat16, torch.float16]))
    kw: dict[str, Any] = {"order": draw.choice(["hf", "vllm", "joint"])}
    for name, choices, chance in (
        ("temperature", [0.3, 0.9, 1.0, 2.0, 0.0, torch.rand(rows)], 0.6),
        ("top_k", [1, 2, 5, 50, 900, torch.randint(0, 60, (rows,))], 0.5),
        ("top_p", [0.0, 0.1, 0.5, 0.9, 0.96, 0.999, torch.rand(rows)], 0.5),
        ("min_p", [0.01, 0.1, 0.5, 1.0], 0.3),
        ("typical_p", [0.1, 0.5, 0.9], 0.3),
        ("epsilon", [1e-3, 3e-2, 0.5], 0.3),
        ("eta", [1e-3, 3e-2, 0.5], 0.3),
    ):
        value = draw.choice(choices)
        if draw.random() < chance:
            kw[name] = value
    if draw.random() < 0.2:
        kw["mask"] = torch.rand(rows, vocab) < 0.5
    if draw.random() < 0.2:
        kw["bias"] = torch.randn(vocab)
    if draw.random() < 0.3:
        kw.update(
            repetition_penalty=1.3,
            presence_penalty=0.5,
            frequency_penalty=torch.rand(rows),
            history=torch.randint(-1, vocab + 1, (rows, 9)),
            prompt=torch.randint(0, vocab, (4,)),
        )
    if draw.random() < 0.3:
        other = torch.randn(rows, vocab).to(x.dtype)
        other[torch.rand(rows, vocab) < 0.2] = -INF
        kw.update(uncond=other, cfg_scale=draw.choice([0.0, 1.0, 1.5, 3 * torch.rand(rows)]))
    return x, kw
