"""Policy objectives on log-probabilities of tokens: what their losses share, and GRPO with its named variants.

Rows are responses, right-padded; `mask` says which tokens the policy chose. Nothing here looks at a padded token, so it
may hold anything, NaN too. On-policy, where `logprobs` and `old` hold the same numbers, every ratio is exactly 1.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from arcore.nn.kinds import check_kinds

Reduction = Literal["sequence_mean", "token_mean", "constant"]
Deviation = Literal["population", "sample", "none"]
Ratio = Literal["token", "sequence"]


class GroupStatistics(NamedTuple):
    """What `group_statistics` returns, each `[B]`: every response has its group's value.

    Attributes:
        mean: of the group's rewards.
        deviation: their standard deviation; NaN for the "sample" kind in a group of one.
        size: responses in the group, float.
        equal: whether all rewards of the group are the same.
    """

    mean: Tensor
    deviation: Tensor
    size: Tensor
    equal: Tensor


@check_kinds
def group_statistics(
    rewards: Tensor, groups: Tensor, *, deviation: Literal["population", "sample"] = "population"
) -> GroupStatistics:
    """Mean and standard deviation of the rewards of each prompt's responses.

    Args:
        rewards: `[B]`, floating point, finite.
        groups: `[B]` integers; responses to the same prompt have the same number.
        deviation: divide by the group's size ("population") or by one less ("sample").

    Raises:
        ValueError: shapes do not fit, a reward is no floating-point number or not finite, or an unknown kind.
    """
    if rewards.dim() != 1 or groups.shape != rewards.shape:
        raise ValueError(
            "arcore.group_statistics: expected rewards and groups of one shape (B,) but got "
            f"{tuple(rewards.shape)} and {tuple(groups.shape)}; give one reward and one group per response"
        )
    if not rewards.is_floating_point():
        raise ValueError(
            f"arcore.group_statistics: expected floating-point rewards but got {rewards.dtype}; use rewards.float()"
        )
    if not torch.isfinite(rewards).all():
        row = int((~torch.isfinite(rewards)).nonzero()[0, 0])
        raise ValueError(
            f"arcore.group_statistics: expected finite rewards but got {rewards[row].item()} in row {row}; "
            "drop that response or repair the reward"
        )
    _, place = torch.unique(groups, return_inverse=True)
    count = int(place.max()) + 1 if len(place) else 0
    zeros = rewards.new_zeros(count)
    size = zeros.index_add(0, place, torch.ones_like(rewards))
    mean = zeros.index_add(0, place, rewards) / size
    squares = zeros.index_add(0, place, (rewards - mean[place]) ** 2)
    spread = (squares / (size if deviation == "population" else size - 1)).sqrt()
    # Rounding may make the deviation of equal rewards positive, so they are compared: with any one of their group.
    one = zeros.index_put((place,), rewards)
    other = zeros.index_add(0, place, (rewards != one[place]).to(rewards.dtype))
    return GroupStatistics(mean[place], spread[place], size[place], (other == 0)[place])


@check_kinds
def group_advantages(
    rewards: Tensor, groups: Tensor, *, deviation: Deviation = "population", epsilon: float = 0.0
) -> Tensor:
    """How much better each response is than its group: `(r - mean) / (std + epsilon)`.

    They sum to 0 in each group. Where all rewards of a group are equal, and so in a group of one, they are exactly 0.
    Without epsilon, a positive factor on the rewards and a constant added to them change nothing.

    Args:
        rewards: `[B]`, floating point, finite.
        groups: `[B]` integers, one number per prompt.
        deviation: the kind of standard deviation; "none" only subtracts the mean (Dr. GRPO, arXiv:2503.20783).
        epsilon: added to the standard deviation, at least 0.

    Returns:
        `[B]`, without a gradient.

    Raises:
        ValueError: see `group_statistics`; or epsilon is negative.
    """
    if not epsilon >= 0:
        raise ValueError(f"arcore.group_advantages: expected epsilon >= 0 but got {epsilon}; 0 adds nothing")
    kind: Literal["population", "sample"]
    kind = "population" if deviation == "none" else deviation
    found = group_statistics(rewards.detach(), groups, deviation=kind)
    advantages = rewards.detach() - found.mean
    if deviation != "none":
        advantages = advantages / (found.deviation + epsilon)
    return torch.where(found.equal, 0.0, advantages)


@check_kinds
def log_ratio(logprobs: Tensor, old: Tensor, mask: Tensor, *, ratio: Ratio = "token") -> Tensor:
    """Log of how much likelier the policy makes each token than the one that drew it.

    Args:
        logprobs: `[..., T]` log-probabilities under the policy.
        old: `[..., T]` under the policy that drew the tokens; no gradient goes there.
        mask: `[..., T]` bool, which tokens count.
        ratio: "token", or "sequence" for the mean over the row's tokens in the place of each (GSPO, arXiv:2507.18071).
            As there, a token's gradient is that of the whole row.

    Returns:
        `[..., T]`, 0 where the mask is False.

    Raises:
        ValueError: shapes differ, the mask is not bool, or an unknown ratio.
    """
    _check("log_ratio", logprobs, old, mask)
    apart = torch.where(mask, logprobs - old.detach(), 0.0)
    if ratio == "token":
        return apart
    if ratio != "sequence":
        raise ValueError(
            f"arcore.log_ratio: expected ratio to be 'token' or 'sequence' but got {ratio!r}; GSPO is 'sequence'"
        )
    mean = apart.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(mask, mean, 0.0)


@check_kinds
def sequence_logprob(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Log-probability of each response: the sum over its tokens, at least in float32.

    Args:
        logprobs: `[..., T]`.
        mask: `[..., T]` bool, which tokens are the response's.

    Returns:
        `[...]`; 0 for an empty response.

    Raises:
        ValueError: shapes differ or the mask is not bool.
    """
    _check("sequence_logprob", logprobs, logprobs, mask)
    wide = logprobs if logprobs.dtype == torch.float64 else logprobs.float()
    return torch.where(mask, wide, 0.0).sum(-1)


