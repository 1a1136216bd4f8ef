"""Fused sampling: `sample`, `filter_probs`, `confidence_mask`, their references and fakes.

The algorithm and the numerics are in csrc/sample/README.md; the exact rules are in _sample_reference.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack

from arcore import _extension as _extension
from arcore.ops import _sample_reference as rules
from arcore.ops._checks import REFUSALS, checked_call, int64, integer, same_device
from arcore.ops._constants import constant
from arcore.ops._registration import refuse_zero_derivative, untracked

Order = Literal["hf", "vllm", "joint"]
Mode = Literal["inverse_cdf", "gumbel", "greedy"]
Ties = Literal["exact", "all", "none"]
TopPTies = Literal["together", "sorted"]
Guidance = Literal["before", "after"]
Setting = float | Tensor | None

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
MAX_SOURCES = 8
ORDERS = get_args(Order)
MODES = get_args(Mode)
GUIDANCES = get_args(Guidance)
_SAMPLE = torch.ops.arcore.sample.default._op
# What a filter that is not wanted is set to; the order of the columns is that of csrc/sample/params.h.
OFF = dict(
    zip(
        rules.COLUMNS,
        (1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0),
        strict=True,
    )
)


class Sampled(NamedTuple):
    """What `sample` returns when more than the tokens is asked for; None where it was not.

    Shapes: `[...]` are the leading dimensions of the logits, with `num_samples` behind them if that is not 1.

    Attributes:
        tokens: int64 `[...]`, -1 in rows without a distribution.
        logprob: float32 `[...]`, log-probability of the token, raw or processed; NaN in invalid rows. Bit for bit what
            `token_logprobs` gives for the same logits, temperature and `kept` as mask.
        prob: float32 `[...]`, processed probability of the token, the number that `filter_probs` has; NaN likewise.
        entropy: float32 `[...]` without `num_samples`, entropy of the processed distribution in nats; NaN likewise.
        valid: bool `[...]` without `num_samples`.
        kept: int32 `[..., ceil(V / 32)]` without `num_samples`, the tokens that passed all filters: bit i % 32 of
            word i // 32. Can be given back as `mask`.
    """

    tokens: Tensor
    logprob: Tensor | None = None
    prob: Tensor | None = None
    entropy: Tensor | None = None
    valid: Tensor | None = None
    kept: Tensor | None = None


class FilteredProbs(NamedTuple):
    """What `filter_probs` returns when more than the probabilities is asked for; see `Sampled`."""

    probs: Tensor
    entropy: Tensor | None = None
    valid: Tensor | None = None
    kept: Tensor | None = None


def sample(
    logits: Tensor | Sequence[Tensor],
    *,
    uncond: Tensor | None = None,
    cfg_scale: Setting = None,
    weights: Sequence[float | Tensor] | None = None,
    temperature: Setting = 1.0,
    top_k: int | Tensor | None = None,
    top_p: Setting = None,
    min_p: Setting = None,
    typical_p: Setting = None,
    epsilon: Setting = None,
    eta: Setting = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    repetition_penalty: Setting = None,
    presence_penalty: Setting = None,
    frequency_penalty: Setting = None,
    history: Tensor | None = None,
    prompt: Tensor | None = None,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    num_samples: int = 1,
    guidance: Guidance = "before",
    order: Order = "hf",
    mode: Mode = "inverse_cdf",
    min_tokens_to_keep: int = 1,
    top_p_ties: TopPTies = "together",
    return_logprob: Literal["raw", "processed"] | None = None,
    return_prob: bool = False,
    return_entropy: bool = False,
    return_valid: bool = False,
    return_kept: bool = False,
    check: bool = False,
    out: Tensor | None = None,
) -> Tensor | Sampled:
    """Draw tokens from logits: guidance, bias, penalties, masks, temperature, filters and the draw in one pass.

    A row goes through these steps, in float32 whatever the type of the logits:

    1. mix: `weights[0] * logits[0] + weights[1] * logits[1] + ...`. Guidance is short for the weights
       `(cfg_scale, 1 - cfg_scale)` of `(logits, uncond)`. A token that the first tensor forbids (-inf) stays forbidden;
       where a tensor of negative weight has -inf, the first tensor's logit stands in, so that no NaN or +inf arises.
    2. add `bias`.
    3. tokens of `prompt` and `history`: logit / repetition_penalty if it is positive, times it if not; tokens of
       `history`: minus frequency_penalty * occurrences, minus presence_penalty.
    4. forbid what `mask` does not allow.
    5. divide the distance to the largest logit by `temperature`; 0 (anything below 1e-5) takes the likeliest token, the
       lowest id among equals, and the processed distribution is all on it.
    6. filter, in the order below. Tokens that tie at a threshold are kept or dropped together, and a filter always
       keeps a token:
       `top_k` keeps tokens with fewer than k strictly larger logits; `top_p` those with less than share p of the
       mass strictly above them; `min_p` those of at least min_p times the largest probability; `typical_p` the
       smallest set of least `|-log p - H|` that reaches the mass; `epsilon` those of at least that probability;
       `eta` those of at least `min(eta, sqrt(eta) * exp(-H))`.
    7. renormalise and draw.

    Orders: "hf" runs top_k, top_p, min_p, typical_p, epsilon, eta, each on what the one before left, as transformers
    does. "vllm" runs min_p before top_k. "joint" tests every filter on the unfiltered distribution and keeps what
    passes all (flashinfer's joint); should nothing pass, the likeliest tokens stay.

    Off: `top_k` None, 0, -1 or >= V; `top_p`, `typical_p` None or 1; `min_p`, `epsilon`, `eta` None or 0;
    penalties None (or 1, 0, 0). `top_p=0` keeps the likeliest tokens only, in every order.

    Random numbers: a draw takes one number, a function of (seed, offset, number of the draw) and of nothing else
    (Philox4x32-10), so a row draws the same alone and in any batch. `offset` is the position of the token. The draw
    equals, bit for bit, the first token whose cumulative sum over `filter_probs(...)` is above the number
    (csrc/common/inverse_cdf.h), in every instruction set and for any number of threads.

    Rows without a distribution give token -1 and valid False, and touch no other row: a NaN among the allowed logits,
    all logits -inf or forbidden, a setting out of its range (below). Where logits are +inf, these share the mass.

    Ranges of settings, ends included: `temperature` 0 to 3e38, `top_k` from -1 on, `top_p`, `min_p`, `typical_p`,
    `epsilon` and `eta` 0 to 1, `repetition_penalty` 1e-6 to 1e6, the other penalties, `cfg_scale` and `weights` -3e38
    to 3e38. A number outside is a ValueError; in a tensor, which nobody reads before, it makes its row invalid.

    Args:
        logits: `[..., V]`, float32, bfloat16 or float16, or 1 to 8 of them to mix. Up to three dimensions of any
            strides are read in place.
        uncond: logits without the condition, of the same shape.
        cfg_scale: strength of guidance, 1 for none; number or per row.
        weights: one number, or tensor per row, for each tensor of `logits`.
        temperature: number, or tensor that broadcasts to `[...]`, as all settings down to `eta`; None stands for off.
        top_k: how many of the likeliest tokens to keep; an integer.
        top_p: mass of the nucleus.
        min_p: share of the largest probability.
        typical_p: mass of the typical set.
        epsilon: least probability.
        eta: least probability, lowered where the entropy is high.
        mask: what may be drawn: bool, broadcasts to `[..., V]`, or int32, broadcasts to `[..., ceil(V / 32)]`, bit
            i % 32 of word i // 32.
        bias: broadcasts to `[..., V]`.
        repetition_penalty: number or per row; 1 is off. Another number needs `history` or `prompt`, which may be empty;
            in a tensor a penalty without them has no effect.
        presence_penalty: number or per row; 0 is off. Another number needs `history`.
        frequency_penalty: likewise.
        history: generated ids, int64, broadcasts to `[..., L]`; numbers outside [0, V) are padding.
        prompt: ids before them, int64, likewise.
        seed: int64 per row, broadcasts to `[...]`; a number for a single row, or together with an `offset` per row.
        offset: int64 per row or number, default 0.
        generator: draws the seeds, if `seed` is None; None means torch's global one.
        num_samples: draws per row, independent, with replacement.
        guidance: "before" mixes first, as `generate(guidance_scale=...)` of transformers does; "after" puts `bias` and
            penalties on each tensor of logits and mixes then, as its `ClassifierFreeGuidanceLogitsProcessor` does
            behind them. That takes a float32 copy of each tensor, and makes the mixed logits of
            `return_logprob="raw"` those of what was penalised.
        order: of the filters.
        mode: "inverse_cdf"; "gumbel", V numbers per draw; "greedy", the likeliest of the processed tokens, the lowest
            id among equals.
        min_tokens_to_keep: each filter keeps at least so many tokens, the likeliest ("typical_p": the most typical),
            ties included, as in transformers; "joint" keeps them in the end. Above 1 the filters run one by one, with
            up to two passes over the logits each.
        top_p_ties: "together" keeps or drops tokens that tie at the edge of the nucleus together; "sorted" takes the
            lowest ids of them until the mass is reached, by a sort, with the filters run one by one; not with "joint".
        return_logprob: "processed": of the distribution that is drawn from; "raw": of the mixed logits, NaN if one of
            these is NaN or +inf.
        return_prob: also return `Sampled.prob`.
        return_entropy: also return `Sampled.entropy`.
        return_valid: also return `Sampled.valid`.
        return_kept: also return `Sampled.kept`.
        check: raise if a row has no distribution; waits for the result.
        out: int64 tensor for the tokens.

    Returns:
        int64 tokens `[...]`, `[..., num_samples]` if that is not 1; a `Sampled` if more is asked for. Without gradient.

    Raises:
        TypeError: an unsupported dtype or kind of argument, or a fraction where an integer is wanted.
        ValueError: shapes or devices do not fit, a number is out of its range, rows would share their random numbers,
            or `check` found an invalid row.

    References: Philox (Salmon et al., SC 2011); top-p (arXiv:1904.09751), typical (arXiv:2202.00666), epsilon and eta
    (arXiv:2210.15191), min-p (arXiv:2407.01082); guidance in logits (arXiv:2306.17806).
    """
    name = "arcore.sample"
    if (
        bias is None and mask is None and history is None and prompt is None and weights is None
        and guidance == "before" and top_p_ties == "together" and min_tokens_to_keep == 1
        and return_logprob in (None, "raw", "processed") and isinstance(logits, Tensor)
        and logits.is_cpu and untracked(logits, uncond)
    ):  # fmt: skip
        quick = found = None
        try:  # the op checks tensors itself; the words for what it refuses are found below
            if type(num_samples) is int and num_samples >= 1:
                quick = _quick_problem(
                    logits, uncond, cfg_scale,
                    (temperature, top_k, top_p, min_p, typical_p, epsilon, eta,
                     repetition_penalty, presence_penalty, frequency_penalty),
                    seed, offset, generator, mode,
                )  # fmt: skip
            if quick is not None:
                found = _SAMPLE(
                    *quick, num_samples, ORDERS.index(order), MODES.index(mode), return_prob,
                    return_logprob == "processed", return_logprob == "raw", return_entropy, return_kept,
                )  # fmt: skip
        except REFUSALS:
            pass
        if found is not None:
            if check:
                _raise_if_invalid(name, found[5], logits.shape[:-1])
            if not (return_logprob or return_prob or return_entropy or return_valid or return_kept):
                return _into(name, out, _shaped(found[0], logits.shape[:-1], num_samples))
            return _sampled(
                name, found, logits.shape[:-1], logits.shape[-1], num_samples, return_logprob, return_prob,
                return_entropy, return_valid, return_kept, out,
            )  # fmt: skip
    if _guides_after(name, guidance):
        logits, uncond = _penalised(
            name,
            logits,
            uncond,
            bias,
            (repetition_penalty, presence_penalty, frequency_penalty),
            history,
            prompt,
        )
        bias = repetition_penalty = presence_penalty = frequency_penalty = history = prompt = None
    if _runs_one_by_one(name, min_tokens_to_keep, top_p_ties, top_p, order):
        mask = _keep_at_least(
            filter_probs, min_tokens_to_keep, top_p_ties, mask, order,
            {"top_k": top_k, "top_p": top_p, "min_p": min_p,
             "typical_p": typical_p, "epsilon": epsilon, "eta": eta},
            logits=logits, uncond=uncond, cfg_scale=cfg_scale, weights=weights, temperature=temperature,
            bias=bias, repetition_penalty=repetition_penalty, presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty, history=history, prompt=prompt,
        )  # fmt: skip
        top_k = top_p = min_p = typical_p = epsilon = eta = None
    p = _prepare(
        name, logits, uncond, cfg_scale, weights, mask, bias, history, prompt, order,
        (temperature, top_k, top_p, min_p, typical_p, epsilon, eta,
         repetition_penalty, presence_penalty, frequency_penalty),
    )  # fmt: skip
    _check_choices(name, mode, num_samples, return_logprob)
    if return_logprob or return_prob or return_entropy:
        _refuse_derivative("sample", logits, uncond, bias, temperature, cfg_scale)
    seeds, offsets = _keys(name, p, seed, offset, generator, mode)
    found = checked_call(
        "sample", torch.ops.arcore.sample,
        p.logits, p.settings, p.bias, p.mask, p.history, p.prompt, seeds, offsets, num_samples,
        ORDERS.index(order), MODES.index(mode),
        return_prob, return_logprob == "processed", return_logprob == "raw", return_entropy, return_kept,
    )  # fmt: skip
    if check:
        _raise_if_invalid(name, found[5], p.lead)
    if not (return_logprob or return_prob or return_entropy or return_valid or return_kept):
        return _into(name, out, _shaped(found[0], p.lead, num_samples))
    return _sampled(
        name, found, p.lead, p.vocab, num_samples, return_logprob, return_prob, return_entropy, return_valid,
        return_kept, out,
    )  # fmt: skip


def _shaped(drawn: Tensor, lead: torch.Size, num_samples: int) -> Tensor:
    return drawn.view(lead if num_samples == 1 else (*lead, num_samples))


def _sampled(
    op: str,
    found: tuple[Tensor, ...],
    lead: torch.Size,
    vocab: int,
    num_samples: int,
    logprob: str | None,
    prob: bool,
    entropy: bool,
    valid: bool,
    kept: bool,
    out: Tensor | None,
) -> Sampled:
    chosen = found[3 if logprob == "raw" else 2]
    return Sampled(
        _into(op, out, _shaped(found[0], lead, num_samples)),
        _shaped(chosen, lead, num_samples) if logprob else None,
        _shaped(found[1], lead, num_samples) if prob else None,
        found[4].view(lead) if entropy else None,
        found[5].view(lead) if valid else None,
        found[6].view(*lead, (vocab + 31) // 32) if kept else None,
    )


def filter_probs(
    logits: Tensor | Sequence[Tensor],
    *,
    uncond: Tensor | None = None,
    cfg_scale: Setting = None,
    weights: Sequence[float | Tensor] | None = None,
    temperature: Setting = 1.0,
    top_k: int | Tensor | None = None,
    top_p: Setting = None,
    min_p: Setting = None,
    typical_p: Setting = None,
    epsilon: Setting = None,
    eta: Setting = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    repetition_penalty: Setting = None,
    presence_penalty: Setting = None,
    frequency_penalty: Setting = None,
    history: Tensor | None = None,
    prompt: Tensor | None = None,
    guidance: Guidance = "before",
    order: Order = "hf",
    min_tokens_to_keep: int = 1,
    top_p_ties: TopPTies = "together",
    return_entropy: bool = False,
    return_valid: bool = False,
    return_kept: bool = False,
    check: bool = False,
) -> Tensor | FilteredProbs:
    """The distribution that `sample` draws from, with the same arguments: processed and renormalised.

    Returns:
        float32 `[..., V]`, exactly 0 for tokens that were dropped, and 0 throughout in rows without a distribution; a
        `FilteredProbs` if more is asked for. Without gradient.

    Raises:
        TypeError, ValueError: as `sample`.
    """
    name = "arcore.filter_probs"
    _refuse_derivative("filter_probs", logits, uncond, bias, temperature, cfg_scale)
    if _guides_after(name, guidance):
        logits, uncond = _penalised(
            name,
            logits,
            uncond,
            bias,
            (repetition_penalty, presence_penalty, frequency_penalty),
            history,
            prompt,
        )
        bias = repetition_penalty = presence_penalty = frequency_penalty = history = prompt = None
    if _runs_one_by_one(name, min_tokens_to_keep, top_p_ties, top_p, order):
        mask = _keep_at_least(
            filter_probs, min_tokens_to_keep, top_p_ties, mask, order,
            {"top_k": top_k, "top_p": top_p, "min_p": min_p,
             "typical_p": typical_p, "epsilon": epsilon, "eta": eta},
            logits=logits, uncond=uncond, cfg_scale=cfg_scale, weights=weights, temperature=temperature,
            bias=bias, repetition_penalty=repetition_penalty, presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty, history=history, prompt=prompt,
        )  # fmt: skip
        top_k = top_p = min_p = typical_p = epsilon = eta = None
    p = _prepare(
        name, logits, uncond, cfg_scale, weights, mask, bias, history, prompt, order,
        (temperature, top_k, top_p, min_p, typical_p, epsilon, eta,
         repetition_penalty, presence_penalty, frequency_penalty),
    )  # fmt: skip
    probs: Tensor
    probs, entropy, valid, kept = checked_call(
        "filter_probs", torch.ops.arcore.filter_probs,
        p.logits, p.settings, p.bias, p.mask, p.history, p.prompt, ORDERS.index(order),
        return_entropy, return_kept,
    )  # fmt: skip
    if check:
        _raise_if_invalid(name, valid, p.lead)
    probs = probs.view(*p.lead, p.vocab)
    if not (return_entropy or return_valid or return_kept):
        return probs
    return FilteredProbs(
        probs,
        entropy.view(p.lead) if return_entropy else None,
        valid.view(p.lead) if return_valid else None,
        kept.view(*p.lead, (p.vocab + 31) // 32) if return_kept else None,
    )


def logits_from_probs(probs: Tensor) -> Tensor:
    """Logits to sample from probabilities with: their logarithm, -inf where one is 0.

    ``sample(logits_from_probs(probs), ...)`` draws from `probs`, which need not add up to 1, after all the
    processing of `sample`; `temperature`, `mask` and filters act as on the logits of a model.

    Args:
        probs: `[..., V]`, any float dtype, not negative.

    Returns:
        float32 `[..., V]`. A negative number gives NaN, which makes its row one without a distribution in `sample`, as
        does a NaN or a row of zeros. Without gradient.

    Raises:
        TypeError: probs are no tensor of a float dtype.
    """
    if not isinstance(probs, Tensor) or not probs.is_floating_point():
        got = _name(probs.dtype) if isinstance(probs, Tensor) else type(probs).__name__
        raise TypeError(
            f"arcore.logits_from_probs: expected probs to be a tensor of a float dtype but got {got}; "
            "convert it with .float()"
        )
    refuse_zero_derivative("logits_from_probs", probs)
    # The logarithm comes first: float64 has probabilities that are 0 in float32.
    exact = probs.detach() if probs.dtype == torch.float64 else probs.detach().float()
    return exact.log().float()


def confidence_mask(
    confidence: Tensor,
    count: int | Tensor,
    *,
    candidates: Tensor | None = None,
    temperature: float = 0.0,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    ties: Ties = "exact",
) -> Tensor:
    """Choose the least confident positions, to be masked and predicted again.

    The rule of masked decoders: MaskGIT and MAGE rank by log-probability plus Gumbel noise that cools down, HMAR by the
    processed probability of the drawn token (`sample(..., return_prob=True)`). NaN counts as the least confident.

    Equal confidences at the cut: "exact" chooses precisely `count` positions, the lowest ones of those that tie (HMAR's
    sort); "all" takes every position that ties, so perhaps more (MAGE: confidence <= the count-th smallest); "none"
    takes none of them if not all fit, so perhaps fewer (MaskGIT, aMUSEd: confidence < the next smallest).

    Args:
        confidence: `[..., N]`, any float dtype; float32 is used.
        count: how many per row; number, or int64 tensor that broadcasts to `[...]`. Clamped to the candidates.
        candidates: bool, broadcasts to `[..., N]`; positions that may be chosen. MaskGIT's known tokens are no
            candidates. None means all.
        temperature: factor of the Gumbel noise; 0 for none.
        seed: see `sample`; used if `temperature` is not 0. A row's noise depends on its own key.
        offset: see `sample`.
        generator: see `sample`.
        ties: see above.

    Returns:
        bool `[..., N]`, True where chosen.

    Raises:
        TypeError, ValueError: a dtype, shape or number does not fit.

    References: MaskGIT (arXiv:2202.04200, section 3.2), MAGE (arXiv:2211.09117), HMAR (arXiv:2506.04421).
    """
    p = _prepare_confidence(confidence, count, candidates, temperature, seed, offset, generator, ties)
    chosen: Tensor = checked_call(
        "confidence_mask",
        torch.ops.arcore.confidence_mask,
        *p,
        float(temperature),
        get_args(Ties).index(ties),
    )
    return chosen.view(confidence.shape)


def reference_sample(
    logits: Tensor | Sequence[Tensor],
    *,
    uncond: Tensor | None = None,
    cfg_scale: Setting = None,
    weights: Sequence[float | Tensor] | None = None,
    temperature: Setting = 1.0,
    top_k: int | Tensor | None = None,
    top_p: Setting = None,
    min_p: Setting = None,
    typical_p: Setting = None,
    epsilon: Setting = None,
    eta: Setting = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    repetition_penalty: Setting = None,
    presence_penalty: Setting = None,
    frequency_penalty: Setting = None,
    history: Tensor | None = None,
    prompt: Tensor | None = None,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    num_samples: int = 1,
    guidance: Guidance = "before",
    order: Order = "hf",
    mode: Mode = "inverse_cdf",
    min_tokens_to_keep: int = 1,
    top_p_ties: TopPTies = "together",
    return_logprob: Literal["raw", "processed"] | None = None,
    return_prob: bool = False,
    return_entropy: bool = False,
    return_valid: bool = False,
    return_kept: bool = False,
    check: bool = False,
    out: Tensor | None = None,
) -> Tensor | Sampled:
    """`sample` in plain PyTorch, row by row: the same tokens and probabilities to the last bit.

    Log-probabilities and entropies agree to rounding. Arguments, returns and errors are those of `sample`.
    """
    name = "arcore.sample"
    if _guides_after(name, guidance):
        logits, uncond = _penalised(
            name,
            logits,
            uncond,
            bias,
            (repetition_penalty, presence_penalty, frequency_penalty),
            history,
            prompt,
        )
        bias = repetition_penalty = presence_penalty = frequency_penalty = history = prompt = None
    if _runs_one_by_one(name, min_tokens_to_keep, top_p_ties, top_p, order):
        mask = _keep_at_least(
            reference_filter_probs, min_tokens_to_keep, top_p_ties, mask, order,
            {"top_k": top_k, "top_p": top_p, "min_p": min_p,
             "typical_p": typical_p, "epsilon": epsilon, "eta": eta},
            logits=logits, uncond=uncond, cfg_scale=cfg_scale, weights=weights, temperature=temperature,
            bias=bias, repetition_penalty=repetition_penalty, presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty, history=history, prompt=prompt,
        )  # fmt: skip
        top_k = top_p = min_p = typical_p = epsilon = eta = None
    p = _prepare(
        name, logits, uncond, cfg_scale, weights, mask, bias, history, prompt, order,
        (temperature, top_k, top_p, min_p, typical_p, epsilon, eta,
         repetition_penalty, presence_penalty, frequency_penalty),
    )  # fmt: skip
    _check_choices(name, mode, num_samples, return_logprob)
    seeds, offsets = (k.expand(p.rows).tolist() for k in _keys(name, p, seed, offset, generator, mode))
    tokens, probs, logprobs, results = [], [], [], []
    for r in range(p.rows):
        row = _row(p, r, order)
        result = rules.process_row(row)
        chosen = rules.draw_row(result, seeds[r], offsets[r], num_samples, mode)
        raw = rules.mixed_row(row)
        total = rules.log_sum_exp(raw, p.vocab) if return_logprob == "raw" and result.valid else math.nan
        for token in chosen:
            tokens.append(token)
            probs.append(result.probs[token].item() if result.valid else math.nan)
            if not result.valid:
                logprobs.append(math.nan)
            elif return_logprob == "raw":
                logprobs.append(raw[token].item() - total)
            else:
                logprobs.append(result.distance[token].item() - math.log(result.total))
        results.append(result)
    valid = torch.tensor([r.valid for r in results], dtype=torch.bool)
    if check:
        _raise_if_invalid(name, valid, p.lead)
    draws = (*p.lead, num_samples) if num_samples != 1 else p.lead
    drawn = _into(name, out, torch.tensor(tokens, dtype=torch.int64).view(draws))
    if not (return_logprob or return_prob or return_entropy or return_valid or return_kept):
        return drawn
    return Sampled(
        drawn,
        torch.tensor(logprobs, dtype=torch.float32).view(draws) if return_logprob else None,
        torch.tensor(probs, dtype=torch.float32).view(draws) if return_prob else None,
        torch.tensor([r.entropy for r in results], dtype=torch.float32).view(p.lead)
        if return_entropy
        else None,
        valid.view(p.lead) if return_valid else None,
        _pack([r.kept for r in results], p) if return_kept else None,
    )


def reference_filter_probs(
    logits: Tensor | Sequence[Tensor],
    *,
    uncond: Tensor | None = None,
    cfg_scale: Setting = None,
    weights: Sequence[float | Tensor] | None = None,
    temperature: Setting = 1.0,
    top_k: int | Tensor | None = None,
    top_p: Setting = None,
    min_p: Setting = None,
    typical_p: Setting = None,
    epsilon: Setting = None,
    eta: Setting = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    repetition_penalty: Setting = None,
    presence_penalty: Setting = None,
    frequency_penalty: Setting = None,
    history: Tensor | None = None,
    prompt: Tensor | None = None,
    guidance: Guidance = "before",
    order: Order = "hf",
    min_tokens_to_keep: int = 1,
    top_p_ties: TopPTies = "together",
    return_entropy: bool = False,
    return_valid: bool = False,
    return_kept: bool = False,
    check: bool = False,
) -> Tensor | FilteredProbs:
    """`filter_probs` in plain PyTorch, row by row: the same probabilities to the last bit."""
    name = "arcore.filter_probs"
    if _guides_after(name, guidance):
        logits, uncond = _penalised(
            name,
            logits,
            uncond,
            bias,
            (repetition_penalty, presence_penalty, frequency_penalty),
            history,
            prompt,
        )
        bias = repetition_penalty = presence_penalty = frequency_penalty = history = prompt = None
    if _runs_one_by_one(name, min_tokens_to_keep, top_p_ties, top_p, order):
        mask = _keep_at_least(
            reference_filter_probs, min_tokens_to_keep, top_p_ties, mask, order,
            {"top_k": top_k, "top_p": top_p, "min_p": min_p,
             "typical_p": typical_p, "epsilon": epsilon, "eta": eta},
            logits=logits, uncond=uncond, cfg_scale=cfg_scale, weights=weights, temperature=temperature,
            bias=bias, repetition_penalty=repetition_penalty, presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty, history=history, prompt=prompt,
        )  # fmt: skip
        top_k = top_p = min_p = typical_p = epsilon = eta = None
    p = _prepare(
        name, logits, uncond, cfg_scale, weights, mask, bias, history, prompt, order,
        (temperature, top_k, top_p, min_p, typical_p, epsilon, eta,
         repetition_penalty, presence_penalty, frequency_penalty),
    )  # fmt: skip
    results = [rules.process_row(_row(p, r, order)) for r in range(p.rows)]
    valid = torch.tensor([r.valid for r in results], dtype=torch.bool)
    if check:
        _raise_if_invalid(name, valid, p.lead)
    probs = torch.stack([r.probs for r in results]) if results else torch.empty(0)
    probs = probs.view(*p.lead, p.vocab)
    if not (return_entropy or return_valid or return_kept):
        return probs
    entropy = torch.tensor([r.entropy for r in results], dtype=torch.float32)
    return FilteredProbs(
        probs,
        entropy.view(p.lead) if return_entropy else None,
        valid.view(p.lead) if return_valid else None,
        _pack([r.kept for r in results], p) if return_kept else None,
    )


def reference_confidence_mask(
    confidence: Tensor,
    count: int | Tensor,
    *,
    candidates: Tensor | None = None,
    temperature: float = 0.0,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    ties: Ties = "exact",
) -> Tensor:
    """`confidence_mask` in plain Python: the same positions."""
    p = _prepare_confidence(confidence, count, candidates, temperature, seed, offset, generator, ties)
    rows = len(p.confidence)
    counts, seeds, offsets = (t.expand(rows).tolist() for t in (p.counts, p.seed, p.offset))
    chosen = [
        rules.select_least(
            p.confidence[r],
            None if p.candidates is None else p.candidates[r],
            counts[r],
            seeds[r],
            offsets[r],
            temperature,
            ties,
        )
        for r in range(rows)
    ]
    return torch.stack(chosen).view(confidence.shape) if chosen else confidence.bool()


def _guides_after(op: str, guidance: str) -> bool:
    if guidance not in GUIDANCES:
        raise ValueError(f"{op}: expected guidance 'before' or 'after' but got {guidance!r}")
    return guidance == "after"


def _penalised(
    op: str,
    logits: Tensor | Sequence[Tensor],
    uncond: Tensor | None,
    bias: Tensor | None,
    penalties: tuple[Setting, Setting, Setting],
    history: Tensor | None,
    prompt: Tensor | None,
) -> tuple[list[Tensor], Tensor | None]:
    """`logits` and `uncond`, each with bias and penalties, float32; rows whose settings are out of range are NaN."""
    names = ("repetition_penalty", "presence_penalty", "frequency_penalty")
    one = isinstance(logits, Tensor)
    # The checks of what else may be wrong, in the words of a call that guides first.
    checked = _prepare(
        op, logits, uncond, None if uncond is None else 1.0,
        None if one else [1.0] * len(logits), None, bias, history, prompt, "hf",
        (None,) * 7 + penalties,
    )  # fmt: skip
    sources = [logits] if isinstance(logits, Tensor) else list(logits)
    lead, vocab = checked.lead, checked.vocab
    values: list[Any] = []
    good: Tensor | None = None
    for name, value in zip(names, penalties, strict=True):
        if not isinstance(value, Tensor):
            values.append(_number(op, name, value))
            continue
        low, high = rules.RANGES[name]
        row = _broadcast(op, name, value.double(), lead).unsqueeze(-1)
        fits = (row >= low) & (row <= high)
        good = fits if good is None else good & fits
        values.append(torch.where(fits, row, 1.0).float())
    repetition, presence, frequency = values

    def occurrences(ids: Tensor | None) -> Tensor | None:
        if ids is None:
            return None
        full = _broadcast(op, "history", ids, (*lead, ids.shape[-1]))
        real = (full >= 0) & (full < vocab)
        counts = torch.zeros(*lead, vocab + 1, device=full.device)  # one column more, for padding
        return counts.scatter_add(-1, torch.where(real, full, vocab), real.float())[..., :vocab]

    written, read = occurrences(history), occurrences(prompt)

    def change(x: Tensor) -> Tensor:
        y = x.detach().float()
        if bias is not None:
            y = y + bias.float()
        seen = [counts > 0 for counts in (written, read) if counts is not None]
        if seen:
            y = torch.where(seen[0] | seen[-1], torch.where(y > 0, y / repetition, y * repetition), y)
        if written is not None:
            y = y - frequency * written - presence * (written > 0)
        return y if good is None else torch.where(good, y, math.nan)

    return [change(x) for x in sources], None if uncond is None else change(uncond)


def _runs_one_by_one(op: str, least: int, ties: str, top_p: Setting, order: str) -> bool:
    least = int64(op, "min_tokens_to_keep", least)
    if least < 1:
        raise ValueError(
            f"{op}: expected min_tokens_to_keep >= 1 but got {least}; a filter always keeps a token"
        )
    if ties not in ("together", "sorted"):
        raise ValueError(f"{op}: expected top_p_ties 'together' or 'sorted' but got {ties!r}")
    if ties == "sorted" and order == "joint":
        raise ValueError(
            f"{op}: expected top_p_ties='together' with order='joint' but got 'sorted'; take order='hf'"
        )
    return least > 1 or (ties == "sorted" and top_p is not None)


def _keep_at_least(
    probs_of: Callable[..., Any],
    least: int,
    ties: str,
    mask: Tensor | None,
    order: str,
    filters: dict[str, Any],
    **rest: Any,
) -> Tensor:
    """The kept set of filters that leave at least `least` tokens each, int32 `[..., ceil(V / 32)]`.

    A kept set given back as mask gives the distribution that the next filter has to see. Rows without a distribution
    have nothing in it, so that they stay without one.
    """

    def keep(allowed: Tensor | None, order: str = "hf", **some: Any) -> Tensor:
        found = probs_of(**rest, mask=allowed, order=order, return_valid=True, return_kept=True, **some)
        kept: Tensor = torch.where(found.valid.unsqueeze(-1), found.kept, 0)
        return kept

    def with_least(kept: Tensor, likeliest: Tensor) -> Tensor:
        # A row whose settings are out of range has lost all its tokens.
        return torch.where((kept != 0).any(-1, keepdim=True), kept | likeliest, 0)

    if order == "joint":
        return with_least(keep(mask, order, **filters), keep(mask, top_k=least))
    names = ("min_p", "top_k", "top_p", "typical_p", "epsilon", "eta")
    if order == "hf":
        names = ("top_k", "top_p", "min_p", "typical_p", "epsilon", "eta")
    allowed = keep(mask)
    for name in names:
        if filters[name] is None:
            continue
        if name == "top_p" and ties == "sorted":
            # What the kernel keeps includes the sorted set, and nothing in rows whose settings are out of range.
            nucleus = _sorted_nucleus(probs_of, least, allowed, filters[name], rest)
            tied = keep(allowed, top_p=filters[name])
            if least > 1:
                tied = with_least(tied, keep(allowed, top_k=least))
            allowed = tied & nucleus
            continue
        typical = name == "typical_p"
        first = _most_typical(probs_of, least, allowed, rest) if typical else keep(allowed, top_k=least)
        allowed = with_least(keep(allowed, **{name: filters[name]}), first)
    return allowed


def _most_typical(probs_of: Callable[..., Any], least: int, allowed: Tensor, rest: dict[str, Any]) -> Tensor:
    """The `least` tokens whose surprise is nearest to the entropy, with all that tie, packed."""
    found = probs_of(**rest, mask=allowed, return_entropy=True)
    probs, vocab = found.probs, found.probs.shape[-1]
    distance = (-probs.log() - found.entropy.unsqueeze(-1)).abs()
    edge = distance.nan_to_num(math.inf).kthvalue(min(least, vocab), dim=-1, keepdim=True).values
    return _pack_bits((distance <= edge) & (probs > 0))


def _sorted_nucleus(
    probs_of: Callable[..., Any], least: int, allowed: Tensor, top_p: Setting, rest: dict[str, Any]
) -> Tensor:
    """The fewest tokens in order of falling probability, equals by id, that reach the mass, packed."""
    probs, order = probs_of(**rest, mask=allowed).sort(dim=-1, descending=True, stable=True)
    before = probs.double().cumsum(-1) - probs
    limit = top_p.double().unsqueeze(-1) if isinstance(top_p, Tensor) else top_p
    first = torch.arange(probs.shape[-1], device=probs.device) < least
    return _pack_bits(torch.zeros_like(probs, dtype=torch.bool).scatter(-1, order, (before < limit) | first))


def _pack_bits(chosen: Tensor) -> Tensor:
    """bool `[..., V]` as int32 `[..., ceil(V / 32)]`."""
    bits = torch.nn.functional.pad(chosen.int(), (0, -chosen.shape[-1] % 32)).unflatten(-1, (-1, 32))
    shifts = torch.arange(32, dtype=torch.int32, device=bits.device)
    packed: Tensor = (bits << shifts).sum(-1, dtype=torch.int32)
    return packed


class _Prepared(NamedTuple):
    """Checked arguments in the op's form: three dimensions, rows numbered in order."""

    logits: list[Tensor]  # [outer, inner, V] each
    settings: Tensor  # float64 [1 or rows, columns]
    bias: Tensor | None
    mask: Tensor | None
    history: Tensor | None
    prompt: Tensor | None
    lead: torch.Size
    rows: int
    vocab: int


_PLAIN = frozenset({int, float, type(None)})


def _quick_problem(
    logits: Tensor,
    uncond: Tensor | None,
    cfg_scale: Setting,
    settings: tuple[Setting, ...],
    seed: int | Tensor | None,
    offset: int | Tensor | None,
    generator: torch.Generator | None,
    mode: str,
) -> tuple[Any, ...] | None:
    """The op's arguments from `logits` to `offset` where all settings are numbers and nothing is to be broadcast.

    None where that is not so, or where something may be wrong: `_prepare` finds the words.
    """
    lead = logits.shape[:-1]
    if (uncond is None) != (cfg_scale is None) or len(lead) > 2:
        return None
    mix = (1.0,) if uncond is None else (cfg_scale, 1.0 - cfg_scale)  # type: ignore[operator]
    if settings[7:] != _NO_PENALTIES and _idle_penalty(settings[7:], None, None) is not None:
        return None
    if not _PLAIN.issuperset(map(type, settings + mix)):
        return None
    matrix = _kept_numbers("arcore.sample", logits.device, *settings, *mix)
    if mode == "greedy":
        seeds = offsets = _key(0)
    else:
        one = len(lead) == 0 or lead.numel() == 1
        if seed is None:
            rows = (lead.numel(),)
            if generator is None:
                seeds = torch.randint(-(2**63), 2**63 - 1, rows)
            elif generator.device.type == "cpu":
                seeds = torch.randint(-(2**63), 2**63 - 1, rows, generator=generator)
            else:
                return None
            one = True  # a seed per row
        elif generator is not None:
            return None
        elif type(seed) is int:
            seeds = _key(seed)
        elif isinstance(seed, Tensor) and seed.shape == lead and len(lead) == 1:
            seeds, one = seed, True
        else:
            return None
        if offset is None or type(offset) is int:
            offsets = _key(offset or 0)
        elif isinstance(offset, Tensor) and offset.shape == lead and len(lead) == 1:
            offsets, one = offset, True
        else:
            return None
        if not one:
            return None
    sources = [logits] if uncond is None else [logits, uncond]
    return sources, matrix, None, None, None, None, seeds, offsets


@lru_cache(maxsize=256)
def _key(number: int) -> Tensor:
    """One seed or offset, int64 ``[1]``. A decoder has one seed for all its steps; nobody writes to the tensor."""
    with torch.inference_mode(False):
        return torch.full((1,), number, dtype=torch.int64)


class _PreparedConfidence(NamedTuple):
    confidence: Tensor  # float32 [rows, N]
    candidates: Tensor | None  # bool [rows, N]
    counts: Tensor  # int64 [1 or rows]
    seed: Tensor
    offset: Tensor


_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
_NO_PENALTIES = (None, None, None)


def _idle_penalty(
    penalties: tuple[Setting, ...], history: Tensor | None, prompt: Tensor | None
) -> str | None:
    """Which penalty, a number that asks for something, would have no effect; a tensor may be off in every row."""
    for name, value, off in zip(_PENALTIES, penalties, (1, 0, 0), strict=True):
        asked = value is not None and not isinstance(value, Tensor) and value != off
        if asked and history is None and (prompt is None or off == 0):
            return name
    return None


def _prepare(
    op: str,
    logits: Tensor | Sequence[Tensor],
    uncond: Tensor | None,
    cfg_scale: Setting,
    weights: Sequence[float | Tensor] | None,
    mask: Tensor | None,
    bias: Tensor | None,
    history: Tensor | None,
    prompt: Tensor | None,
    order: str,
    settings: tuple[Setting, ...],
) -> _Prepared:
    if not isinstance(logits, (Tensor, list, tuple)):
        raise TypeError(f"{op}: expected logits to be a tensor or several but got {type(logits).__name__}")
    sources = [logits] if isinstance(logits, Tensor) else list(logits)
    for name, value in (("mask", mask), ("bias", bias), ("history", history), ("prompt", prompt)):
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{op}: expected {name} to be a tensor but got {type(value).__name__}")
    mix = _mix(op, sources, uncond, cfg_scale, weights)
    if uncond is not None:
        sources.append(uncond)
    same_device(op, logits=sources, mask=mask, bias=bias, history=history, prompt=prompt)
    first = sources[0]
    if order not in ORDERS:
        raise ValueError(f"{op}: expected order 'hf', 'vllm' or 'joint' but got {order!r}")
    for tensor in sources:
        if tensor.dtype not in SUPPORTED_DTYPES:
            raise TypeError(
                f"{op}: expected logits of dtype float32, bfloat16 or float16 but got {_name(tensor.dtype)}; "
                "convert them with .float()"
            )
        if tensor.dim() == 0 or tensor.shape != first.shape:
            raise ValueError(
                f"{op}: expected logits of shape (..., V), all of the same, but got {tuple(first.shape)} and "
                f"{tuple(tensor.shape)}"
            )
    lead, vocab = first.shape[:-1], first.shape[-1]
    packed = mask is not None and mask.dtype == torch.int32
    if mask is not None and not packed and mask.dtype != torch.bool:
        raise TypeError(
            f"{op}: expected mask of dtype bool, or int32 with 32 tokens per word, but got {_name(mask.dtype)}"
        )
    for name, ids in (("history", history), ("prompt", prompt)):
        if ids is None:
            continue
        if ids.dtype != torch.int64:
            raise TypeError(f"{op}: expected {name} of dtype int64 but got {_name(ids.dtype)}")
        if ids.dim() == 0:
            raise ValueError(
                f"{op}: expected {name} of shape (..., L) but got (); give it a dimension with [None]"
            )
    rows = [_three_dims(op, "logits", t, lead, vocab) for t in sources]
    matrix = _settings(op, settings, mix, lead, first.device)
    if settings[7:] != _NO_PENALTIES and (idle := _idle_penalty(settings[7:], history, prompt)) is not None:
        tokens = "history or prompt" if idle == "repetition_penalty" else "history"
        raise ValueError(
            f"{op}: {idle} acts on the tokens of {tokens}, and there are none: pass {tokens}, or leave {idle} out"
        )
    return _Prepared(
        rows,
        matrix,
        None if bias is None else _three_dims(op, "bias", bias.float(), lead, vocab),
        None
        if mask is None
        else _three_dims(op, "mask", mask, lead, (vocab + 31) // 32 if packed else vocab),
        None if history is None else _three_dims(op, "history", history, lead, history.shape[-1]),
        None if prompt is None else _three_dims(op, "prompt", prompt, lead, prompt.shape[-1]),
        lead,
        math.prod(lead),
        vocab,
    )


def _mix(
    op: str,
    sources: list[Tensor],
    uncond: Tensor | None,
    cfg_scale: Setting,
    weights: Sequence[float | Tensor] | None,
) -> tuple[float | Tensor, ...]:
    if not 1 <= len(sources) <= MAX_SOURCES:
        raise ValueError(f"{op}: expected 1 to {MAX_SOURCES} tensors of logits but got {len(sources)}")
    if (uncond is None) != (cfg_scale is None):
        raise ValueError(f"{op}: expected uncond and cfg_scale together but got only one of them")
    if uncond is not None and cfg_scale is not None:
        if len(sources) != 1 or weights is not None:
            raise ValueError(
                f"{op}: expected uncond with one tensor of logits and no weights; give weights for all"
            )
        return cfg_scale, 1.0 - cfg_scale
    if weights is None:
        if len(sources) > 1:
            raise ValueError(f"{op}: expected weights for {len(sources)} tensors of logits but got none")
        return (1.0,)
    if len(weights) != len(sources):
        raise ValueError(
            f"{op}: expected {len(sources)} weights, one per tensor of logits, but got {len(weights)}"
        )
    return tuple(weights)


def _settings(
    op: str,
    values: tuple[Setting, ...],
    mix: tuple[float | Tensor, ...],
    lead: torch.Size,
    device: torch.device,
) -> Tensor:
    """The settings matrix, float64 [1 or rows, columns]."""
    columns = (*values, *mix)
    if not any(isinstance(c, Tensor) for c in columns):
        if device.type != "cpu" or torch.compiler.is_compiling() or _modes_are_active():
            return _numbers(op, device, *columns)
        try:
            return _kept_numbers(op, device, *columns)
        except TypeError:  # something that cannot be looked up: the message says what
            return _numbers(op, device, *columns)
    full = []
    for name, column in zip(_names(len(mix)), columns, strict=True):
        tensor = column if isinstance(column, Tensor) else None
        if tensor is None:
            number = constant((_number(op, name, column),), torch.float64, device)
            full.append(number.expand(math.prod(lead)))
            continue
        if tensor.device != device:
            raise ValueError(
                f"{op}: expected {name} on the device of logits, {device}, but got {tensor.device}; "
                f"move it with {name}.to('{device}')"
            )
        if tensor.dtype.is_complex or (name == "top_k" and tensor.dtype not in INTEGERS):
            kind = "an integer dtype" if name == "top_k" else "a real dtype"
            raise TypeError(f"{op}: expected {name} of {kind} but got {_name(tensor.dtype)}")
        if name == "temperature":
            tensor = tensor.float()  # as token_logprobs uses it
        full.append(_broadcast(op, name, tensor.double(), lead).reshape(-1))
    return torch.stack(full, dim=1)


def _names(sources: int) -> tuple[str, ...]:
    return *rules.COLUMNS, *("weights",) * sources


def _numbers(op: str, device: torch.device, *columns: Any) -> Tensor:
    """Checked numbers as a settings matrix of one row."""
    names = _names(len(columns) - len(OFF))
    numbers = tuple(_number(op, name, value) for name, value in zip(names, columns, strict=True))
    return constant(numbers, torch.float64, device).unsqueeze(0)


# A decoder uses the same settings at each step; a call without a tensor among them is not checked twice. Types are part
# of the key, since 2 == 2.0 == True.
_kept_numbers = lru_cache(maxsize=1024, typed=True)(_numbers)


def _modes_are_active() -> bool:
    """Whether somebody follows the calls, with fake tensors for instance: what is kept may not be made or used then."""
    return _len_torch_dispatch_stack() > 0


def _number(op: str, name: str, value: Any) -> float:
    if value is None:
        return OFF[name]
    low, high = rules.RANGES[name]
    if name == "top_k":
        value = integer(op, name, value)
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except TypeError:
        raise TypeError(f"{op}: expected {name} to be a number or a tensor but got {value!r}") from None
    if not low <= number <= high:
        label = "cfg_scale and weights" if name == "weights" else name
        raise ValueError(f"{op}: expected {label} in [{low:g}, {high:g}] but got {value!r}")
    return number


def _broadcast(op: str, name: str, tensor: Tensor, shape: Sequence[int]) -> Tensor:
    # Compared one by one: sizes may be symbols while a graph is traced.
    fits = tensor.dim() <= len(shape)
    same = tensor.dim() == len(shape)
    for i in range(1, tensor.dim() + 1 if fits else 1):
        have, want = tensor.shape[-i], shape[len(shape) - i]
        if have != want:
            same = False
            fits = fits and have == 1
    if not fits:
        raise ValueError(
            f"{op}: expected {name} of a shape that broadcasts to {tuple(shape)} but got {tuple(tensor.shape)}"
        )
    return tensor if same else tensor.expand(shape)


def _three_dims(op: str, name: str, tensor: Tensor, lead: torch.Size, last: int) -> Tensor:
    full = _broadcast(op, name, tensor, (*lead, last))
    if full.requires_grad:
        full = full.detach()
    while full.dim() < 3:
        full = full.unsqueeze(0)
    return full if full.dim() == 3 else full.reshape(-1, lead[-1], last)


def _keys(
    op: str,
    p: _Prepared,
    seed: int | Tensor | None,
    offset: int | Tensor | None,
    generator: torch.Generator | None,
    mode: str,
) -> tuple[Tensor, Tensor]:
    """Seeds and offsets, int64 `[1 or rows]`."""
    device = p.logits[0].device
    if mode == "greedy":
        zero = torch.zeros(1, dtype=torch.int64, device=device)
        return zero, zero
    return _row_keys(op, p.lead, device, seed, offset, generator)


def _refuse_derivative(op: str, logits: Any, *others: Any) -> None:
    sources = logits if isinstance(logits, (list, tuple)) else (logits,)
    refuse_zero_derivative(op, *sources, *others)


def _row_keys(
    op: str,
    lead: torch.Size,
    device: torch.device,
    seed: int | Tensor | None,
    offset: int | Tensor | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"{op}: expected generator to be a torch.Generator but got {type(generator).__name__}; "
            "pass a number as seed"
        )
    if seed is None:
        if generator is None:
            seed = torch.randint(-(2**63), 2**63 - 1, lead, device=device)
        else:
            where = generator.device
            seed = torch.randint(-(2**63), 2**63 - 1, lead, generator=generator, device=where).to(device)
    elif generator is not None:
        raise ValueError(f"{op}: expected seed or generator but got both; give one")
    keys = []
    for name, key in (("seed", seed), ("offset", 0 if offset is None else offset)):
        if not isinstance(key, Tensor):
            number = int64(op, name, key)
            keys.append(torch.full((), number, dtype=torch.int64, device=device))
            continue
        if key.dtype != torch.int64:
            raise TypeError(f"{op}: expected {name} of dtype int64 but got {_name(key.dtype)}")
        if key.device != device:
            raise ValueError(
                f"{op}: expected {name} on the device of the other tensors, {device}, but got {key.device}; "
                f"move it with {name}.to('{device}')"
            )
        keys.append(key)
    for i in range(1, len(lead) + 1):
        size = lead[-i]
        if size == 1:
            continue
        if not any(k.dim() >= i and k.shape[-i] == size for k in keys) and size > 1:
            raise ValueError(
                f"{op}: expected seed or offset to differ between the {size} rows of dimension {len(lead) - i} but "
                f"their shapes are {tuple(keys[0].shape)} and {tuple(keys[1].shape)}, and all would draw with the same "
                "number; give a seed per row, or offset=torch.arange(...) for positions of one sequence"
            )
    full = [_broadcast(op, n, k, lead) for n, k in zip(("seed", "offset"), keys, strict=True)]
    return full[0].reshape(-1), full[1].reshape(-1)


def _prepare_confidence(
    confidence: Tensor,
    count: int | Tensor,
    candidates: Tensor | None,
    temperature: float,
    seed: int | Tensor | None,
    offset: int | Tensor | None,
    generator: torch.Generator | None,
    ties: str,
) -> _PreparedConfidence:
    op = "arcore.confidence_mask"
    counts = count if isinstance(count, Tensor) else None
    same_device(op, confidence=confidence, count=counts, candidates=candidates)
    if not confidence.is_floating_point():
        raise TypeError(f"{op}: expected confidence of a float dtype but got {_name(confidence.dtype)}")
    if confidence.dim() == 0:
        raise ValueError(f"{op}: expected confidence of shape (..., N) but got ()")
    if ties not in get_args(Ties):
        raise ValueError(f"{op}: expected ties 'exact', 'all' or 'none' but got {ties!r}")
    if not 0.0 <= temperature < math.inf:
        raise ValueError(f"{op}: expected a finite temperature >= 0 but got {temperature}")
    lead, length = confidence.shape[:-1], confidence.shape[-1]
    if counts is None:
        number = int64(op, "count", count)
        if number < 0:
            raise ValueError(f"{op}: expected count >= 0 but got {count}")
        counts = torch.full((), number, dtype=torch.int64, device=confidence.device)
    if counts.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: expected count of dtype int64 but got {_name(counts.dtype)}")
    if candidates is not None:
        if candidates.dtype != torch.bool:
            raise TypeError(f"{op}: expected candidates of dtype bool but got {_name(candidates.dtype)}")
        candidates = _broadcast(op, "candidates", candidates, confidence.shape).reshape(-1, length)
    seeds = offsets = torch.zeros(1, dtype=torch.int64, device=confidence.device)
    if temperature != 0.0:
        seeds, offsets = _row_keys(op, lead, confidence.device, seed, offset, generator)
    return _PreparedConfidence(
        confidence.detach().float().reshape(math.prod(lead), length),
        candidates,
        _broadcast(op, "count", counts.long(), lead).reshape(-1),
        seeds,
        offsets,
    )


def _check_choices(op: str, mode: str, num_samples: int, return_logprob: str | None) -> None:
    if mode not in MODES:
        raise ValueError(f"{op}: expected mode 'inverse_cdf', 'gumbel' or 'greedy' but got {mode!r}")
    if integer(op, "num_samples", num_samples) < 1:
        raise ValueError(f"{op}: expected num_samples >= 1 but got {num_samples}")
    if return_logprob not in (None, "raw", "processed"):
        raise ValueError(
            f"{op}: expected return_logprob None, 'raw' or 'processed' but got {return_logprob!r}"
        )


def _raise_if_invalid(op: str, valid: Tensor, lead: torch.Size) -> None:
    if not bool(valid.all()):
        row = int(valid.int().argmin())
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(row), lead)) if lead else ()
        raise ValueError(
            f"{op}: expected a distribution in every row but row {index} has NaN among its allowed logits, no allowed "
            f"logit above -inf, or a setting out of its range ({int((~valid).sum())} of {valid.numel()} rows)"
        )


