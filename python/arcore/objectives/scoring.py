"""Log-probabilities of responses under a model: policies, references and old policies alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from arcore.nn.branches import branch_hidden, pack_branches
from arcore.nn.causal import CausalDecoder
from arcore.nn.kinds import check_kinds
from arcore.nn.rollout import Rollout, TokenStats, check_rows
from arcore.ops import (
    TokenLogprobs,
    linear_logprobs,
    reference_linear_logprobs,
    reference_token_logprobs,
    token_logprobs,
)


@check_kinds
def score(
    model: Callable[..., Any],
    tokens: Tensor,
    mask: Tensor,
    *,
    temperature: float = 1.0,
    kept: Tensor | None = None,
    entropy: bool = False,
    groups: Tensor | None = None,
) -> TokenStats:
    """Log-probabilities of the tokens that the mask names, with gradient where the model has one.

    A model that shows what its head reads (`hidden(ids)` and `head_weight`, as `arcore.models.Llama`) is scored by
    `arcore.ops.linear_logprobs`, without logits; another one by `token_logprobs` on the logits that it returns, a
    tensor or an object with `logits`. Only the rows of the head that predict a response token are computed. Models in
    float64 are scored by the ops' references.

    With `kept`, the sampler's own sets, probabilities are those of the distribution that was drawn from, so on-policy
    the ratio to it is 1; without, a filtered sampler's ratio would be the mass that it kept.

    Args:
        model: called with int64 `[B, T]`.
        tokens: int64 `[B, T]`, right-padded; padding must be valid token ids.
        mask: bool `[B, T]`, response tokens; none in the first column.
        temperature: divides the logits, as it did in sampling.
        kept: `[N, ceil(V / 32)]` int32 words or `[N, V]` bool, for the N True places of the mask in row order.
        entropy: also give entropies.
        groups: int64 `[B]`; with it, rows of a group are packed behind their prompt, which is read once. For
            `CausalDecoder`s (Llama and its kin) without a window. The result is the same up to rounding.

    Raises:
        TypeError: a dtype is wrong, or the model cannot be packed.
        ValueError: shapes do not fit, or there is a token that the model does not know.
    """
    check_rows(tokens, mask)
    inner = _unwrapped(model)
    columns = getattr(inner, "vocab_size", None)
    if columns is not None and tokens.numel() and int(tokens.max()) >= columns:
        raise ValueError(
            f"arcore.score: expected tokens below the model's vocabulary of {columns} but got {int(tokens.max())}; the "
            "policy, its reference and the tokenizer must have one vocabulary"
        )
    rows, places = mask.nonzero(as_tuple=True)
    target = tokens[rows, places]
    if kept is not None and len(kept) != len(target):
        raise ValueError(
            f"arcore.score: expected kept sets of the {len(target)} response tokens but got {len(kept)}; give one per "
            "True place of the mask, in row order"
        )
    options: dict[str, Any] = {"temperature": temperature, "mask": kept, "return_entropy": entropy}
    if not len(target):
        shape = tokens.shape
        dtype = torch.float32
        none = torch.zeros(shape, dtype=dtype, device=tokens.device)
        return TokenStats(none, none if entropy else None, none)
    if groups is not None:
        real = _lengths(mask)
        packed = pack_branches(tokens, real, _prompts(mask, real), groups)
        hidden = branch_hidden(inner, packed)[0]
        found = _head(inner, hidden[packed.place[rows, places - 1]], target, options)
    elif hasattr(inner, "hidden") and hasattr(inner, "head_weight"):
        found = _head(inner, inner.hidden(tokens)[rows, places - 1], target, options)
    else:
        logits = model(tokens)
        logits = getattr(logits, "logits", logits)
        if logits.shape[:-1] != tokens.shape:
            raise ValueError(
                f"arcore.score: expected logits of shape {(*tokens.shape, 'V')} but got {tuple(logits.shape)}; return "
                "one row of logits per token"
            )
        picked = logits[rows, places - 1]
        if columns is not None:
            picked = picked[:, :columns]
        if picked.dtype == torch.float64:
            found = reference_token_logprobs(picked, target, **options)
        else:
            found = token_logprobs(picked, target, **options)

    def spread(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        return values.new_zeros(tokens.shape).index_put((rows, places), values)

    logp = spread(found.logp)
    assert logp is not None
    return TokenStats(logp, spread(found.entropy), spread(found.logsumexp))


@check_kinds
def score_rollout(
    model: Callable[..., Any], rollout: Rollout, *, entropy: bool = False, packed: bool | None = None
) -> TokenStats:
    """`score` of a rollout at its own temperature and on its own kept sets.

    Args:
        model: see `score`.
        rollout: what was drawn.
        entropy: also give entropies.
        packed: read each prompt once; None does so where the model can and a group has several rows.

    Raises:
        TypeError: see `score`.
        ValueError: see `score`.
    """
    if packed is None:
        inner = _unwrapped(model)
        several = len(torch.unique(rollout.groups)) < len(rollout.groups)
        packed = several and isinstance(inner, CausalDecoder) and inner.window is None
    return score(
        model,
        rollout.tokens,
        rollout.mask,
        temperature=rollout.temperature,
        kept=rollout.kept,
        entropy=entropy,
        groups=rollout.groups if packed else None,
    )


def _head(model: Any, hidden: Tensor, target: Tensor, options: dict[str, Any]) -> TokenLogprobs:
    weight = model.head_weight
    if hidden.dtype == torch.float64:
        return reference_linear_logprobs(hidden, weight, target, **options)
    return linear_logprobs(hidden, weight, target, **options)


def _unwrapped(model: Any) -> Any:
    """The network inside of a wrapper such as peft's."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _lengths(mask: Tensor) -> Tensor:
    """Tokens of each row up to the last of its response."""
    places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return (places * mask).amax(1).clamp(min=1)


def _prompts(mask: Tensor, lengths: Tensor) -> Tensor:
    """Tokens before a row's response; all of its tokens where it has none."""
    first = mask.long().argmax(1)
    return torch.where(mask.any(1), first, lengths)
