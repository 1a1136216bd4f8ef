"""PPO on tokens or on turns: the clipped surrogate with an advantage for each step, and the critic's loss."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from arcore.nn.kinds import Axes, check_kinds
from arcore.objectives.policy import Reduction, check_advantages, log_ratio, reduce


@check_kinds
def ppo_loss(
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float = 0.2,
    how: Reduction = "token_mean",
    length: int | None = None,
) -> Tensor:
    """The clipped surrogate (Schulman et al., arXiv:1707.06347, equation 7); scalar.

    A step is what one advantage belongs to: a token, or an environment step whose tokens' log-probabilities are summed
    (`turn_logprobs`).

    Args:
        logprobs: `[B, T]` log-probabilities of the steps, with gradient.
        old: `[B, T]` under the policy that acted.
        advantages: `[B, T]`, without a gradient.
        mask: `[B, T]` bool, which steps there are.
        clip: how far a ratio counts from 1, from 0 to 1.
        how: see `arcore.objectives.reduce`.
        length: likewise.

    Raises:
        ValueError: shapes differ, clip is out of range, or an advantage of a step is not finite.
    """
    if advantages.shape != logprobs.shape:
        raise ValueError(
            f"arcore.ppo_loss: expected advantages of logprobs's shape {tuple(logprobs.shape)} but got "
            f"{tuple(advantages.shape)}; give one per step (GRPO's one per response go to grpo_loss)"
        )
    if mask.shape != logprobs.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"arcore.ppo_loss: expected a bool mask of logprobs's shape {tuple(logprobs.shape)} but got "
            f"{tuple(mask.shape)} of {mask.dtype}"
        )
    check_advantages("ppo_loss", advantages.detach(), mask)
    if not 0 <= clip <= 1:
        raise ValueError(f"arcore.ppo_loss: expected clip from 0 to 1 but got {clip}; 0.2 is common")
    rho = log_ratio(logprobs, old, mask).exp()
    gain = torch.where(mask, advantages.detach(), 0.0)
    worth = torch.minimum(rho * gain, rho.clamp(1 - clip, 1 + clip) * gain)
    return reduce(-worth, mask, how=how, length=length)


@check_kinds
def value_loss(
    values: Tensor, returns: Tensor, mask: Tensor, *, old: Tensor | None = None, clip: float | None = None
) -> Tensor:
    """Half the mean squared error of the critic; scalar.

    Args:
        values: `[B, T]`, with gradient.
        returns: `[B, T]`, what they should be, without a gradient.
        mask: `[B, T]` bool.
        old: `[B, T]` values before the update, for `clip`.
        clip: values count no further than this from the old ones; the larger of both errors counts.

    Raises:
        ValueError: shapes differ, or clip and old do not come together.
    """
    if returns.shape != values.shape or (old is not None and old.shape != values.shape):
        raise ValueError(
            f"arcore.value_loss: expected returns (and old) of values's shape {tuple(values.shape)} but got "
            f"{tuple(returns.shape)}{'' if old is None else f' and {tuple(old.shape)}'}"
        )
    if (old is None) != (clip is None) or (clip is not None and not clip > 0):
        raise ValueError(
            f"arcore.value_loss: expected clip above 0 together with old but got clip={clip} and "
            f"{'no ' if old is None else ''}old values; leave both out for the plain error"
        )
    error = (values - returns.detach()) ** 2
    if old is not None and clip is not None:
        near = old.detach() + (values - old.detach()).clamp(-clip, clip)
        error = torch.maximum(error, (near - returns.detach()) ** 2)
    return 0.5 * reduce(error, mask)


@check_kinds
def turn_logprobs(
    logprobs: Annotated[Tensor, Axes("B T", floating=True)], turns: Tensor, count: int
) -> Tensor:
    """Log-probability of each environment step: the sum over its tokens.

    Args:
        logprobs: `[B, T]` of tokens.
        turns: `[B, T]` integers, the step that a token belongs to; negative where it belongs to none.
        count: steps S.

    Returns:
        `[B, S]`; 0 for a step without tokens.

    Raises:
        ValueError: shapes differ or a step is beyond S.
    """
    if turns.shape != logprobs.shape or logprobs.dim() != 2 or turns.is_floating_point():
        raise ValueError(
            f"arcore.turn_logprobs: expected logprobs and integer turns of one shape (B, T) but got "
            f"{tuple(logprobs.shape)} and {tuple(turns.shape)}"
        )
    if turns.numel() and int(turns.max()) >= count:
        raise ValueError(
            f"arcore.turn_logprobs: expected turns below count={count} but got {int(turns.max())}; they count from 0"
        )
    zeros = logprobs.new_zeros(len(logprobs), count)
    return zeros.scatter_add(1, turns.clamp(min=0), torch.where(turns >= 0, logprobs, 0.0))
