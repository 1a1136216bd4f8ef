"""Our losses of pairs and our log-prob op inside of TRL's DPO trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from arcore._optional import require
from arcore.integrations.trl._scoring import completion_logprobs
from arcore.objectives import kto_loss, preference_loss
from arcore.objectives.preference import PreferenceKind
from arcore.zoo.alignment.inpo import inpo_loss
from arcore.zoo.alignment.srpo import srpo_loss

# Settings of TRL that change its own loss; a loss that is put in its place does not know them.
_UNUSED = {"ld_alpha": None, "use_weighting": False, "f_divergence_type": "reverse_kl"}


@dataclass(frozen=True)
class PairBatch:
    """What TRL's trainer knows of a batch of P pairs. The first of each pair is the preferred one.

    Attributes:
        policy: `[P, 2]` sums of log-probabilities over the completions' tokens, with gradient.
        reference: `[P, 2]` under the frozen model.
        preference: `[P]` of ones.
        lengths: `[P, 2]` tokens of the completions.
        beta: TRL's `beta`.
        model: the policy.
        frozen: a context in which the frozen model is there, without gradient.
        score: from a model to `[P, 2]` sums of these completions.
        revise: from a model and the tokens between two answers to `[P, 2, 2]` sums, `[:, a, b]` those of completion b
            with completion a and these tokens behind the prompt.
    """

    policy: Tensor
    reference: Tensor
    preference: Tensor
    lengths: Tensor
    beta: float
    model: Any
    frozen: Callable[[], Any]
    score: Callable[[Any], Tensor]
    revise: Callable[[Any, Sequence[int]], Tensor]


PairLoss = Callable[[PairBatch], Tensor]


def pair_trainer_class(loss: PairLoss, base: Any = None) -> Any:
    """A subclass of TRL's DPO trainer that scores with our op, and optimises `loss`.

    Args:
        loss: of a batch, a scalar: `dpo`, `ipo`, `hinge`, `kto`, one made by `inpo` or `srpo`, or any function.
        base: the trainer to derive from; `trl.DPOTrainer` when None.

    Raises:
        ImportError: TRL is missing.
        RuntimeError: this version of TRL has no such method.
    """
    base = require("trl", extra="trl").DPOTrainer if base is None else base
    if not hasattr(base, "_compute_loss"):
        raise RuntimeError(
            f"expected a trainer with _compute_loss, as TRL 1.16's DPOTrainer, but {base.__name__} has none; use that "
            "version"
        )

    class ArcorePairTrainer(base):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            for name, plain in _UNUSED.items():
                if getattr(self, name, plain) != plain:
                    raise ValueError(
                        f"arcore.pair_trainer_class: expected {name}={plain!r} but got {getattr(self, name)!r}; it "
                        "belongs to TRL's own loss, which is replaced here"
                    )
            if getattr(self, "aux_loss_enabled", False):
                raise ValueError(
                    "arcore.pair_trainer_class: expected output_router_logits=False but it is True; the router's loss "
                    "is not added here"
                )

        def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
            if self.accelerator.num_processes > 1:
                raise RuntimeError(
                    "arcore.pair_trainer_class: expected one process but got "
                    f"{self.accelerator.num_processes}; scoring does not go through the wrapper that adds gradients up"
                )
            batch = _batch(self, model, inputs)
            found = loss(batch)
            _log(self, batch, inputs)
            if not return_outputs:
                return found
            with torch.no_grad():
                outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
            return found, outputs

    ArcorePairTrainer.__name__ = ArcorePairTrainer.__qualname__ = f"Arcore{base.__name__}"
    return ArcorePairTrainer


def _batch(trainer: Any, model: Any, inputs: dict[str, Any]) -> PairBatch:
    ids, attention, completion = (inputs[n] for n in ("input_ids", "attention_mask", "completion_mask"))

    def score(scorer: Any) -> Tensor:
        with trainer.accelerator.autocast():
            logp = completion_logprobs(trainer.accelerator.unwrap_model(scorer), ids, attention, completion)
        return torch.stack(logp.sum(1).chunk(2), 1)

    def revise(scorer: Any, between: Sequence[int]) -> Tensor:
        rows, starts = _revisions(ids, attention, completion, list(between))
        width = max(map(len, rows))
        filled = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=ids.device)
        places = torch.arange(width, device=ids.device)
        ends, begins = (
            torch.tensor(some, device=ids.device)[:, None] for some in (list(map(len, rows)), starts)
        )
        with trainer.accelerator.autocast():
            logp = completion_logprobs(
                trainer.accelerator.unwrap_model(scorer),
                filled,
                (places < ends).long(),
                (places >= begins) & (places < ends),
            )
        return logp.sum(1).view(-1, 2, 2)

    @contextmanager
    def frozen() -> Iterator[Any]:
        with torch.no_grad():
            if trainer.ref_model is not None:
                yield trainer.ref_model
                return
            inner = trainer.accelerator.unwrap_model(model)
            if not hasattr(inner, "peft_config"):
                raise ValueError(
                    "arcore.pair_trainer_class: expected a reference model, adapters, or precomputed reference "
                    "log-probabilities but got none of them; give ref_model"
                )
            use_adapter = require("trl.trainer.utils", extra="trl").use_adapter
            with use_adapter(inner, adapter_name="ref" if "ref" in inner.peft_config else None):
                yield inner

    if "ref_chosen_logps" in inputs:
        reference = torch.stack([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]], 1)
    else:
        with frozen() as scorer:
            reference = score(scorer)
    policy = score(model)
    lengths = torch.stack(completion.sum(1).chunk(2), 1)
    ones = policy.new_ones(len(policy))
    beta = float(trainer.beta)
    return PairBatch(policy, reference, ones, lengths, beta, model, frozen, score, revise)


def _revisions(
    ids: Tensor, attention: Tensor, completion: Tensor, between: list[int]
) -> tuple[list[list[int]], list[int]]:
    """Rows of prompt, answer a, `between`, answer b, for each pair and each a and b; and where b begins."""
    pairs = len(ids) // 2
    rows, starts = [], []
    for pair in range(pairs):
        both = (pair, pairs + pair)
        for a in both:
            known = attention[a].bool()
            context = ids[a][known].tolist() + between
            for b in both:
                starts.append(len(context))
                rows.append(context + ids[b][completion[b].bool()].tolist())
    return rows, starts


def _log(trainer: Any, batch: PairBatch, inputs: dict[str, Any]) -> None:
    """The figures that TRL logs, as far as they do not need the logits."""
    mode = "train" if trainer.model.training else "eval"
    kept = trainer._metrics[mode]
    rewards = batch.beta * (batch.policy - batch.reference).detach()
    if mode == "train":
        trainer._total_train_tokens += int(inputs["attention_mask"].sum())
    kept["num_tokens"] = [trainer._total_train_tokens]
    for place, name in enumerate(("chosen", "rejected")):
        kept[f"rewards/{name}"].append(float(rewards[:, place].mean()))
        kept[f"logps/{name}"].append(float(batch.policy[:, place].detach().mean()))
    kept["rewards/accuracies"].append(float((rewards[:, 0] > rewards[:, 1]).float().mean()))
    kept["rewards/margins"].append(float((rewards[:, 0] - rewards[:, 1]).mean()))


def _preference(batch: PairBatch, kind: PreferenceKind) -> Tensor:
    return preference_loss(batch.policy, batch.reference, batch.preference, beta=batch.beta, kind=kind)


def dpo(batch: PairBatch) -> Tensor:
    """`arcore.objectives.preference_loss`, the logistic loss; TRL's own `loss_type="sigmoid"`."""
    return _preference(batch, "dpo")


