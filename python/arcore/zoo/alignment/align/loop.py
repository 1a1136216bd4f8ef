"""The loop of `arcore run align`: draw, judge, score, step, and a guarded evaluation.

Every random number comes from (seed, step), so a run that was interrupted and resumed is the run that was not.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from arcore.nn import Rollout, TokenStats
from arcore.objectives import score_rollout
from arcore.zoo.alignment.align.files import CHECKPOINT, keep
from arcore.zoo.alignment.align.objectives import OBJECTIVES, Scored
from arcore.zoo.alignment.align.policy import Policy
from arcore.zoo.alignment.align.rewards import RewardFailure, load_judge, load_problems, load_prompts
from arcore.zoo.alignment.align.scoring import Scoring
from arcore.zoo.statistics.reusable_holdout import EvalGuard, Guarded


class Aligner:
    """A policy on its way.

    Args:
        options: see `arcore.zoo.alignment.align.Options`.
        model: the policy and its tokenizer, instead of those that the options name.

    Attributes:
        policy: what is trained, and its reference.
        scoring: what judges, and how its rewards count.
        rows: figures of each step.
        evaluations: figures of each evaluation.
        step: steps done.
        skipped: steps without an update, and why.
        unjudged: evaluations whose responses could not be judged, and why.
    """

    def __init__(self, options: Any, model: tuple[Any, Any] | None = None) -> None:
        self.options = options
        self.objective = OBJECTIVES[options.objective]
        problems = load_problems(str(options.prompts), options.seed)
        self.scoring = Scoring(options, self.objective, load_judge(options.reward, problems))
        prompts = problems.prompts if problems else load_prompts(Path(options.prompts))
        self.prompts, self.held_out = _parted(prompts, options)
        self.policy = Policy(options, critic=self.objective.critic, model=model)
        trained = list(self.policy.trained.values())
        self.optimizer = torch.optim.AdamW(trained, lr=options.lr, weight_decay=0.0)
        low, high = options.reward_range
        self.guard = EvalGuard(low=low, high=high, budget=options.guard_budget, seed=options.seed)
        self.rows: list[dict[str, float]] = []
        self.evaluations: list[dict[str, float]] = []
        self.skipped: list[str] = []
        self.unjudged: list[str] = []
        self.step = 0

    # -- one step

    def advance(self) -> dict[str, float]:
        """One step; returns its figures, also where the update was skipped."""
        began = time.monotonic()
        rollout, prompts, responses = self.draw(self.step)
        figures: dict[str, float] = {"step": self.step + 1}
        try:
            scored = self.scoring.judged(rollout, prompts, responses)
        except RewardFailure as failure:
            name = f"step-{self.step + 1:06d}"
            self.skipped.append(
                self._kept(f"step {self.step + 1}", name, rollout, prompts, responses, failure)
            )
            scored = None
        if scored is not None:
            figures |= self._update(scored)
        self.step += 1
        figures["seconds"] = time.monotonic() - began
        self.rows.append(figures)
        return figures

    def draw(self, step: int) -> tuple[Rollout, list[str], list[str]]:
        """The step's rollout, its prompts and its responses, one per row."""
        o = self.options
        order: list[int] = []
        epoch = 0
        while len(order) < o.prompts_per_step * (step + 1):
            order += torch.randperm(len(self.prompts), generator=_generator(o.seed, epoch)).tolist()
            epoch += 1
        chosen = [self.prompts[i] for i in order[o.prompts_per_step * step :][: o.prompts_per_step]]
        return self.policy.respond(chosen, o.group, seed=o.seed * 2**20 + step, step=self.step)

    def _kept(
        self,
        what: str,
        name: str,
        rollout: Rollout,
        prompts: list[str],
        responses: list[str],
        failure: RewardFailure,
    ) -> str:
        """Keep responses that could not be judged; a sentence about them, or the error where the run is to stop."""
        path = keep(self, name, rollout, prompts, responses, failure)
        if self.options.on_reward_error == "stop":
            begun = (Path(self.options.out) / CHECKPOINT).exists()
            raise RuntimeError(
                f"{what}: {failure}; the responses are kept in {path}; repair the reward and "
                f"{'go on with --resume' if begun else 'run again'}, or go on without them with --on-reward-error skip"
            ) from failure
        return f"{what}: {failure} ({path})"

    def _idle(self, scored: Scored) -> bool:
        """Whether the step has nothing to learn from: all rewards of each group alike, or no decided pair."""
        if scored.pairs is not None and scored.wins is None:
            return not len(scored.pairs)
        grouped = scored.rewards.view(-1, self.options.group)
        alike = bool((grouped == grouped[:, :1]).all())
        return alike and self.options.kl_weight == 0 and self.policy.critic is None

    def _update(self, scored: Scored) -> dict[str, float]:
        o, policy, rollout = self.options, self.policy, scored.rollout
        mask, pairs = rollout.mask, scored.pairs if self.objective.needs == "revisions" else None
        with policy.frozen() as frozen:
            scored.reference = score_rollout(frozen, rollout).logp
            if pairs is not None and len(pairs):
                reviser_reference = policy.revisions(frozen, rollout, pairs)
        idle = self._idle(scored)
        figures: dict[str, float] = {}
        # With gradients recorded, as in the update: without, matrix products may round in another way, and the ratio
        # would not be exactly 1.
        before = TokenStats(
            *(t.detach() for t in score_rollout(policy.model, rollout, entropy=True) if t is not None)
        )
        scored.old = before.logp
        if policy.critic is not None:
            with torch.no_grad():
                scored.old_values = policy.values(rollout)
        for index in range(0 if idle else o.updates):
            scored.stats = score_rollout(policy.model, rollout, entropy=True)
            if index == 0:
                apart = (scored.stats.logp.detach() - scored.old)[mask]
                figures["ratio_error"] = float((apart.exp() - 1).abs().max())
            if policy.critic is not None:
                scored.values = policy.values(rollout)
            if pairs is not None:
                scored.revisions = (policy.revisions(policy.model, rollout, pairs), reviser_reference)
            if o.objective == "drw":
                self.scoring.reweigh(scored, list(policy.trained.values()))
            loss = self.objective.loss(scored)
            figures |= {"loss": float(loss.detach()), "grad_norm": self._descend(loss)}
        if idle:
            self.skipped.append(
                f"step {self.step + 1}: all rewards of each group are equal, nothing to learn from"
            )
        apart = (scored.reference - before.logp)[mask]
        assert before.entropy is not None
        figures |= {
            "reward": float(scored.rewards.mean()) / self.scoring.factor,
            "kl": float((apart.exp() - apart - 1).mean()),
            "entropy": float(before.entropy[mask].mean()),
            "length": float(rollout.lengths.float().mean()),
        }
        if rollout.logp is not None:
            figures["sampler_gap"] = float((rollout.logp - before.logp)[mask].abs().max())
        return figures | self.scoring.figures(scored) | scored.figures

    def _descend(self, loss: Tensor) -> float:
        """A step of the optimiser; the gradient's norm before clipping."""
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(list(self.policy.trained.values()), self.options.max_grad_norm)
        if not torch.isfinite(norm):
            raise RuntimeError(
                f"step {self.step + 1}: the gradient is {float(norm)}; lower --lr or --temperature, and go on from "
                "the last checkpoint with --resume"
            )
        self.optimizer.step()
        return float(norm)

    # -- evaluation

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Mean rewards of one response to each training and held-out prompt, and what the guard says; kept.

        Returns:
            The figures; {} where the responses could not be judged, which `unjudged` tells.
        """
        try:
            parts = [
                self._evaluated(prompts) for prompts in (self.prompts[: len(self.held_out)], self.held_out)
            ]
        except Unjudged as found:
            what, name = f"evaluation at step {self.step}", f"evaluation-{self.step:06d}"
            self.unjudged.append(self._kept(what, name, *found.responses, found.failure))
            return {}
        scores = [found for found, _ in parts]
        if self.options.objective == "drw_hypervolume":
            self.scoring.measure_front(parts[0][1].mean(0))
        together = torch.cat(scores)
        least, most = float(together.min()), float(together.max())
        low, high = self.options.reward_range
        if not low <= least <= most <= high:
            raise ValueError(
                f"--reward-range: expected rewards from {low:g} to {high:g} in the evaluation at step {self.step} but "
                f"got {least:g} to {most:g}; give --reward-range LOW HIGH"
            )
        guarded: Guarded = self.guard.check(*(found.numpy() for found in scores))
        figures = {
            "step": float(self.step),
            "train": float(scores[0].mean()),
            "train_error": _standard_error(scores[0]),
            "guarded": guarded.value,
            "spent": float(guarded.spent),
        }
        self.evaluations.append(figures)
        return figures

    def _evaluated(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """What counts of each response, `[B]`, and all of its rewards, `[B, M]`."""
        o, policy = self.options, self.policy
        drawn = policy.respond(prompts, o.eval_samples, seed=2**40 + o.seed, step=self.step)
        try:
            others = None
            if self.scoring.judge.kind == "prefer":
                with policy.frozen() as frozen:
                    _, _, others = policy.respond(
                        prompts, o.eval_samples, seed=2**41 + o.seed, step=self.step, writer=frozen
                    )
            return self.scoring.scores(*drawn[1:], others)
        except RewardFailure as failure:
            raise Unjudged(drawn, failure) from failure


class Unjudged(Exception):
    """Responses of an evaluation that the judge failed on."""

    def __init__(self, responses: tuple[Rollout, list[str], list[str]], failure: RewardFailure) -> None:
        super().__init__(str(failure))
        self.responses, self.failure = responses, failure


def _parted(prompts: list[str], options: Any) -> tuple[list[str], list[str]]:
    """Prompts to train on, and those that are only evaluated on."""
    held = round(options.held_out * len(prompts))
    if options.held_out > 0 and not 0 < held < len(prompts):
        raise ValueError(
            f"--held-out {options.held_out} of {len(prompts)} prompts leaves {held} to evaluate on and "
            f"{len(prompts) - held} to train on; give more prompts, or 0 for no evaluation"
        )
    order = torch.randperm(len(prompts), generator=_generator(options.seed, -1)).tolist()
    return [prompts[i] for i in order[held:]], [prompts[i] for i in order[:held]]


def _generator(seed: int, stream: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + stream + 1) % 2**63)


def _standard_error(values: Tensor) -> float:
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else float("nan")