@check_kinds
def reduce(
    values: Tensor, mask: Tensor, *, how: Reduction = "token_mean", length: int | None = None
) -> Tensor:
    """One number from the losses of tokens. The ways differ in what a long response counts.

    Args:
        values: `[..., T]`.
        mask: `[..., T]` bool, which tokens count.
        how: "sequence_mean", the mean over rows of each row's mean (GRPO; rows without tokens do not count);
            "token_mean", over all tokens (DAPO, arXiv:2503.14476); "constant", the mean over rows of each row's sum
            divided by `length` (Dr. GRPO).
        length: for "constant", the longest response there can be.

    Returns:
        A scalar; 0, with zero gradients, where no token counts.

    Raises:
        ValueError: shapes differ, an unknown way, or length is missing or not needed.
    """
    _check("reduce", values, values, mask)
    if (how == "constant") != (length is not None) or (length is not None and length < 1):
        raise ValueError(
            f"arcore.reduce: expected length, at least 1, with how='constant' and only there, but got {length} with "
            f"how={how!r}; give the longest response there can be, or leave it out"
        )
    kept = torch.where(mask, values, 0.0)
    tokens = mask.sum(-1)
    if how == "token_mean":
        return kept.sum() / tokens.sum().clamp(min=1)
    if how == "sequence_mean":
        return (kept.sum(-1) / tokens.clamp(min=1)).sum() / (tokens > 0).sum().clamp(min=1)
    if length is None:
        raise ValueError(
            "arcore.reduce: expected how to be 'sequence_mean', 'token_mean' or 'constant' but got "
            f"{how!r}; choose by what a long response counts"
        )
    return kept.sum() / (length * max(tokens.numel(), 1))