def ipo(batch: PairBatch) -> Tensor:
    """The squared loss on sums over tokens, as in the paper; TRL's `loss_type="ipo"` takes means over tokens."""
    return _preference(batch, "ipo")


def hinge(batch: PairBatch) -> Tensor:
    """SLiC's hinge; TRL's own `loss_type="hinge"`."""
    return _preference(batch, "hinge")


def kto(batch: PairBatch) -> Tensor:
    """`arcore.objectives.kto_loss` with the preferred completions as desirable ones and the others as undesirable."""
    desirable = torch.tensor([True, False], device=batch.policy.device).expand(len(batch.policy), -1)
    return kto_loss(batch.policy.flatten(), batch.reference.flatten(), desirable.flatten(), beta=batch.beta)


def inpo(*, tau: float, eta: float, previous: Any = None) -> PairLoss:
    """INPO's loss, a step of self-play; see `arcore.zoo.alignment.inpo.inpo_loss`.

    Args:
        tau: weight of the KL divergence from the reference, above 0; TRL's `beta` is not used.
        eta: inverse of the step's size, at least tau.
        previous: frozen model of the iteration before, which drew the pairs; None in the first iteration, where it is
            the reference.

    Raises:
        ValueError: not 0 < tau <= eta.
    """
    if not 0 < tau <= eta:
        raise ValueError(f"arcore.inpo: expected 0 < tau <= eta but got tau={tau} and eta={eta}")

    def loss(batch: PairBatch) -> Tensor:
        before = batch.reference
        if previous is not None:
            with torch.no_grad():
                before = batch.score(previous)
        return inpo_loss(batch.policy, batch.reference, before, batch.preference, tau=tau, eta=eta)

    return loss


def srpo(*, between: Sequence[int], alpha: float = 0.5) -> PairLoss:
    """SRPO's loss of a policy and its own reviser; see `arcore.zoo.alignment.srpo.srpo_loss`.

    Args:
        between: tokens that stand between an answer and its revision, such as those of "\\nA better answer:\\n".
        alpha: share of the reviser's loss, from 0 to 1.

    Raises:
        ValueError: `between` is empty.
    """
    if not len(between):
        raise ValueError("arcore.srpo: expected tokens between an answer and its revision but got none")

    def loss(batch: PairBatch) -> Tensor:
        with batch.frozen() as scorer:
            reference = batch.revise(scorer, between)
        reviser = batch.revise(batch.model, between)
        return srpo_loss(
            batch.policy, reviser, batch.reference, reference, batch.preference, beta=batch.beta, alpha=alpha
        )

    return loss
