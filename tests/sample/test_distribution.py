"""The law of what is drawn: G-test and total variation over the whole support."""

from __future__ import annotations

import math

import pytest
import torch

from arcore.ops import filter_probs, sample

# One-sided normal quantile of 1e-6: a right sampler fails one test in a million, and seeds are fixed.
SIGMAS = 4.75


def check_law(counts: torch.Tensor, probs: torch.Tensor) -> None:
    """counts `[V]` of draws from probs `[V]`."""
    n, probs = counts.sum().item(), probs.double() / probs.double().sum()
    assert (counts[probs == 0] == 0).all()
    # Total variation: its mean is at most sum sqrt(p (1 - p) / (2 pi n)), and one draw moves it by at most 1 / n.
    distance = 0.5 * (counts / n - probs).abs().sum().item()
    mean = (probs * (1 - probs) / (2 * math.pi * n)).sqrt().sum().item()
    assert distance < mean + SIGMAS / math.sqrt(n)
    # Cells of fewer than 10 expected draws are pooled, likeliest first.
    order = probs.argsort(descending=True)
    cell = ((probs[order] * n).cumsum(0) / 10).floor().long()
    cell = torch.where(probs[order] * n >= 10, torch.arange(len(order)), len(order) + cell)
    _, cell = cell.unique(return_inverse=True)
    observed = torch.zeros(int(cell.max()) + 1, dtype=torch.float64).index_add_(
        0, cell, counts[order].double()
    )
    expected = torch.zeros_like(observed).index_add_(0, cell, probs[order] * n)
    good = expected > 5
    g = (
        2 * (observed * (observed / expected).log()).nan_to_num(0.0)[good].sum()
        + 2 * (expected - observed)[good].sum()
    )
    freedom = int(good.sum())
    # Wilson and Hilferty's normal approximation of chi-squared.
    z = ((g / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert z.item() < SIGMAS


def draw_counts(logits: torch.Tensor, n: int, **kw) -> torch.Tensor:
    """Half of the draws from one key, half from keys that follow each other."""
    vocab = logits.shape[-1]
    many = sample(logits, seed=1, num_samples=n // 2, **kw)
    rows = min(n // 2, max(1, 40_000_000 // vocab))
    single = [
        sample(logits.expand(rows, vocab), seed=2, offset=torch.arange(start, start + rows), **kw)
        for start in range(0, n // 2, rows)
    ]
    return torch.bincount(torch.cat([many, *single]), minlength=vocab)


@pytest.mark.parametrize("mode", ["inverse_cdf", "gumbel"])
@pytest.mark.parametrize("kw", [{}, {"top_k": 4}, {"top_p": 0.8, "temperature": 2.0}], ids=str)
def test_seven_tokens(kw, mode):
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.0, -3.0, 0.9])
    check_law(draw_counts(logits, 200_000, mode=mode, **kw), filter_probs(logits, **kw))


def test_4096_tokens():
    logits = 2 * torch.randn(4096, generator=torch.Generator().manual_seed(1))
    kw = {"top_k": 900, "top_p": 0.96}
    check_law(draw_counts(logits, 40_000, **kw), filter_probs(logits, **kw))


@pytest.mark.slow
@pytest.mark.parametrize("kw", [{}, {"top_k": 900, "top_p": 0.96}], ids=str)
def test_4096_tokens_in_depth(kw):
    logits = 2 * torch.randn(4096, generator=torch.Generator().manual_seed(1))
    check_law(draw_counts(logits, 2_000_000, **kw), filter_probs(logits, **kw))


@pytest.mark.parametrize("n", [20_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_128256_tokens(scale, n):
    logits = scale * torch.randn(128256, generator=torch.Generator().manual_seed(1))
    many = sample(logits, seed=3, num_samples=n)
    check_law(torch.bincount(many, minlength=128256), filter_probs(logits))


@pytest.mark.slow
def test_every_token_of_a_flat_row_is_reached():
    """About one in e^8 of the tokens stays undrawn after 8 V draws."""
    vocab = 4096
    drawn = sample(torch.zeros(8 * vocab, vocab), seed=9, offset=torch.arange(8 * vocab))
    missing = vocab - drawn.unique().numel()
    assert missing < 8


def test_rows_of_neighbouring_seeds_are_independent():
    n, vocab = 20_000, 8
    x = torch.zeros(n, vocab)
    a, b = (sample(x, seed=torch.arange(n) + shift) for shift in (0, 1))
    joint = torch.bincount(a * vocab + b, minlength=vocab * vocab)
    assert torch.equal(a[1:], b[:-1])  # the same seed at another row
    check_law(joint, torch.full((vocab * vocab,), 1 / vocab**2))


def test_the_checker_finds_a_wrong_law():
    probs = torch.full((100,), 0.01)
    wrong = probs.clone()
    wrong[:50] *= 1.1
    wrong[50:] *= 0.9
    draws = torch.multinomial(wrong, 100_000, replacement=True, generator=torch.Generator().manual_seed(0))
    with pytest.raises(AssertionError):
        check_law(torch.bincount(draws, minlength=100), probs)
