"""Our losses and our log-prob op inside of TRL's GRPO trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from arcore._optional import require
from arcore.integrations.trl._scoring import causal_lm_stats
from arcore.nn.rollout import TokenStats
from arcore.objectives import grpo_loss
from arcore.objectives.policy import Reduction
from arcore.zoo.alignment.nft import nft_loss
from arcore.zoo.alignment.spo import win_rate_rewards

_METHODS = ("_get_per_token_logps_and_entropies", "_compute_loss")


class GrpoBatch(NamedTuple):
    """What TRL's trainer knows of a batch of completions. Rows are completions of T tokens, right-padded.

    Attributes:
        stats: log-probabilities with gradient, and entropies, `[B, T]`.
        old: `[B, T]` under the policy that drew them; the same numbers where TRL is on-policy.
        mask: `[B, T]` bool, tokens that count.
        advantages: `[B]` as TRL's settings make them (`scale_rewards`).
        groups: int64 `[B]`, equal for completions of the same prompt.
        group_size: TRL's `num_generations`.
        reference: `[B, T]` under the frozen model, or None where TRL's `beta` is 0.
        kl_weight: TRL's `beta`.
    """

    stats: TokenStats
    old: Tensor
    mask: Tensor
    advantages: Tensor
    groups: Tensor
    group_size: int
    reference: Tensor | None
    kl_weight: float


Loss = Callable[[GrpoBatch], Tensor]


def trainer_class(loss: Loss | None = None, base: Any = None) -> Any:
    """A subclass of TRL's GRPO trainer that scores with our op, and optimises `loss`.

    Args:
        loss: of a batch, a scalar: `nft`, `rft`, one made by `grpo`, or any function; None keeps TRL's own loss.
        base: the trainer to derive from; `trl.GRPOTrainer` when None.

    Raises:
        ImportError: TRL is missing.
        RuntimeError: this version of TRL has no such methods.
    """
    base = require("trl", extra="trl").GRPOTrainer if base is None else base
    missing = [name for name in _METHODS if not hasattr(base, name)]
    if missing:
        raise RuntimeError(
            f"expected a trainer with {', '.join(_METHODS)}, as in TRL 1.16, but {base.__name__} has no "
            f"{', '.join(missing)}; use that version"
        )

    class ArcoreTrainer(base):  # type: ignore[misc]
        def _get_per_token_logps_and_entropies(
            self,
            model: Any,
            input_ids: Tensor,
            attention_mask: Tensor,
            logits_to_keep: int,
            batch_size: int | None = None,
            compute_entropy: bool = False,
            compute_aux_loss: bool = False,
            **others: Any,
        ) -> tuple[Tensor, Tensor | None, Tensor | None]:
            # Several processes need the model's own forward, whose wrapper adds gradients up.
            several = self.accelerator.num_processes > 1
            if several or compute_aux_loss or any(value is not None for value in others.values()):
                return super()._get_per_token_logps_and_entropies(  # type: ignore[no-any-return]
                    model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, compute_aux_loss,
                    **others,
                )  # fmt: skip
            size = batch_size or len(input_ids)
            parts = []
            for ids, mask in zip(input_ids.split(size), attention_mask.split(size), strict=True):
                with self.accelerator.autocast():
                    parts.append(
                        causal_lm_stats(
                            self.accelerator.unwrap_model(model),
                            ids,
                            mask,
                            logits_to_keep,
                            temperature=self.temperature,
                            entropy=compute_entropy,
                        )
                    )
            logp = torch.cat([part.logp for part in parts])
            entropy = (
                torch.cat([p.entropy for p in parts if p.entropy is not None]) if compute_entropy else None
            )
            return logp, entropy, None

        def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
            if loss is None:
                found: Tensor = super()._compute_loss(model, inputs)
                return found
            batch = _batch(self, model, inputs)
            mode = "train" if self.model.training else "eval"
            if batch.stats.entropy is not None:
                mean = batch.stats.entropy.detach()[batch.mask].mean()
                self._metrics[mode]["entropy"].append(float(self.accelerator.gather(mean).nanmean()))
            scale = self.current_gradient_accumulation_steps if mode == "train" else 1
            return loss(batch) / scale

    ArcoreTrainer.__name__ = ArcoreTrainer.__qualname__ = f"Arcore{base.__name__}"
    return ArcoreTrainer


def _batch(trainer: Any, model: Any, inputs: dict[str, Any]) -> GrpoBatch:
    prompts, completions = inputs["prompt_ids"], inputs["completion_ids"]
    ids = torch.cat([prompts, completions], 1)
    seen = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    logp, entropy, _ = trainer._get_per_token_logps_and_entropies(
        model, ids, seen, completions.shape[1], compute_entropy=True
    )
    mask = inputs["completion_mask"].bool()
    if "tool_mask" in inputs:
        mask = mask & inputs["tool_mask"].bool()
    old = inputs.get("old_per_token_logps")
    real = prompts.masked_fill(inputs["prompt_mask"] == 0, -1)
    _, groups = torch.unique(real, dim=0, return_inverse=True)
    return GrpoBatch(
        TokenStats(logp, entropy),
        logp.detach() if old is None else old,
        mask,
        inputs["advantages"],
        groups,
        trainer.num_generations,
        inputs.get("ref_per_token_logps"),
        float(trainer.beta),
    )


def grpo(
    *,
    how: Reduction = "sequence_mean",
    length: int | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Loss:
    """`arcore.objectives.grpo_loss` on TRL's advantages and references; arguments are those of that function.

    The KL term is not multiplied by the ratio: TRL's own loss with `use_bias_correction_kl=False`.
    """

    def loss(batch: GrpoBatch) -> Tensor:
        return grpo_loss(
            batch.stats.logp,
            batch.old,
            batch.advantages,
            batch.mask,
            how=how,
            length=length,
            clip_low=clip_low,
            clip_high=clip_high,
            reference=batch.reference,
            kl_weight=batch.kl_weight if batch.reference is not None else 0.0,
        )

    return loss


def nft(batch: GrpoBatch) -> Tensor:
    """NFT's loss; needs a verifier's rewards of 0 and 1 and `scale_rewards="none"`. See `arcore.zoo.alignment.nft`."""
    return _verified(batch, 1.0)


def rft(batch: GrpoBatch) -> Tensor:
    """Fine-tuning on right completions alone; conditions are those of `nft`."""
    return _verified(batch, 0.0)


def _verified(batch: GrpoBatch, negative_weight: float) -> Tensor:
    sizes = torch.bincount(batch.groups)[batch.groups]
    if (sizes % batch.group_size != 0).any():
        raise ValueError(
            f"arcore.nft: expected whole groups of {batch.group_size} completions in a batch but got groups of "
            f"{sorted(set(sizes.tolist()))}; set steps_per_generation=1 and gradient_accumulation_steps=1"
        )
    # Without division by a deviation TRL's advantage is r minus the group's share of right answers.
    right = batch.advantages > 0
    share = torch.where(right, 1 - batch.advantages, -batch.advantages)
    steps = share * batch.group_size
    if ((steps - steps.round()).abs() > 1e-3).any() or not ((share >= 0) & (share <= 1)).all():
        raise ValueError(
            "arcore.nft: expected advantages of a verifier's rewards, 0 or 1, less their group's mean, but got "
            f'{batch.advantages.tolist()[:4]}; set scale_rewards="none" and a verifier'
        )
    loss = nft_loss(
        batch.stats.logp, batch.old, right, batch.groups, batch.mask, negative_weight=negative_weight
    )
    if batch.reference is None or batch.kl_weight == 0:
        return loss
    apart = torch.where(batch.mask, batch.reference - batch.stats.logp, 0.0)
    penalty = (apart.exp() - apart - 1).sum() / max(1, int(batch.mask.sum()))
    return loss + batch.kl_weight * penalty


def spo(batch: GrpoBatch) -> Tensor:
    """SPO: GRPO without division by a deviation on win rates as rewards; needs `win_rates` and `scale_rewards="none"`.

    See `arcore.zoo.alignment.spo`.
    """
    return grpo()(batch)


def win_rates(prefer: Callable[[str, str, str], float], group_size: int) -> Callable[..., list[float]]:
    """A reward function for TRL: the share of the other completions of its prompt that each beats.

    Args:
        prefer: from a prompt and two completions to the probability that the first is preferred.
        group_size: TRL's `num_generations`, at least 2.

    Raises:
        ValueError: the group's size is below 2; or, when called, completions come in other groups.
    """
    if group_size < 2:
        raise ValueError(f"arcore.win_rates: expected a group_size of at least 2 but got {group_size}")

    def rewards(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        if len(completions) % group_size:
            raise ValueError(
                f"arcore.win_rates: expected whole groups of {group_size} completions but got {len(completions)}"
            )
        found: list[float] = []
        for first in range(0, len(completions), group_size):
            own = range(first, first + group_size)
            if any(prompts[i] != prompts[first] for i in own):
                raise ValueError(
                    f"arcore.win_rates: expected {group_size} completions of each prompt behind each other"
                )
            wins = torch.full((group_size, group_size), 0.5)
            for i in own:
                for j in range(first, i):
                    won = float(prefer(prompts[first], completions[i], completions[j]))
                    wins[i - first, j - first], wins[j - first, i - first] = won, 1 - won
            found += win_rate_rewards(wins).tolist()
        return found

    return rewards
