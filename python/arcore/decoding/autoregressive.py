"""Generation token by token from models that keep a cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from arcore.decoding._evaluating import evaluating
from arcore.decoding.draws import check_settings, row_seeds
from arcore.nn.checks import dtype_name
from arcore.nn.protocols import TokenModel
from arcore.ops import sample


@dataclass(frozen=True)
class GenerateOutput:
    """What a run of `generate` made.

    Attributes:
        ids: int64 `[B, N]`, the new tokens of each row, N at most `max_new_tokens`; `pad_id` after a row's end.
        lengths: int64 `[B]`, new tokens of each row, those that ended it included.
    """

    ids: Tensor
    lengths: Tensor

    def rows(self) -> list[list[int]]:
        """The new tokens of each row without padding."""
        return [row[:n].tolist() for row, n in zip(self.ids, self.lengths.tolist(), strict=True)]


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
    stop: Sequence[Sequence[int]] = (),
    seed: int | Sequence[int] = 0,
    pad_id: int = 0,
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
        eos: token that ends a row, or several.
        stop: sequences of tokens, each of which ends a row.
        seed: one number, or one per row; see `row_seeds`. A token's draw depends on its row's seed, its position in the
            row (padding does not count) and its logits, never on the rest of the batch. So a text that is continued
            later, with the same seed, goes on as it would have without the break.
        pad_id: fills the result after a row's end.

    Returns:
        New tokens and how many each row has.

    Raises:
        TypeError: ids are no integers.
        ValueError: a row is empty, the mask does not fit, an argument is out of range, or the model gave NaN.
    """
    steps = list(
        stream(
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
            seed=seed,
        )
    )
    if not steps:
        count = len(prompt)
        return GenerateOutput(torch.empty(count, 0, dtype=torch.int64), torch.zeros(count, dtype=torch.int64))
    ids = torch.stack(steps, dim=1)
    alive = ids >= 0
    return GenerateOutput(ids.masked_fill(~alive, pad_id), alive.sum(dim=1))


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
    stop: Sequence[Sequence[int]] = (),
    seed: int | Sequence[int] = 0,
) -> Iterator[Tensor]:
    """`generate` one step at a time.

    Arguments and errors are those of `generate`; errors in them are raised at once, not with the first token. The
    model stays in evaluation mode until the iterator ends or is closed.

    Yields:
        int64 `[B]`: the new token of each row, -1 for rows that have ended before. Ends with the last row.
    """
    if max_new_tokens < 0:
        raise ValueError(f"expected max_new_tokens >= 0 but got {max_new_tokens}")
    if not repetition_penalty > 0:
        raise ValueError(f"expected repetition_penalty > 0 but got {repetition_penalty}; 1 changes nothing")
    ids, mask = _left_padded(prompt, mask)
    seeds = row_seeds(seed, len(ids), ids.device)
    ends: list[tuple[int, ...]] = [(eos,)] if isinstance(eos, int) else [(one,) for one in eos or ()]
    ends += [tuple(one) for one in stop]
    if not all(ends):
        raise ValueError("expected stop sequences of at least one token but got an empty one")
    check_settings(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    return _steps(model, ids, mask, max_new_tokens, repetition_penalty, ends, seeds, settings)


@torch.no_grad()
def _steps(
    model: TokenModel,
    ids: Tensor,
    mask: Tensor | None,
    max_new_tokens: int,
    repetition_penalty: float,
    ends: list[tuple[int, ...]],
    seeds: Tensor,
    settings: dict[str, Any],
) -> Iterator[Tensor]:
    batch, length = ids.shape
    if max_new_tokens == 0 or batch == 0:
        return
    vocab = model.vocab_size
    position = torch.full((batch,), length, device=ids.device) if mask is None else mask.sum(dim=1)
    if repetition_penalty != 1.0:
        # What each row has read; -1 is nothing.
        read = torch.full((batch, length + max_new_tokens), -1, dtype=torch.int64, device=ids.device)
        read[:, :length] = ids if mask is None else ids.masked_fill(~mask, -1)
        settings = {**settings, "repetition_penalty": repetition_penalty, "history": read}
    tails: list[list[int]] = [[] for _ in range(batch)]
    kept = max((len(end) for end in ends), default=0)
    active = torch.ones(batch, dtype=torch.bool)
    cache = model.make_cache(batch, length + max_new_tokens)
    with evaluating(model):
        logits = model.prefill(ids, cache, mask)
        for count in range(1, max_new_tokens + 1):
            logits = logits[:, :vocab]
            if logits.dtype == torch.float64:
                logits = logits.float()
            drawn = sample(logits, **settings, seed=seeds, offset=position + (count - 1), check=True)
            assert isinstance(drawn, Tensor)
            if repetition_penalty != 1.0:
                read[:, length + count - 1] = drawn
            yield drawn.masked_fill(~active.to(drawn.device), -1)
            if ends:
                for row, token in enumerate(drawn.tolist()):
                    tail = tails[row] = [*tails[row], token][-kept:]
                    if any(tuple(tail[-len(end) :]) == end for end in ends):
                        active[row] = False
                if not active.any():
                    return
            if count < max_new_tokens:
                logits = model.step(drawn, cache)


def _left_padded(
    prompt: Tensor | Sequence[Sequence[int]], mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Ids `[B, L]` and the mask of what is no padding, None when there is none."""
    if isinstance(prompt, Tensor):
        if prompt.dim() != 2:
            raise ValueError(f"expected a prompt of shape [B, L] but got {tuple(prompt.shape)}")
        if mask is not None and (mask.shape != prompt.shape or mask.dtype != torch.bool):
            raise ValueError(
                f"expected a bool mask of shape {tuple(prompt.shape)} but got {dtype_name(mask.dtype)} of shape "
                f"{tuple(mask.shape)}"
            )
        if prompt.shape[1] == 0 or (mask is not None and not mask.any(dim=1).all()):
            raise ValueError("expected at least one token in every row of the prompt")
        return prompt, mask
    if mask is not None:
        raise ValueError("expected a mask only with a tensor of ids; lists are padded here")
    rows = [torch.as_tensor(row, dtype=torch.int64) for row in prompt]
    if any(len(row) == 0 for row in rows):
        raise ValueError("expected at least one token in every row of the prompt")
    longest = max((len(row) for row in rows), default=0)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    real = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :] = row
        real[i, longest - len(row) :] = True
    return ids, None if real.all() else real
