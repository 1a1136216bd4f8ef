"""The objectives that `arcore run align` knows by name, each a function of what was scored.

Scores are log-probabilities of the rollout's tokens; nothing here knows the model. Legend: B responses, T tokens, P
pairs, M rewards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from arcore.nn import Rollout, TokenStats
from arcore.objectives import (
    gae,
    group_advantages,
    grpo_loss,
    kto_loss,
    ppo_loss,
    preference_loss,
    sequence_logprob,
    value_loss,
)
from arcore.zoo.alignment.inpo import inpo_loss
from arcore.zoo.alignment.nft import nft_loss
from arcore.zoo.alignment.spo import spo_loss, win_rate_rewards
from arcore.zoo.alignment.srpo import srpo_loss

Needs = Literal["rewards", "verifier", "pairs", "rater", "revisions", "several"]


@dataclass
class Scored:
    """What an objective may look at.

    Attributes:
        rollout: tokens, groups and rewards `[B, M]`.
        stats: under the policy, with gradient; None in what has been judged and not yet been scored.
        old: `[B, T]` under the policy that drew them.
        reference: `[B, T]` under the frozen model.
        rewards: `[B]`, the weighted sum of the rewards.
        settings: of the run.
        pairs: `[P, 2]` rows of pairs, and `preference` `[P]` that the first is preferred.
        preference: see `pairs`.
        wins: `[Q, B / Q, B / Q]` win rates in each group.
        revisions: SRPO's reviser and its reference, `[P, 2, 2]` each.
        values: `[B, T]` of the critic, with gradient, and `old_values` before the update.
        old_values: see `values`.
    """

    rollout: Rollout
    stats: TokenStats | Any
    old: Tensor
    reference: Tensor
    rewards: Tensor
    settings: Any
    pairs: Tensor | None = None
    preference: Tensor | None = None
    wins: Tensor | None = None
    revisions: tuple[Tensor, Tensor] | None = None
    values: Tensor | None = None
    old_values: Tensor | None = None
    figures: dict[str, float] = field(default_factory=dict)

    def sums(self, logprobs: Tensor) -> Tensor:
        """`[P, 2]` log-probabilities of both responses of each pair."""
        assert self.pairs is not None
        return sequence_logprob(logprobs, self.rollout.mask)[self.pairs]


@dataclass(frozen=True)
class Objective:
    """A named objective.

    Attributes:
        loss: of what was scored; scalar.
        needs: "rewards"; "verifier", rewards of 0 and 1; "pairs", preferences from a rater or from rewards; "rater",
            a rater of all pairs; "revisions", pairs and a reviser; "several", more than one reward.
        critic: whether it trains one.
        text: one line of help.
    """

    loss: Callable[[Scored], Tensor]
    needs: Needs
    text: str
    critic: bool = False


def _grpo(changes: dict[str, Any], deviation: str = "population") -> Callable[[Scored], Tensor]:
    def loss(s: Scored) -> Tensor:
        o = s.settings
        gain = group_advantages(s.rewards, s.rollout.groups, deviation=deviation)  # type: ignore[arg-type]
        chosen = {
            "clip_low": o.clip_low,
            "clip_high": o.clip_high,
            "clip_negative": o.clip_negative,
            "entropy_share": o.entropy_share,
            **changes,
        }
        if chosen.get("how") == "constant":
            chosen["length"] = o.max_new_tokens
        return grpo_loss(
            s.stats.logp,
            s.old,
            gain,
            s.rollout.mask,
            reference=s.reference,
            kl_weight=o.kl_weight,
            entropy=s.stats.entropy,
            **chosen,
        )

    return loss


def _nft(negative: float, weight: Literal["root", "none"]) -> Callable[[Scored], Tensor]:
    def loss(s: Scored) -> Tensor:
        return nft_loss(
            s.stats.logp,
            s.old,
            s.rewards,
            s.rollout.groups,
            s.rollout.mask,
            negative_weight=negative,
            prompt_weight=weight,
        ) + _kl(s)

    return loss


def _kl(s: Scored) -> Tensor:
    """The KL term that `grpo_loss` has inside, for losses that have none."""
    if not s.settings.kl_weight:
        return s.stats.logp.new_zeros(())
    mask = s.rollout.mask
    apart = torch.where(mask, s.reference - s.stats.logp, 0.0)
    return s.settings.kl_weight * (apart.exp() - apart - 1).sum() / mask.sum().clamp(min=1)


def token_rewards(rewards: Tensor, logp: Tensor, reference: Tensor, mask: Tensor, kl_weight: float) -> Tensor:
    """RLHF's rewards of tokens: the KL penalty at each, and the response's reward at its last one; `[B, T]`."""
    penalty = -kl_weight * torch.where(mask, logp - reference, 0.0)
    places = torch.arange(mask.shape[1], device=mask.device)
    last = (places * mask).amax(1, keepdim=True)
    return penalty + torch.where(mask & (places == last), rewards[:, None], 0.0)


def _ppo(s: Scored) -> Tensor:
    assert s.values is not None and s.old_values is not None
    mask, o = s.rollout.mask, s.settings
    rewards = token_rewards(s.rewards, s.old, s.reference, mask, o.kl_weight)
    # The recurrence runs over response tokens alone, which follow each other.
    width = int(mask.sum(1).max())
    place = (mask.long().argmax(1)[:, None] + torch.arange(width, device=mask.device)).clamp(
        max=mask.shape[1] - 1
    )
    inside = torch.arange(width, device=mask.device) < mask.sum(1)[:, None]

    def cut(values: Tensor) -> Tensor:
        return values.gather(1, place)

    found = gae(cut(rewards), cut(s.old_values), discount=1.0, smoothing=o.smoothing, mask=inside)
    gain = found.advantages
    if int(inside.sum()) > 1:
        gain = (gain - gain[inside].mean()) / (gain[inside].std() + 1e-8)
    critic = value_loss(cut(s.values), found.returns, inside)
    s.figures["value_loss"] = float(critic.detach())
    return ppo_loss(cut(s.stats.logp), cut(s.old), gain, inside, clip=o.clip_low) + o.value_weight * critic


def _preference(kind: Literal["dpo", "ipo", "hinge"]) -> Callable[[Scored], Tensor]:
    def loss(s: Scored) -> Tensor:
        assert s.preference is not None
        policy, reference = s.sums(s.stats.logp), s.sums(s.reference)
        return preference_loss(policy, reference, s.preference, beta=s.settings.beta, kind=kind)

    return loss


def _kto(s: Scored) -> Tensor:
    mask = s.rollout.mask
    gain = group_advantages(s.rewards, s.rollout.groups, deviation="none")
    decided = gain != 0
    policy, reference = (sequence_logprob(x, mask)[decided] for x in (s.stats.logp, s.reference))
    return kto_loss(policy, reference, (gain > 0)[decided], beta=s.settings.beta)


def _inpo(s: Scored) -> Tensor:
    assert s.preference is not None
    return inpo_loss(
        s.sums(s.stats.logp),
        s.sums(s.reference),
        s.sums(s.old),
        s.preference,
        tau=s.settings.tau,
        eta=s.settings.eta,
    )


def _srpo(s: Scored) -> Tensor:
    assert s.preference is not None and s.revisions is not None
    reviser, reference = s.revisions
    return srpo_loss(
        s.sums(s.stats.logp), reviser, s.sums(s.reference), reference, s.preference, beta=s.settings.beta
    )


def _spo(s: Scored) -> Tensor:
    assert s.wins is not None
    shape = (*s.wins.shape[:2], -1)
    parts = (s.stats.logp, s.old, s.rollout.mask)
    logp, old, mask = (x.view(shape) for x in parts)
    s.rewards = win_rate_rewards(s.wins).flatten()
    return spo_loss(logp, old, s.wins, mask) + _kl(s)


OBJECTIVES: dict[str, Objective] = {
    "grpo": Objective(_grpo({}), "rewards", "the clipped policy gradient with a group's advantages"),
    "dr_grpo": Objective(_grpo({"how": "constant"}, "none"), "rewards", "without deviation and lengths"),
    "dapo": Objective(
        _grpo({"how": "token_mean", "clip_high": 0.28}), "rewards", "mean over tokens, higher upper clip"
    ),
    "gspo": Objective(
        _grpo({"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4}),
        "rewards",
        "ratios of whole responses",
    ),
    "ppo": Objective(_ppo, "rewards", "a critic, GAE and a KL penalty in the rewards", critic=True),
    "rft": Objective(_nft(0.0, "none"), "verifier", "likelihood of the right responses"),
    "nft": Objective(_nft(1.0, "root"), "verifier", "right responses and, implicitly, wrong ones"),
    "dpo": Objective(_preference("dpo"), "pairs", "logistic loss of pairs"),
    "ipo": Objective(_preference("ipo"), "pairs", "squared loss of pairs"),
    "hinge": Objective(_preference("hinge"), "pairs", "hinge loss of pairs (SLiC)"),
    "kto": Objective(_kto, "rewards", "responses better or worse than their group's mean, one by one"),
    "inpo": Objective(_inpo, "pairs", "a step of self-play with a KL term to the reference"),
    "srpo": Objective(_srpo, "revisions", "a policy and its own reviser"),
    "spo": Objective(_spo, "rater", "win rates against the group's other responses"),
    "drw": Objective(_grpo({}, "none"), "several", "GRPO whose reward weights follow the gradients"),
    "drw_hypervolume": Objective(
        _grpo({}, "none"), "several", "GRPO whose rewards count more after the front has grown"
    ),
}
