"""From judgements to what an objective of `arcore run align` learns from: pairs, win rates, rewards, their weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from arcore.nn import Rollout
from arcore.zoo.alignment.align.objectives import Objective, Scored
from arcore.zoo.alignment.align.rewards import Judge
from arcore.zoo.alignment.dynamic_reward_weighting import HypervolumeWeight, gradient_weights

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


class Scoring:
    """A judge, and how its rewards count.

    Args:
        options: see `arcore.zoo.alignment.align.Options`.
        objective: decides what is asked of the judge.
        judge: see `load_judge`.

    Attributes:
        weights: of several rewards, `[M]`; None before the first judgement.
        factor: what the weighted sum is multiplied by.
        front: the best mean rewards so far, of drw_hypervolume.

    Raises:
        ValueError: the judge does not give what the objective needs.
    """

    def __init__(self, options: Any, objective: Objective, judge: Judge) -> None:
        needs, kind, name = objective.needs, judge.kind, options.objective
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
        self.options, self.objective, self.judge = options, objective, judge
        self.weights: Tensor | None = None
        self.front: HypervolumeWeight | None = None
        self.factor = 1.0

    def judged(self, rollout: Rollout, prompts: list[str], responses: list[str]) -> Scored:
        """A step's responses with their judgements; log-probabilities are still missing.

        Raises:
            RewardFailure: the judge failed.
            ValueError: rewards and options do not fit each other.
        """
        pairs = preference = wins = None
        matrix = torch.zeros(len(responses), 0)
        if self.judge.kind == "prefer":
            pairs, preference, rewards, wins = self._compared(prompts, responses)
        else:
            matrix = self.judge.rewards(prompts, responses)
            rewards = self._weighted(matrix)
            if self.objective.needs in ("pairs", "revisions"):
                pairs = torch.arange(len(responses)).view(-1, 2)
                one, other = rewards[pairs[:, 0]], rewards[pairs[:, 1]]
                decided = one != other
                pairs, preference = pairs[decided], (one > other).float()[decided]
        nothing = torch.zeros(rollout.tokens.shape)
        stats: Any = None
        judged = Rollout(**{**rollout.__dict__, "rewards": matrix})
        return Scored(judged, stats, nothing, nothing, rewards, self.options, pairs, preference, wins)

    def _compared(
        self, prompts: list[str], responses: list[str]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Pairs `[P, 2]`, how far the first is preferred `[P]`, rewards `[B]`, and win rates in each group."""
        questions, group = self.options.prompts_per_step, self.options.group
        all_pairs = self.objective.needs == "rater"
        if all_pairs:
            where = torch.triu_indices(group, group, 1)
            first = torch.cat([where[0] + group * q for q in range(questions)])
            second = torch.cat([where[1] + group * q for q in range(questions)])
        else:
            first, second = torch.arange(len(responses)).view(-1, 2).unbind(1)
        found = self.judge.preferences(
            [prompts[i] for i in first.tolist()],
            [responses[i] for i in first.tolist()],
            [responses[i] for i in second.tolist()],
        )
        pairs = torch.stack([first, second], 1)
        if not all_pairs:
            return pairs, found, torch.stack([found, 1 - found], 1).flatten(), None
        wins = torch.zeros(questions, group, group)
        flat = found.view(questions, -1)
        wins[:, where[0], where[1]], wins[:, where[1], where[0]] = flat, 1 - flat
        return pairs, found, wins.sum(-1).flatten() / (group - 1), wins

    def _weighted(self, matrix: Tensor) -> Tensor:
        """`[B]` of rewards `[B, M]`."""
        given, count = self.options.weights, matrix.shape[1]
        if self.weights is None:
            given = given or (1 / count,) * count
            if len(given) != count:
                raise ValueError(
                    f"--weights has {len(given)} numbers but the file has {count} rewards "
                    f"({', '.join(self.judge.names)})"
                )
            self.weights = torch.tensor(given)
        rewards = self.factor * (matrix @ self.weights)
        if self.objective.needs == "verifier" and not ((rewards == 0) | (rewards == 1)).all():
            raise ValueError(
                f"--objective {self.options.objective} needs a verifier's rewards, 0 or 1, but got "
                f"{sorted(set(rewards.tolist()))[:4]}; use grpo for graded rewards"
            )
        return rewards

    def reweigh(self, scored: Scored, parameters: list[Tensor]) -> None:
        """Dynamic reward weighting: weights follow how far each reward's gradient pulls with the others."""
        assert self.weights is not None and scored.rollout.rewards is not None
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

    def figures(self, scored: Scored) -> dict[str, float]:
        """Mean of each of several rewards, and their weights where those move."""
        rewards = scored.rollout.rewards
        if rewards is None or rewards.shape[1] < 2:
            return {}
        means = zip(self.judge.names, rewards.mean(0).tolist(), strict=True)
        # A reward may be called as one of the run's own figures.
        figures = {f"reward_{name}" if name in OWN else name: value for name, value in means}
        if self.objective.needs == "several" and self.weights is not None:
            weights = zip(self.judge.names, self.weights, strict=True)
            figures |= {f"weight_{name}": self.factor * float(weight) for name, weight in weights}
        return figures

    def scores(
        self, prompts: list[str], responses: list[str], others: list[str] | None
    ) -> tuple[Tensor, Tensor]:
        """What counts of each response of an evaluation, `[B]`, and all of its rewards, `[B, M]`.

        Args:
            prompts: of each response.
            responses: texts.
            others: what they are compared with, where the judge is a rater.

        Raises:
            RewardFailure: the judge failed.
        """
        if others is not None:
            found = self.judge.preferences(prompts, responses, others)
            return found, found[:, None]
        matrix = self.judge.rewards(prompts, responses)
        count = matrix.shape[1]
        weights = self.weights if self.weights is not None else torch.full((count,), 1 / count)
        return matrix @ weights, matrix

    def measure_front(self, point: Tensor) -> None:
        """Let the next rewards count by what the mean rewards of the training prompts, `[M]`, add to the front.

        The volume is above the first such point, or 0 where that is less.
        """
        if self.front is None:
            self.front = HypervolumeWeight(point.clamp(max=0.0).numpy())
            self.front.update(point.numpy())
            return
        self.factor = self.front.update(point.numpy())
