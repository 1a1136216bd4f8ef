"""The loop of `arcore run align`: draw, judge, score, step; with checkpoints, figures and a guarded evaluation.

Every random number comes from (seed, step), so a run that was interrupted and resumed is the run that was not.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from arcore._optional import require
from arcore.decoding import Sampling, draw_rollout
from arcore.nn import Rollout, TokenStats
from arcore.objectives import score, score_rollout, sequence_logprob
from arcore.recipes.language import language_model
from arcore.zoo.alignment.align.files import CHECKPOINT, keep
from arcore.zoo.alignment.align.objectives import OBJECTIVES, Scored
from arcore.zoo.alignment.align.rewards import (
    Judge,
    RewardFailure,
    load_judge,
    load_problems,
    load_prompts,
)
from arcore.zoo.alignment.dynamic_reward_weighting import HypervolumeWeight, gradient_weights
from arcore.zoo.statistics.reusable_holdout import EvalGuard, Guarded

# Figures of a step beside the rewards by name.
OWN = (
    "step",
    "reward",
    "kl",
    "entropy",
    "length",
    "loss",
    "grad_norm",
    "seconds",
    "ratio_error",
    "sampler_gap",
)
REVISE = "\nA better answer:\n"


class Aligner:
    """A policy on its way.

    Args:
        options: see `arcore.zoo.alignment.align.Options`.
        model: the policy and its tokenizer, instead of those that the options name.

    Attributes:
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
        self.judge: Judge = load_judge(options.reward, problems)
        self._check_judge()
        prompts = problems.prompts if problems else load_prompts(Path(options.prompts))
        self.model: Any
        self.tokenizer: Any
        self.model, self.tokenizer = language_model(options.model) if model is None else model
        held = round(options.held_out * len(prompts))
        if options.held_out > 0 and not 0 < held < len(prompts):
            raise ValueError(
                f"--held-out {options.held_out} of {len(prompts)} prompts leaves {held} to evaluate on and "
                f"{len(prompts) - held} to train on; give more prompts, or 0 for no evaluation"
            )
        order = torch.randperm(len(prompts), generator=_generator(options.seed, -1)).tolist()
        self.held_out = [prompts[i] for i in order[:held]]
        self.prompts = [prompts[i] for i in order[held:]]
        torch.manual_seed(options.seed)
        self.adapters: list[Any] = []
        self.reference: Any = self.model
        if options.lora_rank:
            self._add_lora()
        else:
            import copy

            self.reference = copy.deepcopy(self.model).requires_grad_(False)
        if options.reference is not None:
            self.reference = self._other_reference(options.reference)
        self.critic = nn.Linear(self._width(), 1) if self.objective.critic else None
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if self.critic is not None:
            nn.init.zeros_(self.critic.weight)
            self.trained |= {f"critic.{name}": p for name, p in self.critic.named_parameters()}
        self.optimizer = torch.optim.AdamW(list(self.trained.values()), lr=options.lr, weight_decay=0.0)
        low, high = options.reward_range
        self.guard = EvalGuard(low=low, high=high, budget=options.guard_budget, seed=options.seed)
        self.weights: Tensor | None = None
        self.front: HypervolumeWeight | None = None
        self.factor = 1.0
        self.rows: list[dict[str, float]] = []
        self.evaluations: list[dict[str, float]] = []
        self.skipped: list[str] = []
        self.unjudged: list[str] = []
        self.step = 0

    # -- setting up

    def _check_judge(self) -> None:
        needs, kind, name = self.objective.needs, self.judge.kind, self.options.objective
        if needs == "rater" and kind != "prefer":
            raise ValueError(
                f"--objective {name} needs a rater: a reward file with prefer(prompt, first, second), not {kind}()"
            )
        if needs == "several" and kind != "rewards":
            raise ValueError(
                f"--objective {name} needs a reward file with rewards(prompt, response), not {kind}()"
            )
        if needs in ("rewards", "verifier") and kind == "prefer":
            raise ValueError(
                f"--objective {name} needs rewards but the file has prefer(); use dpo, ipo, inpo, srpo or spo with it"
            )

    def _add_lora(self) -> None:
        peft = require("peft", extra="align")
        names = [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and name != "lm_head"
        ]
        config = peft.LoraConfig(
            r=self.options.lora_rank,
            lora_alpha=2 * self.options.lora_rank,
            target_modules=names,
            lora_dropout=0.0,
            bias="none",
        )
        self.model.requires_grad_(False)
        peft.inject_adapter_in_model(config, self.model)
        self.adapters = [m for m in self.model.modules() if hasattr(m, "lora_A")]

    def _other_reference(self, source: str) -> Any:
        reference, tokenizer = language_model(source)
        ours, theirs = self.model.vocab_size, reference.vocab_size
        sample = "The quick brown fox: 0123, naïve?"
        if ours != theirs or tokenizer.encode(sample) != self.tokenizer.encode(sample):
            raise ValueError(
                f"--reference {source}: expected a model with the policy's vocabulary of {ours} tokens but this one's "
                f"{theirs} are others; its log-probabilities could not be compared (another architecture may differ in "
                "everything else)"
            )
        return reference.requires_grad_(False)

    def _width(self) -> int:
        return int(self.model.head_weight.shape[1])

    @contextmanager
    def frozen(self) -> Iterator[Any]:
        """The reference model: the policy without its adapters, or a model of its own."""
        if self.reference is not self.model:
            with torch.no_grad():
                yield self.reference
            return
        for adapter in self.adapters:
            adapter.enable_adapters(False)
        try:
            with torch.no_grad():
                yield self.model
        finally:
            for adapter in self.adapters:
                adapter.enable_adapters(True)
            self.model.requires_grad_(False)
            for p in self.trained.values():
                p.requires_grad_(True)

    # -- one step

    def draw(self, step: int) -> tuple[Rollout, list[str], list[str]]:
        """The step's rollout, its prompts and its responses, one per row."""
        o = self.options
        order: list[int] = []
        epoch = 0
        while len(order) < o.prompts_per_step * (step + 1):
            order += torch.randperm(len(self.prompts), generator=_generator(o.seed, epoch)).tolist()
            epoch += 1
        chosen = [self.prompts[i] for i in order[o.prompts_per_step * step :][: o.prompts_per_step]]
        return self._respond(chosen, o.group, o.seed * 2**20 + step)

    def _respond(self, prompts: list[str], count: int, seed: int) -> tuple[Rollout, list[str], list[str]]:
        o = self.options
        texts = [o.template.replace("{prompt}", prompt) for prompt in prompts]
        rows = [self.tokenizer.encode(text) for text in texts]
        try:
            rollout = draw_rollout(
                self.model,
                rows,
                count,
                max_new_tokens=o.max_new_tokens,
                sampling=Sampling(temperature=o.temperature, top_p=o.top_p, min_p=o.min_p, top_k=o.top_k),
                seed=seed,
            )
        except (ValueError, RuntimeError) as error:
            if self._gives_numbers(rows[0][:16]):
                raise
            raise RuntimeError(
                f"after step {self.step} the policy gives no numbers any more: lower --lr or --max-grad-norm and begin "
                "anew, or go on from a copy of an earlier checkpoint"
            ) from error
        ends = set(getattr(self.model, "eos_ids", ()))
        responses = [
            self.tokenizer.decode([i for i in row[mask].tolist() if i not in ends])
            for row, mask in zip(rollout.tokens, rollout.mask, strict=True)
        ]
        return rollout, [prompt for prompt in prompts for _ in range(count)], responses

    @torch.no_grad()
    def _gives_numbers(self, ids: list[int]) -> bool:
        return bool(self.model(torch.tensor([ids])).isfinite().all())

    def advance(self) -> dict[str, float]:
        """One step; returns its figures, also where the update was skipped."""
        began = time.monotonic()
        rollout, prompts, responses = self.draw(self.step)
        figures: dict[str, float] = {"step": self.step + 1}
        try:
            scored = self._judged(rollout, prompts, responses)
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

    def _judged(self, rollout: Rollout, prompts: list[str], responses: list[str]) -> Scored:
        o, group = self.options, self.options.group
        pairs = preference = wins = None
        rewards = torch.zeros(len(responses))
        matrix = torch.zeros(len(responses), 0)
        if self.judge.kind == "prefer":
            if self.objective.needs == "rater":
                where = torch.triu_indices(group, group, 1)
                first = torch.cat([where[0] + group * q for q in range(o.prompts_per_step)])
                second = torch.cat([where[1] + group * q for q in range(o.prompts_per_step)])
            else:
                first, second = torch.arange(len(responses)).view(-1, 2).unbind(1)
            found = self.judge.preferences(
                [prompts[i] for i in first.tolist()],
                [responses[i] for i in first.tolist()],
                [responses[i] for i in second.tolist()],
            )
            pairs, preference = torch.stack([first, second], 1), found
            if self.objective.needs == "rater":
                wins = torch.zeros(o.prompts_per_step, group, group)
                flat = found.view(o.prompts_per_step, -1)
                wins[:, where[0], where[1]], wins[:, where[1], where[0]] = flat, 1 - flat
                rewards = wins.sum(-1).flatten() / (group - 1)
            else:
                rewards = torch.stack([found, 1 - found], 1).flatten()
        else:
            matrix = self.judge.rewards(prompts, responses)
            if self.weights is None:
                given = o.weights or (1 / matrix.shape[1],) * matrix.shape[1]
                if len(given) != matrix.shape[1]:
                    raise ValueError(
                        f"--weights has {len(given)} numbers but the file has {matrix.shape[1]} rewards "
                        f"({', '.join(self.judge.names)})"
                    )
                self.weights = torch.tensor(given)
            rewards = self.factor * (matrix @ self.weights)
            if self.objective.needs == "verifier" and not ((rewards == 0) | (rewards == 1)).all():
                raise ValueError(
                    f"--objective {o.objective} needs a verifier's rewards, 0 or 1, but got "
                    f"{sorted(set(rewards.tolist()))[:4]}; use grpo for graded rewards"
                )
            if self.objective.needs in ("pairs", "revisions"):
                pairs = torch.arange(len(responses)).view(-1, 2)
                one, other = rewards[pairs[:, 0]], rewards[pairs[:, 1]]
                decided = one != other
                pairs, preference = pairs[decided], (one > other).float()[decided]
        nothing = torch.zeros(rollout.tokens.shape)
        stats: Any = None
        judged = Rollout(**{**rollout.__dict__, "rewards": matrix})
        return Scored(judged, stats, nothing, nothing, rewards, o, pairs, preference, wins)

    def _idle(self, scored: Scored) -> bool:
        """Whether the step has nothing to learn from: all rewards of each group alike, or no decided pair."""
        if scored.pairs is not None and scored.wins is None:
            return not len(scored.pairs)
        grouped = scored.rewards.view(-1, self.options.group)
        return bool((grouped == grouped[:, :1]).all()) and self.options.kl_weight == 0 and self.critic is None

    def _update(self, scored: Scored) -> dict[str, float]:
        o, rollout = self.options, scored.rollout
        mask = rollout.mask
        with self.frozen() as frozen:
            scored.reference = score_rollout(frozen, rollout).logp
            if self.objective.needs == "revisions" and scored.pairs is not None and len(scored.pairs):
                reviser_reference = self._revisions(frozen, scored)
        idle = self._idle(scored)
        figures: dict[str, float] = {}
        # With gradients recorded, as in the update: without, matrix products may round in another way, and the ratio
        # would not be exactly 1.
        before = TokenStats(
            *(t.detach() for t in score_rollout(self.model, rollout, entropy=True) if t is not None)
        )
        scored.old = before.logp
        if self.critic is not None:
            with torch.no_grad():
                scored.old_values = self._values(rollout)
        for index in range(0 if idle else o.updates):
            scored.stats = score_rollout(self.model, rollout, entropy=True)
            if index == 0:
                apart = (scored.stats.logp.detach() - scored.old)[mask]
                figures["ratio_error"] = float((apart.exp() - 1).abs().max())
            if self.critic is not None:
                scored.values = self._values(rollout)
            if self.objective.needs == "revisions":
                scored.revisions = (self._revisions(self.model, scored), reviser_reference)
            if o.objective == "drw":
                self._reweigh(scored)
            loss = self.objective.loss(scored)
            self.optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(list(self.trained.values()), o.max_grad_norm)
            if not torch.isfinite(norm):
                raise RuntimeError(
                    f"step {self.step + 1}: the gradient is {float(norm)}; lower --lr or --temperature, and go on from "
                    "the last checkpoint with --resume"
                )
            self.optimizer.step()
            figures |= {"loss": float(loss.detach()), "grad_norm": float(norm)}
        if idle:
            self.skipped.append(
                f"step {self.step + 1}: all rewards of each group are equal, nothing to learn from"
            )
        apart = (scored.reference - before.logp)[mask]
        assert before.entropy is not None
        figures |= {
            "reward": float(scored.rewards.mean()) / self.factor,
            "kl": float((apart.exp() - apart - 1).mean()),
            "entropy": float(before.entropy[mask].mean()),
            "length": float(rollout.lengths.float().mean()),
        }
        if rollout.logp is not None:
            figures["sampler_gap"] = float((rollout.logp - before.logp)[mask].abs().max())
        if rollout.rewards is not None and rollout.rewards.shape[1] > 1:
            means = zip(self.judge.names, rollout.rewards.mean(0).tolist(), strict=True)
            # A reward may be called as one of the run's own figures.
            figures |= {f"reward_{name}" if name in OWN else name: value for name, value in means}
            if self.objective.needs == "several" and self.weights is not None:
                figures |= {
                    f"weight_{n}": self.factor * float(w)
                    for n, w in zip(self.judge.names, self.weights, strict=True)
                }
        return figures | scored.figures

    def _values(self, rollout: Rollout) -> Tensor:
        """The critic's value of the text before each response token, `[B, T]`; the trunk is the frozen policy's."""
        assert self.critic is not None
        with torch.no_grad():
            hidden = self.model.hidden(rollout.tokens)
        values: Tensor = self.critic(hidden)[..., 0]
        return torch.where(
            rollout.mask, torch.cat([values.new_zeros(len(values), 1), values[:, :-1]], 1), 0.0
        )

    def _revisions(self, model: Any, scored: Scored) -> Tensor:
        """`[P, 2, 2]`: log-probability of response b with response a in the prompt."""
        assert scored.pairs is not None
        rollout, between = scored.rollout, self.tokenizer.encode(REVISE)
        rows, starts = [], []
        for pair in scored.pairs.tolist():
            for a in pair:
                for b in pair:
                    start = int(rollout.mask[a].long().argmax())
                    context = rollout.tokens[a, : start + int(rollout.lengths[a])].tolist() + between
                    starts.append(len(context))
                    rows.append(context + rollout.tokens[b][rollout.mask[b]].tolist())
        width = max(map(len, rows))
        tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        places = torch.arange(width)
        ends = torch.tensor([len(row) for row in rows])[:, None]
        mask = (places >= torch.tensor(starts)[:, None]) & (places < ends)
        logp = score(model, tokens, mask, temperature=rollout.temperature).logp
        return sequence_logprob(logp, mask).view(-1, 2, 2)

    def _reweigh(self, scored: Scored) -> None:
        """Dynamic reward weighting: weights follow how far each reward's gradient pulls with the others."""
        assert self.weights is not None and scored.rollout.rewards is not None
        parameters = list(self.trained.values())
        gradients = []
        for column in scored.rollout.rewards.unbind(1):
            scored.rewards = column
            found = torch.autograd.grad(
                self.objective.loss(scored), parameters, retain_graph=True, allow_unused=True
            )
            gradients.append(torch.cat([g.flatten() for g in found if g is not None]))
        stacked = torch.stack(gradients)
        scale = stacked.norm(dim=1).max().clamp(min=1e-12)
        self.weights = gradient_weights(self.weights, stacked / scale, lr=self.options.weights_lr)
        scored.rewards = scored.rollout.rewards @ self.weights

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
            self._measure_front(parts[0][1].mean(0))
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

    def _measure_front(self, point: Tensor) -> None:
        """Let the next rewards count by what the mean rewards of the training prompts, `[M]`, add to the front.

        The volume is above the first such point, or 0 where that is less.
        """
        if self.front is None:
            self.front = HypervolumeWeight(point.clamp(max=0.0).numpy())
            self.front.update(point.numpy())
            return
        self.factor = self.front.update(point.numpy())

    def _evaluated(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """What counts of each response, `[B]`, and all of its rewards, `[B, M]`."""
        drawn = self._respond(prompts, self.options.eval_samples, 2**40 + self.options.seed)
        try:
            return self._scores(prompts, *drawn[1:])
        except RewardFailure as failure:
            raise Unjudged(drawn, failure) from failure

    def _scores(self, prompts: list[str], texts: list[str], responses: list[str]) -> tuple[Tensor, Tensor]:
        if self.judge.kind == "prefer":
            for adapter in self.adapters:
                adapter.enable_adapters(False)
            kept, self.model = self.model, self.reference
            try:
                _, _, others = self._respond(prompts, self.options.eval_samples, 2**41 + self.options.seed)
            finally:
                self.model = kept
                for adapter in self.adapters:
                    adapter.enable_adapters(True)
            found = self.judge.preferences(texts, responses, others)
            return found, found[:, None]
        matrix = self.judge.rewards(texts, responses)
        weights = (
            self.weights if self.weights is not None else torch.full((matrix.shape[1],), 1 / matrix.shape[1])
        )
        return matrix @ weights, matrix


class Unjudged(Exception):
    """Responses of an evaluation that the judge failed on."""

    def __init__(self, responses: tuple[Rollout, list[str], list[str]], failure: RewardFailure) -> None:
        super().__init__(str(failure))
        self.responses, self.failure = responses, failure


def _generator(seed: int, stream: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + stream + 1) % 2**63)


def _standard_error(values: Tensor) -> float:
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else float("nan")
