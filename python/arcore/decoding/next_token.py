"""The loop that draws one token after the other; `generate` and `stream` are its short forms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from arcore.decoding._arguments import check_kind
from arcore.decoding._evaluating import evaluating
from arcore.decoding._rows import Decode, Ends, Rows
from arcore.decoding.draws import row_seeds
from arcore.decoding.sampling import Sampling
from arcore.nn.checks import check_number, check_whole, dtype_name
from arcore.nn.protocols import TokenModel
from arcore.ops.sample import Sampled


@dataclass(frozen=True)
class GenerateOutput:
    """What a run made.

    Attributes:
        ids: int64 `[B, N]`, the new tokens of each row, N at most `max_new_tokens`; `pad_id` after a row's end.
        lengths: int64 `[B]`, new tokens of each row, those that ended it included.
        logprobs: float32 `[B, N]`, log-probability of each token under the distribution that it was drawn from, 0 after
            a row's end; None unless asked for.
        kept: int32 `[B, N, ceil(V / 32)]`, the tokens that passed all filters, packed as in `arcore.ops.Sampled`; can
            be given to `arcore.ops.token_logprobs`' caller as a mask. None unless asked for.
    """

    ids: Tensor
    lengths: Tensor
    logprobs: Tensor | None = None
    kept: Tensor | None = None

    def rows(self) -> list[list[int]]:
        """The new tokens of each row without padding."""
        return [row[:n].tolist() for row, n in zip(self.ids, self.lengths.tolist(), strict=True)]


class Step(NamedTuple):
    """One token of each row.

    Attributes:
        tokens: int64 `[B]`, -1 for rows that have ended before.
        logprobs: float32 `[B]` as in `GenerateOutput`, or None.
        kept: int32 `[B, ceil(V / 32)]` as in `GenerateOutput`, or None.
    """

    tokens: Tensor
    logprobs: Tensor | None = None
    kept: Tensor | None = None


def next_token(
    model: TokenModel,
    prompt: Tensor | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    mask: Tensor | None = None,
    sampling: Sampling | None = None,
    repetition_penalty: float = 1.0,
    eos: int | Sequence[int] | None = None,
    stop: Sequence[Sequence[int] | str] = (),
    decode: Decode | None = None,
    seed: int | Sequence[int] = 0,
    return_logprobs: bool = False,
    return_kept: bool = False,
    **settings: Any,
) -> Iterator[Step]:
    """Continue prompts one token at a time.

    Arguments and errors are those of `generate`; errors in them are raised at once, not with the first token. The
    model stays in evaluation mode until the iterator ends or is closed.

    Args:
        model: the model.
        prompt: token ids.
        max_new_tokens: most new tokens per row.
        mask: of what is no padding.
        sampling: how tokens are drawn; or give its fields, such as `temperature`, by name.
        repetition_penalty: 1 changes nothing.
        eos: token that ends a row, or several.
        stop: sequences of tokens and strings that end a row.
        decode: makes text of tokens, for stops that are strings.
        seed: one number, or one per row.
        return_logprobs: also give log-probabilities.
        return_kept: also give the sets of tokens that passed the filters.
        **settings: fields of `Sampling`.

    Yields:
        A `Step`; ends with the last row.
    """
    check_kind("model", model, TokenModel)
    ends = Ends.of(max_new_tokens, eos, stop, decode, model)
    if not check_number("repetition_penalty", repetition_penalty) > 0:
        raise ValueError(f"expected repetition_penalty > 0 but got {repetition_penalty}; 1 changes nothing")
    chosen = Sampling.of(sampling, **settings)
    ids, mask = left_padded(prompt, mask)
    seeds = row_seeds(seed, len(ids), ids.device)
    more = {"return_logprob": "processed" if return_logprobs else None, "return_kept": return_kept}
    return _steps(model, ids, mask, ends, repetition_penalty, seeds, chosen, more)


@torch.no_grad()
def _steps(
    model: TokenModel,
    ids: Tensor,
    mask: Tensor | None,
    ends: Ends,
    repetition_penalty: float,
    seeds: Tensor,
    sampling: Sampling,
    more: dict[str, Any],
) -> Iterator[Step]:
    batch, length = ids.shape
    if ends.max_new_tokens == 0 or batch == 0:
        return
    vocab = model.vocab_size
    position = torch.full((batch,), length, device=ids.device) if mask is None else mask.sum(dim=1)
    remembers = repetition_penalty != 1.0 or sampling.bans
    if remembers:
        # What each row has read; -1 is nothing.
        read = torch.full((batch, length + ends.max_new_tokens), -1, dtype=torch.int64, device=ids.device)
        read[:, :length] = ids if mask is None else ids.masked_fill(~mask, -1)
    if repetition_penalty != 1.0:
        more = {**more, "repetition_penalty": repetition_penalty, "history": read}
    rows = Rows(batch, ends)
    active = torch.ones(batch, dtype=torch.bool, device=ids.device)
    cache = model.make_cache(batch, length + ends.max_new_tokens)
    with evaluating(model):
        logits = model.prefill(ids, cache, mask)
        for count in range(ends.max_new_tokens):
            logits = logits[:, :vocab]
            if logits.dtype == torch.float64:
                logits = logits.float()
            if sampling.bans:
                more["mask"] = sampling.allowed(read[:, : length + count], vocab)
            found = sampling.draw(logits, seeds, position + count, **more)
            out = found if isinstance(found, Sampled) else Sampled(found)
            drawn = out.tokens
            if remembers:
                read[:, length + count] = drawn
            yield Step(drawn.masked_fill(~active, -1), out.logprob, out.kept)
            if ends.watched:
                for row, token in enumerate(drawn.tolist()):
                    rows.add(row, [token])
                if not any(rows.active):
                    return
                active = torch.tensor(rows.active, device=ids.device)
            if count + 1 < ends.max_new_tokens:
                logits = model.step(drawn, cache)


def left_padded(
    prompt: Tensor | Sequence[Sequence[int]], mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Ids `[B, L]` and the mask of what is no padding, None when there is none."""
    if isinstance(prompt, Tensor):
        if prompt.dim() != 2:
            raise ValueError(f"expected a prompt of shape [B, L] but got {tuple(prompt.shape)}")
        if prompt.dtype != torch.int64:
            raise TypeError(f"expected a prompt of dtype int64 but got {dtype_name(prompt.dtype)}")
        if mask is not None and not isinstance(mask, Tensor):
            raise TypeError(f"expected mask to be a bool tensor but got {type(mask).__name__}")
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
    given: Any = prompt
    if isinstance(given, str | bytes) or not hasattr(given, "__iter__"):
        raise TypeError(
            f"expected the prompt as ids [B, L] or one list of ids per row but got {type(prompt).__name__}; encode a "
            "text with the tokenizer and give [ids]"
        )
    rows = [_row(row) for row in given]
    if any(len(row) == 0 for row in rows):
        raise ValueError("expected at least one token in every row of the prompt")
    longest = max((len(row) for row in rows), default=0)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    real = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :] = row
        real[i, longest - len(row) :] = True
    return ids, None if real.all() else real


def _row(row: Any) -> Tensor:
    if isinstance(row, Tensor):
        if row.dim() != 1 or row.is_floating_point() or row.dtype == torch.bool:
            raise TypeError(
                f"expected a row of ids [L] but got {dtype_name(row.dtype)} of shape {tuple(row.shape)}"
            )
        return row.to(torch.int64)
    if isinstance(row, str | bytes) or not hasattr(row, "__iter__"):
        raise TypeError(f"expected one list of ids per row of the prompt but a row is {row!r}")
    return torch.tensor([check_whole("an id of the prompt", one, 0) for one in row], dtype=torch.int64)
