"""Returns and advantages of steps, as linear recurrences from the last step to the first."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from arcore.nn.kinds import check_kinds
from arcore.ops import linear_scan


class Advantages(NamedTuple):
    """What `gae` returns, each `[..., T]` and 0 where the mask is False.

    Attributes:
        advantages: how much better each action was than the value of its state.
        returns: `advantages + values`, what the critic is trained on.
    """

    advantages: Tensor
    returns: Tensor


@check_kinds
def discounted_returns(
    rewards: Tensor,
    *,
    discount: float = 1.0,
    done: Tensor | None = None,
    mask: Tensor | None = None,
    last: Tensor | None = None,
) -> Tensor:
    """Sum of the rewards from each step on: `G[t] = r[t] + discount (1 - done[t]) G[t + 1]`.

    Args:
        rewards: `[..., T]`, floating point.
        discount: from 0 to 1.
        done: `[..., T]` bool, steps that end an episode; nothing later reaches them.
        mask: `[..., T]` bool, which steps there are; those of a row stand first (right padding).
        last: `[...]`, value of the state after a row's last step; 0 when None.

    Returns:
        `[..., T]`, 0 where the mask is False.

    Raises:
        ValueError: shapes differ, a reward is not finite, a mask is not bool or has a gap, or discount is out of range.
    """
    rewards, go_on, last, mask = _checked("discounted_returns", rewards, discount, done, mask, last)
    if mask is None:
        factors = discount * go_on
        if rewards.shape[-1]:
            if last is not None:
                end = rewards[..., -1:] + factors[..., -1:] * last.unsqueeze(-1)
                rewards = torch.cat([rewards[..., :-1], end], -1)
            factors[..., -1] = 0
        return linear_scan(factors, rewards, reverse=True)
    last = rewards.new_zeros(rewards.shape[:-1]) if last is None else last
    after = torch.where(_ends(mask), last.unsqueeze(-1), 0.0)
    found = linear_scan(discount * go_on * ~_ends(mask), rewards + discount * go_on * after, reverse=True)
    return torch.where(mask, found, 0.0)


@check_kinds
def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    discount: float = 1.0,
    smoothing: float = 0.95,
    done: Tensor | None = None,
    mask: Tensor | None = None,
    last: Tensor | None = None,
) -> Advantages:
    """Generalised advantage estimation (Schulman et al., arXiv:1506.02438, equation 16), without a gradient::

        delta[t] = r[t] + discount (1 - done[t]) V[t + 1] - V[t]
        A[t]     = delta[t] + discount smoothing (1 - done[t]) A[t + 1]

    Args:
        rewards: `[..., T]`, floating point.
        values: `[..., T]`, the critic's values of the states before each step.
        discount: from 0 to 1.
        smoothing: lambda, from 0 (one step) to 1 (the whole return).
        done: see `discounted_returns`, as the next two.
        mask: which steps there are.
        last: value after a row's last step.

    Raises:
        ValueError: see `discounted_returns`; or smoothing is out of range.
    """
    if values.shape != rewards.shape:
        raise ValueError(
            f"arcore.gae: expected values of rewards's shape {tuple(rewards.shape)} but got {tuple(values.shape)}; "
            "give one value per step"
        )
    if not 0 <= smoothing <= 1:
        raise ValueError(f"arcore.gae: expected smoothing from 0 to 1 but got {smoothing}; 0.95 is common")
    rewards, go_on, last, mask = _checked("gae", rewards.detach(), discount, done, mask, last)
    if mask is None:
        values = values.detach().to(rewards.dtype)
        end = rewards.new_zeros(rewards.shape[:-1]) if last is None else last.detach()
        following = torch.cat([values[..., 1:], end.unsqueeze(-1)], -1)[..., : values.shape[-1]]
        factors = discount * go_on
        delta = rewards + factors * following - values
        factors = smoothing * factors
        factors[..., -1:] = 0
        found = linear_scan(factors, delta, reverse=True)
        return Advantages(found, found + values)
    last = rewards.new_zeros(rewards.shape[:-1]) if last is None else last
    values = torch.where(mask, values.detach().to(rewards.dtype), 0.0)
    following = torch.cat([values[..., 1:], torch.zeros_like(values[..., :1])], -1)
    following = torch.where(_ends(mask), last.detach().unsqueeze(-1), following)
    delta = rewards + discount * go_on * following - values
    found = linear_scan(discount * smoothing * go_on * ~_ends(mask), delta, reverse=True)
    return Advantages(torch.where(mask, found, 0.0), torch.where(mask, found + values, 0.0))


def _ends(mask: Tensor) -> Tensor:
    """The last step of each row."""
    return mask & ~torch.cat([mask[..., 1:], torch.zeros_like(mask[..., :1])], -1)


def _checked(
    name: str,
    rewards: Tensor,
    discount: float,
    done: Tensor | None,
    mask: Tensor | None,
    last: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Rewards that are 0 at padding, 1 where the episode goes on, the value after the last step, and the mask."""
    op = f"arcore.{name}"
    if rewards.dim() < 1 or not rewards.is_floating_point():
        raise ValueError(
            f"{op}: expected floating-point rewards (..., T) but got {rewards.dtype} of shape {tuple(rewards.shape)}; "
            "use rewards.float()"
        )
    if not 0 <= discount <= 1:
        raise ValueError(f"{op}: expected discount from 0 to 1 but got {discount}; 1 does not discount")
    for what, flags in (("done", done), ("mask", mask)):
        if flags is not None and (flags.shape != rewards.shape or flags.dtype != torch.bool):
            raise ValueError(
                f"{op}: expected {what} bool of rewards's shape {tuple(rewards.shape)} but got {flags.dtype} of shape "
                f"{tuple(flags.shape)}; give one flag per step"
            )
    if last is not None and last.shape != rewards.shape[:-1]:
        raise ValueError(
            f"{op}: expected last of shape {tuple(rewards.shape[:-1])} but got {tuple(last.shape)}; give one "
            "value per row"
        )
    if mask is not None and (mask[..., 1:] & ~mask[..., :-1]).any():
        raise ValueError(
            f"{op}: expected a mask whose steps stand first in each row but it has a gap; take those "
            "steps out of the row before"
        )
    rewards = rewards if mask is None else torch.where(mask, rewards, 0.0)
    if not torch.isfinite(rewards).all():
        place = (~torch.isfinite(rewards)).nonzero()[0].tolist()
        raise ValueError(
            f"{op}: expected finite rewards but got {rewards[tuple(place)].item()} at {place}; repair the reward, or "
            "leave that row out"
        )
    last = None if last is None else last.to(rewards.dtype)
    go_on = torch.ones_like(rewards) if done is None else (~done).to(rewards.dtype)
    return rewards, go_on, last, mask
