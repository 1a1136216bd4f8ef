"""Log-probabilities under models of transformers, through our op."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from arcore.nn.rollout import TokenStats
from arcore.ops import TokenLogprobs, linear_logprobs


def causal_lm_stats(
    model: Any, ids: Tensor, mask: Tensor, keep: int, *, temperature: float = 1.0, entropy: bool = True
) -> TokenStats:
    """Log-probabilities of the last `keep` tokens under a causal model of transformers, through `linear_logprobs`.

    Args:
        model: with a decoder below `get_output_embeddings()`, such as `LlamaForCausalLM`; peft's wrapper may be around.
        ids: int64 `[B, L]`.
        mask: `[B, L]`, 0 at padding.
        keep: tokens T at the end of each row.
        temperature: divides the logits.
        entropy: also give entropies.

    Returns:
        `[B, T]` each; what stands at padding means nothing.

    Raises:
        ValueError: keep does not fit.
        TypeError: the model has no such parts.
    """
    if not 1 <= keep < ids.shape[1]:
        raise ValueError(
            f"arcore.causal_lm_stats: expected 1 <= keep < {ids.shape[1]} but got {keep}; a token is predicted from "
            "the one before it, so the first cannot be scored"
        )
    decoder, head = _parts(model)
    out = decoder(input_ids=ids, attention_mask=mask, use_cache=False)
    hidden = out.last_hidden_state[:, -keep - 1 : -1]
    found = head(hidden, ids[:, -keep:], temperature=temperature, return_entropy=entropy)
    return TokenStats(found.logp, found.entropy, found.logsumexp)


def completion_logprobs(model: Any, ids: Tensor, attention: Tensor, completion: Tensor) -> Tensor:
    """Log-probabilities of the tokens that a mask names, under a causal model of transformers, with gradient.

    Rows of the head are computed for these tokens alone.

    Args:
        model: see `causal_lm_stats`.
        ids: int64 `[B, L]`, right-padded.
        attention: `[B, L]`, 0 at padding.
        completion: `[B, L]`, not 0 at tokens to score; none in the first column.

    Returns:
        `[B, L]`, 0 elsewhere.

    Raises:
        ValueError: the mask names a first token, which nothing predicts.
        TypeError: see `causal_lm_stats`.
    """
    chosen = completion != 0
    if chosen[:, :1].any():
        raise ValueError(
            "arcore.completion_logprobs: expected no completion to begin with the first token, which nothing "
            "predicts; give prompts of at least one token"
        )
    decoder, head = _parts(model)
    hidden = decoder(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state
    rows, places = chosen.nonzero(as_tuple=True)
    logp = head(hidden[rows, places - 1], ids[rows, places]).logp
    out: Tensor = logp.new_zeros(ids.shape).index_put((rows, places), logp)
    return out


def _parts(model: Any) -> tuple[Any, Any]:
    """The decoder of a causal language model, and what scores targets from its states."""
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = getattr(whole, getattr(whole, "base_model_prefix", "") or "model", None)
    head = whole.get_output_embeddings() if hasattr(whole, "get_output_embeddings") else None
    if decoder is None or decoder is whole or head is None or not hasattr(head, "weight"):
        raise TypeError(
            f"arcore.causal_lm_stats: expected a causal language model of transformers but got {type(whole).__name__}"
        )
    cap = getattr(whole.config, "final_logit_softcapping", None)
    return decoder, partial(_score, head, cap)


def _score(head: Any, cap: float | None, hidden: Tensor, target: Tensor, **options: Any) -> TokenLogprobs:
    bias = getattr(head, "bias", None)
    return linear_logprobs(hidden, head.weight, target, bias=bias, softcap=cap, **options)
