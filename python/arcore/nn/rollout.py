"""What samplers, scorers, rewards and objectives of alignment hand to each other.

A reward is any callable from a `Rollout` to `[B, M]`, a rater any callable from a `Rollout` and two lists of rows to
the probabilities that the first of each pair is preferred; there is no base class to inherit from.

Legend: B responses, T tokens of a row, M rewards, P pairs, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from arcore.nn.checks import dtype_name
from arcore.nn.kinds import check_kinds


class TokenStats(NamedTuple):
    """What a scorer says about tokens, each float32 (float64 for models in float64) and 0 where nothing was asked for.

    Attributes:
        logp: `[B, T]` log-probability of each response token, in nats; never positive.
        entropy: `[B, T]` of the distribution that it was drawn from, from 0 to ln V, or None.
        logsumexp: `[B, T]` of the logits, or None.
    """

    logp: Tensor
    entropy: Tensor | None = None
    logsumexp: Tensor | None = None


@check_kinds
@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Responses to prompts, as they were drawn. Rows are right-padded; those of one prompt stand together.

    Attributes:
        tokens: int64 `[B, T]`, prompt, response, padding.
        mask: bool `[B, T]`, True where the policy drew the token. It predicted it at the position before.
        groups: int64 `[B]`, number of the prompt.
        logp: float32 `[B, T]`, log-probability of each token under the distribution that it was drawn from, 0 off the
            mask.
        kept: int32 `[N, ceil(V / 32)]`, for the N True places of the mask in row order, which tokens passed the
            sampler's filters, packed as in `arcore.ops.Sampled`; None where nothing was filtered.
        temperature: of the draws.
        rewards: `[B, M]`, or None before they are known.
        meta: anything else that is worth keeping, such as the filters' settings.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: shapes do not fit, a group's rows do not stand together, or a row starts with a drawn token.
    """

    tokens: Tensor
    mask: Tensor
    groups: Tensor
    logp: Tensor | None = None
    kept: Tensor | None = None
    temperature: float = 1.0
    rewards: Tensor | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_rows(self.tokens, self.mask)
        if self.groups.shape != self.tokens.shape[:1]:
            raise ValueError(
                f"arcore.Rollout: expected groups ({len(self.tokens)},) but got {tuple(self.groups.shape)}; give one "
                "number of a prompt per row"
            )
        if len(torch.unique_consecutive(self.groups)) != len(torch.unique(self.groups)):
            raise ValueError(
                "arcore.Rollout: expected the rows of a group to stand together but they do not; sort the rows by group"
            )
        if self.logp is not None and self.logp.shape != self.tokens.shape:
            raise ValueError(
                f"arcore.Rollout: expected logp of tokens's shape {tuple(self.tokens.shape)} but got "
                f"{tuple(self.logp.shape)}; put 0 off the mask"
            )
        if self.rewards is not None and (self.rewards.dim() != 2 or len(self.rewards) != len(self.tokens)):
            raise ValueError(
                f"arcore.Rollout: expected rewards ({len(self.tokens)}, M) but got {tuple(self.rewards.shape)}; a "
                "single reward is a column"
            )
        if self.kept is not None and len(self.kept) != int(self.mask.sum()):
            raise ValueError(
                f"arcore.Rollout: expected kept sets of the {int(self.mask.sum())} drawn tokens but got "
                f"{len(self.kept)}; give one per True place of the mask, in row order"
            )

    @property
    def lengths(self) -> Tensor:
        """Tokens that each response has, int64 `[B]`; 0 for an empty one."""
        return self.mask.sum(1)


@check_kinds
@dataclass(frozen=True, kw_only=True)
class PreferenceBatch:
    """Pairs of responses: rows 2 i and 2 i + 1 are the first and the second of pair i.

    Attributes:
        tokens: int64 `[2 P, T]`, prompt, response, padding.
        mask: bool `[2 P, T]`, the responses' tokens.
        preference: `[P]`, probability that the first is preferred; 1.0 for a decided winner.
        reference: `[2 P]` sums of log-probabilities under the frozen model, or None.
        previous: `[2 P]` under the policy that drew them (INPO), or None.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: shapes do not fit, or a preference is out of [0, 1].
    """

    tokens: Tensor
    mask: Tensor
    preference: Tensor
    reference: Tensor | None = None
    previous: Tensor | None = None

    def __post_init__(self) -> None:
        check_rows(self.tokens, self.mask)
        pairs = len(self.preference) if self.preference.dim() == 1 else -1
        if 2 * pairs != len(self.tokens):
            raise ValueError(
                f"arcore.PreferenceBatch: expected preference ({len(self.tokens) // 2},), half as many as rows, but "
                f"got {tuple(self.preference.shape)}"
            )
        if not ((self.preference >= 0) & (self.preference <= 1)).all():
            raise ValueError(
                "arcore.PreferenceBatch: expected preferences in [0, 1] but got "
                f"{self.preference.tolist()[:4]}; they are probabilities that the first is preferred"
            )
        for name, found in (("reference", self.reference), ("previous", self.previous)):
            if found is not None and found.shape != self.tokens.shape[:1]:
                raise ValueError(
                    f"arcore.PreferenceBatch: expected {name} ({len(self.tokens)},) but got {tuple(found.shape)}; it "
                    "is one sum of log-probabilities per row"
                )


class RewardFn(Protocol):
    """Judges responses."""

    def __call__(self, rollout: Rollout, /) -> Tensor:
        """Rewards `[B, M]`, larger is better."""
        ...


class PairwiseRater(Protocol):
    """Compares responses to the same prompt."""

    def __call__(self, rollout: Rollout, first: Tensor, second: Tensor, /) -> Tensor:
        """Probability `[P]` that row `first[i]` is preferred to row `second[i]`."""
        ...


def check_rows(tokens: Tensor, mask: Tensor) -> None:
    """Raise unless these are rows of tokens with the mask of what was drawn."""
    if tokens.dim() != 2 or mask.shape != tokens.shape:
        raise ValueError(
            f"expected tokens and mask of one shape (B, T) but got {tuple(tokens.shape)} and {tuple(mask.shape)}; pad "
            "them alike"
        )
    if tokens.dtype != torch.int64 or mask.dtype != torch.bool:
        raise TypeError(
            f"expected int64 tokens and a bool mask but got {dtype_name(tokens.dtype)} and {dtype_name(mask.dtype)}; "
            "use tokens.long() and mask.bool()"
        )
    if mask.shape[1] and mask[:, 0].any():
        row = int(mask[:, 0].nonzero()[0, 0])
        raise ValueError(
            f"expected every response to follow at least one token of a prompt but row {row} has none; begin with the "
            "model's first token"
        )