def _into(op: str, out: Tensor | None, tokens: Tensor) -> Tensor:
    if out is None:
        return tokens
    same_device(op, logits=tokens, out=out)
    if out.dtype != torch.int64 or out.shape != tokens.shape:
        raise ValueError(
            f"{op}: expected out int64 of shape {tuple(tokens.shape)} but got {_name(out.dtype)} {tuple(out.shape)}"
        )
    return out.copy_(tokens)


def _row(p: _Prepared, r: int, order: str) -> rules.RowInputs:
    """Row r of prepared arguments, for the reference."""
    at = divmod(r, p.logits[0].shape[1])

    def take(t: Tensor | None) -> Tensor | None:
        return None if t is None else t[at]

    settings = p.settings[r if len(p.settings) > 1 else 0].tolist()
    allowed = take(p.mask)
    if allowed is not None and allowed.dtype == torch.int32:
        token = torch.arange(p.vocab)
        allowed = ((allowed[token // 32] >> (token % 32)) & 1).bool()
    history, prompt = take(p.history), take(p.prompt)
    return rules.RowInputs(
        [t[at].float() for t in p.logits],
        dict(zip(rules.COLUMNS, settings, strict=False)),
        settings[len(rules.COLUMNS) :],
        take(p.bias),
        allowed,
        [] if history is None else history.tolist(),
        [] if prompt is None else prompt.tolist(),
        order,
    )


def _pack(kept: list[Tensor], p: _Prepared) -> Tensor:
    words = (p.vocab + 31) // 32
    bits = torch.zeros(p.rows, words * 32, dtype=torch.int64)
    for r, row in enumerate(kept):
        bits[r, : p.vocab] = row.long()
    packed = (bits.view(p.rows, words, 32) << torch.arange(32)).sum(dim=-1)
    return packed.to(torch.int32).view(*p.lead, words)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@torch.library.register_fake("arcore::sample")
def _fake_sample(
    logits: list[Tensor],
    settings: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    history: Tensor | None,
    prompt: Tensor | None,
    seed: Tensor,
    offset: Tensor,
    num_samples: int,
    order: int,
    mode: int,
    want_prob: bool,
    want_logprob: bool,
    want_raw_logprob: bool,
    want_entropy: bool,
    want_kept: bool,
) -> tuple[Tensor, ...]:
    same_device(
        "arcore.sample", logits=logits, settings=settings, bias=bias, mask=mask, history=history, prompt=prompt,
        seed=seed, offset=offset,
    )  # fmt: skip
    x = logits[0]
    rows, words = math.prod(x.shape[:-1]), (x.shape[-1] + 31) // 32

    def draws(wanted: bool) -> Tensor:
        return x.new_empty((rows, num_samples) if wanted else (0,), dtype=torch.float32)

    return (
        x.new_empty((rows, num_samples), dtype=torch.int64),
        draws(want_prob),
        draws(want_logprob),
        draws(want_raw_logprob),
        x.new_empty((rows,) if want_entropy else (0,), dtype=torch.float32),
        x.new_empty((rows,), dtype=torch.bool),
        x.new_empty((rows, words) if want_kept else (0,), dtype=torch.int32),
    )


@torch.library.register_fake("arcore::filter_probs")
def _fake_filter_probs(
    logits: list[Tensor],
    settings: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    history: Tensor | None,
    prompt: Tensor | None,
    order: int,
    want_entropy: bool,
    want_kept: bool,
) -> tuple[Tensor, ...]:
    same_device(
        "arcore.filter_probs", logits=logits, settings=settings, bias=bias, mask=mask, history=history, prompt=prompt
    )  # fmt: skip
    x = logits[0]
    rows, vocab = math.prod(x.shape[:-1]), x.shape[-1]
    return (
        x.new_empty((rows, vocab), dtype=torch.float32),
        x.new_empty((rows,) if want_entropy else (0,), dtype=torch.float32),
        x.new_empty((rows,), dtype=torch.bool),
        x.new_empty((rows, (vocab + 31) // 32) if want_kept else (0,), dtype=torch.int32),
    )


@torch.library.register_fake("arcore::confidence_mask")
def _fake_confidence_mask(
    confidence: Tensor,
    candidates: Tensor | None,
    count: Tensor,
    seed: Tensor,
    offset: Tensor,
    temperature: float,
    ties: int,
) -> Tensor:
    same_device(
        "arcore.confidence_mask", confidence=confidence, candidates=candidates, count=count, seed=seed, offset=offset
    )  # fmt: skip
    return torch.empty_like(confidence, dtype=torch.bool, memory_format=torch.contiguous_format)


# ---- vmap: the batch becomes part of the rows ----


def _batched_rows(x: Tensor, dim: int | None, size: int, rows: int | None = None) -> Tensor:
    """`x` of every example one below the other: [size * n, ...] of [n, ...]; one row for all becomes `rows`."""
    full = x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    if rows is not None and full.shape[1] == 1:
        full = full.expand(size, rows, *full.shape[2:])
    return full.reshape(size * full.shape[1], *full.shape[2:])


def _split_rows(
    results: tuple[Tensor, ...], size: int, rows: int
) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """Results by example again; those that nobody asked for have no row."""
    wanted = [r.dim() > 1 or r.shape[0] == size * rows for r in results]
    return (
        tuple(r.view(size, rows, *r.shape[1:]) if w else r for r, w in zip(results, wanted, strict=True)),
        tuple(0 if w else None for w in wanted),
    )


def _batched_problem(info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> tuple[list[Any], int]:
    """The arguments that `sample` and `filter_probs` share, and the rows of one example."""
    logits, settings, *optional = args[:6]
    dims = in_dims[0] if isinstance(in_dims[0], (list, tuple)) else (in_dims[0],) * len(logits)
    first = logits[0].shape if dims[0] is None else logits[0].movedim(dims[0], 0).shape[1:]
    rows, size = first[0] * first[1], info.batch_size
    merged = [_batched_rows(x, d, size) for x, d in zip(logits, dims, strict=True)]
    alike = in_dims[1] is None and settings.shape[0] == 1
    return [
        merged,
        settings if alike else _batched_rows(settings, in_dims[1], size, rows),
        *(
            None if x is None else _batched_rows(x, d, size)
            for x, d in zip(optional, in_dims[2:6], strict=True)
        ),
    ], rows


@torch.library.register_vmap("arcore::sample")
def _vmap_sample(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    problem, rows = _batched_problem(info, in_dims, args)
    seed, offset, _, _, mode = args[6:11]
    if in_dims[6] is None and in_dims[7] is None and mode != MODES.index("greedy"):
        raise ValueError(
            "arcore.sample: expected seed or offset to differ between the examples of vmap but both are the same for "
            "all, which would draw with the same numbers; map over a seed per example"
        )
    keys = (
        _batched_rows(k, d, info.batch_size, rows) for k, d in zip((seed, offset), in_dims[6:8], strict=True)
    )
    return _split_rows(torch.ops.arcore.sample(*problem, *keys, *args[8:]), info.batch_size, rows)


@torch.library.register_vmap("arcore::filter_probs")
def _vmap_filter_probs(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    problem, rows = _batched_problem(info, in_dims, args)
    return _split_rows(torch.ops.arcore.filter_probs(*problem, *args[6:]), info.batch_size, rows)


@torch.library.register_vmap("arcore::confidence_mask")
def _vmap_confidence_mask(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    confidence, candidates, *rest = args
    temperature = args[5]
    if in_dims[3] is None and in_dims[4] is None and temperature != 0.0:
        raise ValueError(
            "arcore.confidence_mask: expected seed or offset to differ between the examples of vmap but both are the "
            "same for all, which would give them the same noise; map over a seed per example"
        )
    size = info.batch_size
    rows = confidence.shape[0] if in_dims[0] is None else confidence.movedim(in_dims[0], 0).shape[1]
    chosen = torch.ops.arcore.confidence_mask(
        _batched_rows(confidence, in_dims[0], size),
        None if candidates is None else _batched_rows(candidates, in_dims[1], size),
        *(_batched_rows(x, d, size, rows) for x, d in zip(rest[:3], in_dims[2:5], strict=True)),
        *args[5:],
    )
    return chosen.view(size, rows, chosen.shape[-1]), 0
