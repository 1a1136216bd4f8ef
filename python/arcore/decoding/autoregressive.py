"""Generation token by token from models that keep a cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from arcore.decoding._rows import Decode
from arcore.decoding.next_token import GenerateOutput, next_token
from arcore.nn.checks import check_whole
from arcore.nn.protocols import TokenModel


def generate(
    model: TokenModel,
    prompt: Tensor | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    eos: int | Sequence[int] | None = None,
    stop: Sequence[Sequence[int] | str] = (),
    decode: Decode | None = None,
    seed: int | Sequence[int] = 0,
    pad_id: int = 0,
    return_logprobs: bool = False,
    return_kept: bool = False,
    **settings: Any,
) -> GenerateOutput:
    """Continue prompts until each row has ended or has `max_new_tokens` new tokens.

    The model is put into evaluation mode for the time of the call.

    Args:
        model: the model.
        prompt: token ids, int64 `[B, L]` on the model's device; or one list per row, of any lengths.
        max_new_tokens: most new tokens per row, >= 0.
        mask: bool `[B, L]`, False at padding before a row's first token; only with a tensor.
        temperature: 0 takes the likeliest token.
        top_k: see `arcore.ops.sample`, likewise the next two.
        top_p: mass of the nucleus.
        min_p: share of the largest probability.
        repetition_penalty: see `arcore.ops.sample`; prompt and new tokens count, 1 changes nothing.
        eos: token that ends a row, or several. None takes `model.eos_ids`, which published weights bring with them,
            if the model has any; `()` ends no row.
        stop: sequences of tokens, and strings, each of which ends a row.
        decode: makes text of tokens, for stops that are strings; e.g. a tokenizer's `decode`.
        seed: one number, or one per row; see `row_seeds`. A token's draw depends on its row's seed, its position in the
            row (padding does not count) and its logits, never on the rest of the batch. So a text that is continued
            later, with the same seed, goes on as it would have without the break.
        pad_id: fills the result after a row's end.
        return_logprobs: also return log-probabilities, after temperature and filters.
        return_kept: also return which tokens passed the filters.
        **settings: further fields of `Sampling`, e.g. `min_tokens_to_keep`, `without_words` and `without_repeats`.

    Returns:
        New tokens and how many each row has.

    Raises:
        TypeError: the model is of another kind, ids are no integers, or an argument has a wrong type.
        ValueError: a row is empty, the mask does not fit, an argument or a token is out of range, or the model gave
            NaN.
    """
    pad_id = check_whole("pad_id", pad_id, -(2**63))
    steps = list(
        next_token(
            model,
            prompt,
            max_new_tokens=max_new_tokens,
            mask=mask,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            eos=eos,
            stop=stop,
            decode=decode,
            seed=seed,
            return_logprobs=return_logprobs,
            return_kept=return_kept,
            **settings,
        )
    )
    if not steps:
        count = len(prompt)
        return GenerateOutput(torch.empty(count, 0, dtype=torch.int64), torch.zeros(count, dtype=torch.int64))
    ids = torch.stack([step.tokens for step in steps], dim=1)
    alive = ids >= 0
    logprobs, kept = None, None
    if return_logprobs:
        logprobs = torch.stack([x for step in steps if (x := step.logprobs) is not None], dim=1)
        logprobs = logprobs.masked_fill(~alive, 0.0)
    if return_kept:
        kept = torch.stack([x for step in steps if (x := step.kept) is not None], dim=1)
    return GenerateOutput(ids.masked_fill(~alive, pad_id), alive.sum(dim=1), logprobs, kept)


def stream(
    model: TokenModel,
    prompt: Tensor | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    eos: int | Sequence[int] | None = None,
    stop: Sequence[Sequence[int] | str] = (),
    decode: Decode | None = None,
    seed: int | Sequence[int] = 0,
    **settings: Any,
) -> Iterator[Tensor]:
    """`generate` one step at a time.

    Arguments and errors are those of `generate`; errors in them are raised at once, not with the first token. The
    model stays in evaluation mode until the iterator ends or is closed.

    Yields:
        int64 `[B]`: the new token of each row, -1 for rows that have ended before. Ends with the last row.
    """
    steps = next_token(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        mask=mask,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        eos=eos,
        stop=stop,
        decode=decode,
        seed=seed,
        **settings,
    )
    return (step.tokens for step in steps)