@check_kinds
def grpo_loss(
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    clip_negative: float | None = None,
    ratio: Ratio = "token",
    how: Reduction = "sequence_mean",
    length: int | None = None,
    reference: Tensor | None = None,
    kl_weight: float = 0.0,
    entropy: Tensor | None = None,
    entropy_share: float = 1.0,
) -> Tensor:
    """GRPO (arXiv:2402.03300) and its variants: the clipped policy gradient of PPO with a group's advantages.

    Per token, with rho = exp(log-ratio) and A the response's advantage::

        -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) + kl_weight (exp(d) - d - 1),  d = reference - logprobs

    Dr. GRPO is `how="constant"` with advantages without standard deviation; DAPO `clip_high=0.28, how="token_mean"`;
    GSPO `ratio="sequence"`; the clip on two sides `clip_negative` (dual-clip PPO, arXiv:1912.09729); the entropy mask
    `entropy` with `entropy_share=0.2` (arXiv:2506.01939). On-policy, without a KL term, its gradient is that of
    `-A log pi` in the chosen reduction.

    Args:
        logprobs: `[B, T]` log-probabilities of the tokens under the policy, with gradient.
        old: `[B, T]` under the policy that drew them.
        advantages: `[B]`.
        mask: `[B, T]` bool, the response's tokens.
        clip_low: how far below 1 a ratio counts, from 0 to 1.
        clip_high: how far above 1, at least 0; `math.inf` for no limit.
        clip_negative: above 1; limits the ratio where the advantage is negative. None for no limit.
        ratio: of each token or of the row, see `log_ratio`.
        how: see `reduce`.
        length: see `reduce`.
        reference: `[B, T]` under the frozen model, for the KL term.
        kl_weight: of that term, at least 0.
        entropy: `[B, T]` entropy of each token's distribution.
        entropy_share: share of the batch's tokens that count, those of the highest entropy, above 0 and at most 1.

    Raises:
        ValueError: shapes differ, a number is out of range, or an advantage of a row with tokens is not finite.
    """
    _check("grpo_loss", logprobs, old, mask)
    if logprobs.dim() != 2 or advantages.shape != logprobs.shape[:1]:
        raise ValueError(
            f"arcore.grpo_loss: expected logprobs (B, T) and advantages (B,) but got {tuple(logprobs.shape)} and "
            f"{tuple(advantages.shape)}; give one advantage per response"
        )
    check_advantages("grpo_loss", advantages.detach(), mask.any(1))
    limits = (
        ("clip_low", clip_low, 0 <= clip_low <= 1, "from 0 to 1"),
        ("clip_high", clip_high, clip_high >= 0, "at least 0"),
        ("clip_negative", clip_negative, clip_negative is None or clip_negative > 1, "above 1 or None"),
        ("kl_weight", kl_weight, 0 <= kl_weight < math.inf, "at least 0"),
        ("entropy_share", entropy_share, 0 < entropy_share <= 1, "above 0 and at most 1"),
    )
    for name, value, fits, wanted in limits:
        if not fits:
            raise ValueError(f"arcore.grpo_loss: expected {name} {wanted} but got {value}; see the docstring")
    for name, tensor, used in (
        ("reference", reference, kl_weight > 0),
        ("entropy", entropy, entropy_share < 1),
    ):
        if used and (tensor is None or tensor.shape != logprobs.shape):
            shape = None if tensor is None else tuple(tensor.shape)
            raise ValueError(
                f"arcore.grpo_loss: expected {name} of logprobs's shape {tuple(logprobs.shape)} but got {shape}; "
                "its weight or share asks for it"
            )
    if entropy is not None and entropy_share < 1 and mask.any():
        kept = max(1, math.ceil(entropy_share * int(mask.sum())))
        least = entropy.detach()[mask].topk(kept).values[-1]
        mask = mask & (entropy.detach() >= least)
        # A row's own ratio stays that of all its tokens only where each token has its own.
        if ratio == "sequence":
            raise ValueError(
                "arcore.grpo_loss: expected entropy_share=1 with ratio='sequence' but got "
                f"{entropy_share}; a row's ratio is that of all its tokens"
            )
    rho = log_ratio(logprobs, old, mask, ratio=ratio).exp()
    gain = advantages.detach()[:, None]
    worth = torch.minimum(rho * gain, rho.clamp(1 - clip_low, 1 + clip_high) * gain)
    if clip_negative is not None:
        worth = torch.where(gain < 0, torch.maximum(worth, clip_negative * gain), worth)
    loss = -worth
    if kl_weight > 0 and reference is not None:
        apart = torch.where(mask, reference.detach() - logprobs, 0.0)
        loss = loss + kl_weight * (apart.exp() - apart - 1)
    return reduce(loss, mask, how=how, length=length)


def check_advantages(name: str, advantages: Tensor, used: Tensor) -> None:
    """Raise ValueError where one that is used is NaN or infinite; both of one shape."""
    broken = used & ~torch.isfinite(advantages)
    if broken.any():
        place = broken.nonzero()[0].tolist()
        raise ValueError(
            f"arcore.{name}: expected finite advantages but got {advantages[tuple(place)].item()} in row {place[0]}; "
            "repair the reward, or leave that response out of the mask"
        )


def _check(name: str, logprobs: Tensor, old: Tensor, mask: Tensor) -> None:
    if logprobs.shape != mask.shape or old.shape != mask.shape or logprobs.dim() < 1:
        raise ValueError(
            f"arcore.{name}: expected log-probabilities and mask of one shape (..., T) but got "
            f"{tuple(logprobs.shape)}, {tuple(old.shape)} and {tuple(mask.shape)}; pad them alike"
        )
    if mask.dtype != torch.bool:
        raise ValueError(f"arcore.{name}: expected a bool mask but got {mask.dtype}; use mask.bool()")
