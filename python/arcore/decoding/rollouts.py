"""Responses for alignment: several to each prompt, with the log-probabilities and sets that they were drawn from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from arcore.decoding.autoregressive import generate
from arcore.decoding.sampling import Sampling
from arcore.nn.checks import check_sequence, check_whole
from arcore.nn.protocols import TokenModel
from arcore.nn.rollout import Rollout


def draw_rollout(
    model: TokenModel,
    prompts: Sequence[Sequence[int]],
    count: int,
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    eos: int | Sequence[int] | None = None,
    seed: int = 0,
) -> Rollout:
    """Draw `count` responses to each prompt.

    Args:
        model: the policy.
        prompts: token ids of each prompt, at least one each.
        count: responses to each, at least 1.
        max_new_tokens: most tokens of a response, at least 1. The token that ends one belongs to it, so none is empty.
        sampling: temperature, above 0, and filters; None draws from the model as it is.
        eos: see `arcore.decoding.generate`.
        seed: see `arcore.decoding.row_seeds`.

    Returns:
        Rows of the first prompt first. `kept` is set where the sampling filters.

    Raises:
        TypeError: the model is of another kind or ids are no integers.
        ValueError: a number is out of range or a prompt is empty.
    """
    check_sequence("prompts", prompts, "lists of tokens")
    check_whole("count", count, 1)
    check_whole("max_new_tokens", max_new_tokens, 1)
    sampling = Sampling.of(sampling)
    if sampling.temperature <= 0:
        raise ValueError(
            f"expected a temperature above 0 but got {sampling.temperature}; greedy answers have no log-probability to "
            "learn from"
        )
    settings: dict[str, Any] = dataclasses.asdict(sampling)
    filtered = any(settings[name] is not None for name in settings if name not in ("temperature", "order"))
    rows = [list(prompt) for prompt in prompts for _ in range(count)]
    drawn = generate(
        model,
        rows,
        max_new_tokens=max_new_tokens,
        eos=eos,
        seed=seed,
        return_logprobs=True,
        return_kept=filtered,
        **settings,
    )
    starts = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    width = int((starts + drawn.lengths).max()) if rows else 0
    tokens = torch.zeros(len(rows), width, dtype=torch.int64)
    logp = torch.zeros(len(rows), width)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for row, ids in enumerate(rows):
        start, length = len(ids), int(drawn.lengths[row])
        tokens[row, :start] = torch.tensor(ids)
        tokens[row, start : start + length] = drawn.ids[row, :length]
        mask[row, start : start + length] = True
        if drawn.logprobs is not None:
            logp[row, start : start + length] = drawn.logprobs[row, :length]
    kept: Tensor | None = None
    if drawn.kept is not None:
        alive = torch.arange(drawn.ids.shape[1]) < drawn.lengths[:, None]
        kept = drawn.kept[alive]
    return Rollout(
        tokens=tokens,
        mask=mask,
        groups=torch.arange(len(prompts)).repeat_interleave(count),
        logp=logp,
        kept=kept,
        temperature=sampling.temperature,
        meta={"seed": seed, **settings},
    )
