"""arcore's attention beside PyTorch's with the same mask as a dense bool tensor, measured in one run."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import arcore.nn.attention
from arcore import masks
from arcore.objectives import next_scale_loss
from arcore.ops import block_sparse_attention

SCALES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


@dataclass(frozen=True)
class Comparison:
    """Median process CPU time.

    Attributes:
        what: what was run.
        ours: seconds with arcore's attention.
        sdpa: seconds with PyTorch's.
    """

    what: str
    ours: float
    sdpa: float


def compare_training_step(
    name: str, model: torch.nn.Module, tokenizer: Any, images: Tensor, labels: Tensor, rounds: int = 9
) -> Comparison:
    """A whole step of a next-scale model: encode, forward, backward, AdamW. Works on a copy of the model."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def step() -> None:
        with torch.no_grad():
            indices = tokenizer.encode(images)
            inputs = tokenizer.scale_inputs(indices)
        loss = next_scale_loss(model(inputs, labels), indices)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def step_on_sdpa() -> None:
        with _masked_sdpa():
            step()

    with torch.random.fork_rng(devices=[]):
        ours, sdpa = _medians(step, step_on_sdpa, rounds)
    tokens = sum(side * side for side in tokenizer.patch_nums)
    return Comparison(f"training step of {name}, {len(images)} x {tokens} tokens", ours, sdpa)


def compare_attention(heads: int = 16, head_dim: int = 64, rounds: int = 7) -> Comparison:
    """Attention alone, forward and backward, at the size of VAR-d16 on one 256-pixel image."""
    mask = masks.next_scale(SCALES_256)
    dense = mask.to_bool()
    shape = (1, heads, mask.nq, head_dim)
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(shape, generator=generator) for _ in range(4))
    q, k, v = (tensor.requires_grad_() for tensor in (q, k, v))
    ours, sdpa = _medians(
        lambda: block_sparse_attention(q, k, v, mask).backward(grad),
        lambda: scaled_dot_product_attention(q, k, v, attn_mask=dense).backward(grad),
        rounds,
    )
    return Comparison(f"attention of VAR-d16, fwd + bwd, {mask.nq} tokens", ours, sdpa)


@contextmanager
def _masked_sdpa() -> Iterator[None]:
    """Let the attention layers of `arcore.nn` run on PyTorch's attention."""
    dense: dict[masks.IntervalMask, Tensor] = {}

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: masks.IntervalMask, *, scale: float | None) -> Tensor:
        if mask not in dense:
            dense[mask] = mask.to_bool()
        return scaled_dot_product_attention(q, k, v, attn_mask=dense[mask], scale=scale)

    layer: Any = arcore.nn.attention
    original = layer.block_sparse_attention
    layer.block_sparse_attention = attend
    try:
        yield
    finally:
        layer.block_sparse_attention = original


def _medians(left: Callable[[], None], right: Callable[[], None], rounds: int) -> tuple[float, float]:
    """Median CPU seconds of both, taken in turns so that a busy moment hits both."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + 1):
        for function, seconds in zip((left, right), times, strict=True):
            began = time.process_time()
            function()
            if turn:
                seconds.append(time.process_time() - began)
    return statistics.median(times[0]), statistics.median(times[1])
