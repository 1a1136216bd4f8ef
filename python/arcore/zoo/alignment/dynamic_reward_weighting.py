"""Dynamic reward weighting: the weights of several rewards change during training (Lu et al., arXiv:2509.11452).

With fixed weights the easy reward is learnt first and the hard one may wait for long. Two ways to change the weights:

- by hypervolume: after each validation the volume that the found points dominate over a reference point may have grown
  by dV; the next rewards count `0.5 + 1.5 tanh(dV)` times, so what widens the front is reinforced;
- by gradients: with g_i the policy gradient of reward i alone, its influence is `I_i = <g_i, sum_j g_j>`, and
  `w = softmax(log w + lr I / mu)`, an exponentiated gradient, moves weight to the reward whose gradient does most.

Nearest neighbour here: GRPO with one reward. The hypervolume is exact, by slicing along the last objective. Whether
weighting learns faster depends on the objective: advantages divided by the deviation of the combined reward already
even rewards out. The hypervolume's factor is the same for all rewards, so an optimiser that divides by the gradient's
size, such as Adam, feels only how it changes. `arcore run dynamic_reward_weighting` compares the variants on a task of
words; `arcore run align --objective drw` and `drw_hypervolume` have them on language models.

Legend: B responses, T tokens, M rewards, P parameters.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from arcore.catalog import System
from arcore.catalog.claims import Claim, Row, at_least, at_most, steps
from arcore.catalog.running import Report
from arcore.nn.kinds import check_kinds
from arcore.objectives import group_advantages, grpo_loss
from arcore.objectives.policy import Deviation, Reduction
from arcore.ops import token_logprobs
from arcore.zoo.alignment.nft import Speller

SYSTEM = System(
    name="dynamic_reward_weighting",
    title="Dynamic reward weighting",
    paper="arXiv:2509.11452",
    paper_title="Learning to Optimize Multi-Objective Alignment Through Dynamic Reward Weighting",
    topic="alignment",
    kind="objective",
    summary="Weights of several rewards that follow the hypervolume of what was found, or the rewards' gradients.",
    claim=(
        "The hypervolume is that of brute force; from weights that neglect the hard reward, gradient weights bring all "
        "rewards to 0.9 in fewer steps than fixed ones, in most seeds."
    ),
    checked_on="closed form",
    builds_on=("nft",),
    ops=("token_logprobs",),
)

Array = NDArray[np.float64]
Variant = Literal["fixed", "gradient", "hypervolume"]
VARIANTS: tuple[Variant, ...] = ("fixed", "gradient", "hypervolume")


@check_kinds
def weighted_reward_loss(
    logprobs: Tensor,
    old: Tensor,
    rewards: Tensor,
    weights: Tensor,
    groups: Tensor,
    mask: Tensor,
    *,
    deviation: Deviation = "none",
    clip_low: float = 1.0,
    clip_high: float = math.inf,
    how: Reduction = "sequence_mean",
) -> Tensor:
    """The group's policy gradient on the weighted sum of the rewards; scalar.

    Args:
        logprobs: `[B, T]` log-probabilities of the tokens under the policy, with gradient.
        old: `[B, T]` under the policy that drew them.
        rewards: `[B, M]`.
        weights: `[M]`, at least 0.
        groups: `[B]` integers, one number per prompt.
        mask: `[B, T]` bool, the responses' tokens.
        deviation: see `arcore.objectives.group_advantages`.
        clip_low: see `arcore.objectives.grpo_loss`; the default does not clip.
        clip_high: likewise.
        how: see `arcore.objectives.reduce`.

    Raises:
        ValueError: shapes differ, or a weight is negative or not finite.
    """
    if rewards.dim() != 2 or weights.shape != rewards.shape[1:] or len(rewards) != len(logprobs):
        raise ValueError(
            f"arcore.weighted_reward_loss: expected rewards ({len(logprobs)}, M) and weights (M,) but got "
            f"{tuple(rewards.shape)} and {tuple(weights.shape)}; give every reward of every response"
        )
    if not ((weights >= 0) & torch.isfinite(weights)).all():
        raise ValueError(
            f"arcore.weighted_reward_loss: expected finite weights of at least 0 but got {weights.tolist()}; a reward "
            "to avoid is one with its sign turned"
        )
    combined = (rewards * weights.to(rewards.dtype)).sum(1)
    gain = group_advantages(combined.to(logprobs.dtype), groups, deviation=deviation)
    return grpo_loss(logprobs, old, gain, mask, clip_low=clip_low, clip_high=clip_high, how=how)


@check_kinds
def hypervolume(points: ArrayLike, reference: ArrayLike) -> float:
    """Exact volume of what the points dominate above the reference point; every objective is maximised.

    Args:
        points: `[n, M]`; those that are not above the reference everywhere count nothing.
        reference: `[M]`.

    Raises:
        ValueError: shapes differ or a number is not finite.
    """
    low = np.asarray(reference, dtype=np.float64)
    found = np.asarray(points, dtype=np.float64)
    found = found.reshape(0, len(low)) if found.size == 0 and low.ndim == 1 else found
    if low.ndim != 1 or not len(low) or found.ndim != 2 or found.shape[1] != len(low):
        raise ValueError(
            f"arcore.hypervolume: expected points [n, M] and reference [M] but got {list(found.shape)} and "
            f"{list(low.shape)}; give every objective of every point"
        )
    if not (np.isfinite(found).all() and np.isfinite(low).all()):
        raise ValueError(
            "arcore.hypervolume: expected finite numbers but got NaN or infinity; leave that point out"
        )
    above = found - low
    return _volume(above[(above > 0).all(1)])


def _volume(points: Array) -> float:
    if not len(points):
        return 0.0
    if points.shape[1] == 1:
        return float(points.max())
    points = points[np.argsort(-points[:, -1])]
    lower = np.append(points[1:, -1], 0.0)
    heights = points[:, -1] - lower
    return float(sum(h * _volume(points[: k + 1, :-1]) for k, h in enumerate(heights) if h > 0))


class HypervolumeWeight:
    """How much the next rewards count, by what the last validation added to the front.

    Args:
        reference: `[M]`, the point that the volume is above, such as the first validation.
    """

    @check_kinds
    def __init__(self, reference: ArrayLike) -> None:
        self.reference = np.asarray(reference, dtype=np.float64)
        self.points: list[Array] = []
        self.volume = hypervolume([], self.reference)

    @check_kinds
    def update(self, point: ArrayLike) -> float:
        """The factor for the next rewards, in [0.5, 2], after a validation.

        Args:
            point: `[M]` mean rewards, larger is better.

        Raises:
            ValueError: another shape, or a number is not finite.
        """
        found = np.asarray(point, dtype=np.float64)
        volume = hypervolume([*self.points, found], self.reference)
        gained = max(volume - self.volume, 0.0)
        if gained > 0:
            self.points.append(found)
            self.volume = volume
        return 0.5 + 1.5 * math.tanh(gained)

    def state(self) -> dict[str, list[Any]]:
        """What goes on, ready for JSON."""
        return {"reference": self.reference.tolist(), "points": [point.tolist() for point in self.points]}

    @classmethod
    def of_state(cls, state: Mapping[str, list[Any]]) -> HypervolumeWeight:
        """One that goes on from what `state` gave."""
        made = cls(state["reference"])
        made.points = [np.asarray(point, dtype=np.float64) for point in state["points"]]
        made.volume = hypervolume(made.points, made.reference)
        return made


@check_kinds
def gradient_weights(weights: Tensor, gradients: Tensor, *, lr: float, mu: float = 1.0) -> Tensor:
    """The next weights, by the influence of each reward's gradient; they sum to 1.

    Args:
        weights: `[M]`, positive.
        gradients: `[M, P]` policy gradient of each reward alone, over some of the parameters.
        lr: size of the step.
        mu: the step is divided by it.

    Raises:
        ValueError: shapes differ, a weight is not positive, or a number is not finite.
    """
    if gradients.dim() != 2 or weights.shape != gradients.shape[:1]:
        raise ValueError(
            f"arcore.gradient_weights: expected weights (M,) and gradients (M, P) but got {tuple(weights.shape)} and "
            f"{tuple(gradients.shape)}; one row of gradients per reward"
        )
    if not (weights > 0).all() or not torch.isfinite(gradients).all() or not (lr >= 0 and mu > 0):
        raise ValueError(
            f"arcore.gradient_weights: expected weights > 0, finite gradients, lr >= 0 and mu > 0 but got weights "
            f"{weights.tolist()}, lr {lr}, mu {mu}; a weight of 0 could never grow"
        )
    influence = gradients @ gradients.sum(0)
    return (weights.log() + lr / mu * influence).softmax(0)


def _brute_force(points: Array, reference: Array) -> float:
    """Volume by inclusion and exclusion over all subsets."""
    above = np.maximum(points - reference, 0.0)
    return float(
        sum(
            (-1) ** (size + 1) * above[list(chosen)].min(0).prod()
            for size in range(1, len(above) + 1)
            for chosen in itertools.combinations(range(len(above)), size)
        )
    )


def _rewards(words: Tensor) -> Tensor:
    """Three rewards of words of four letters, `[B, 3]`: a palindrome (hard), no letter 6, first letter below 3."""
    hard = (words == words.flip(1)).all(1)
    return torch.stack([hard, (words != 6).all(1), words[:, 0] < 3], 1).float()


@dataclass(frozen=True)
class Learnt:
    """What a run came to.

    Attributes:
        steps: updates until the means of all three rewards were at least 0.9; the limit where they never were.
        reached: whether they were.
        hardest: the hard reward's weight over that of the beginning, times the factor of the hypervolume.
        means: mean rewards by update, `[3]` each.
    """

    steps: int
    reached: bool
    hardest: float
    means: list[list[float]]


def learn(
    variant: Variant,
    *,
    seed: int,
    limit: int = 400,
    batch: int = 128,
    first: tuple[float, float, float] = (0.03, 0.485, 0.485),
    lr: float = 5.0,
    every: int = 5,
) -> Learnt:
    """Train a small model of words towards three rewards, one of them hard and neglected at first.

    Args:
        variant: fixed weights, weights that follow the gradients, or rewards scaled by the front's growth.
        seed: decides weights and draws.
        limit: most updates.
        batch: words of an update.
        first: weights at the beginning, the hard reward's first.
        lr: of gradient weights.
        every: updates between two validations of the hypervolume.
    """
    torch.manual_seed(seed)
    model = Speller(7, 4)
    parameters = list(model.parameters())
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    weights, factor = torch.tensor(first), 1.0
    one_hot, front = torch.eye(3), HypervolumeWeight(np.zeros(3))
    means: list[list[float]] = []
    for update in steps(limit, f"{variant} weights"):
        words = model.draw(batch)
        rewards = _rewards(words)
        means.append(rewards.mean(0).tolist())
        if (rewards.mean(0) >= 0.9).all():
            return Learnt(update, True, factor * float(weights[0] / first[0]), means)
        if variant == "gradient":
            gradients = torch.stack([_gradient(model, words, rewards, one) for one in one_hot])
            weights = gradient_weights(weights, gradients, lr=lr)
        elif variant == "hypervolume" and update % every == 0:
            factor = front.update(_rewards(model.draw(4 * batch)).mean(0).numpy())
        whole = _gradient(model, words, rewards, factor * weights)
        for parameter, part in zip(parameters, whole.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter)
        optimizer.step()
    return Learnt(limit, False, factor * float(weights[0] / first[0]), means)


@check_kinds
@dataclass(frozen=True, kw_only=True)
class Options:
    """Three rewards of words of four letters: a palindrome (hard), no letter 6, a first letter below 3.

    Attributes:
        variant: fixed, gradient, hypervolume, or all.
        seeds: runs of each.
        limit: most updates of a run.
        batch: words of an update.
        weights: at the beginning, the hard reward's first.
        lr: of gradient weights.
        every: updates between two validations of the hypervolume.
        seed: the first one.
    """

    variant: Literal["fixed", "gradient", "hypervolume", "all"] = "all"
    seeds: int = 3
    limit: int = 400
    batch: int = 128
    weights: tuple[float, float, float] = (0.03, 0.485, 0.485)
    lr: float = 5.0
    every: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("seeds", 1), ("limit", 1), ("batch", 2), ("every", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name}: expected at least {least} but got {getattr(self, name)}")
        if not all(0 < weight < math.inf for weight in self.weights):
            raise ValueError(
                f"--weights: expected three numbers above 0 but got {self.weights}; a weight of 0 could never grow"
            )
        if not 0 <= self.lr < math.inf:
            raise ValueError(f"--lr: expected a number of at least 0 but got {self.lr}")


def run(options: Options) -> Report:
    """Train with each variant and compare how many updates they take."""
    names: tuple[Variant, ...] = VARIANTS if options.variant == "all" else (options.variant,)
    found = {
        name: [
            learn(name, seed=options.seed + i, limit=options.limit, batch=options.batch, first=options.weights,
                  lr=options.lr, every=options.every)
            for i in range(options.seeds)
        ]
        for name in names
    }  # fmt: skip
    lines = [f"{'weights':12}{'updates to all >= 0.9, by seed':34}{'hard reward counts':>20}"]
    for name, runs in found.items():
        shown = ", ".join(str(one.steps) if one.reached else f">{one.steps}" for one in runs)
        growth = sum(one.hardest for one in runs) / len(runs)
        lines.append(f"{name:12}{shown:34}{growth:18.2f} x")

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for number, (name, runs) in enumerate(found.items()):
            for i, one in enumerate(runs):
                axes.plot(
                    [m[0] for m in one.means], color=f"C{number}", label=None if i else name, linewidth=1
                )
        axes.set(xlabel="update", ylabel="share of palindromes (the hard reward)")
        axes.legend()

    values: dict[str, Any] = {
        name: [{"steps": one.steps, "reached": one.reached, "hardest": one.hardest} for one in runs]
        for name, runs in found.items()
    }
    return Report("\n".join(lines), values, draw)


def _gradient(model: Speller, words: Tensor, rewards: Tensor, weights: Tensor) -> Tensor:
    """Gradient `[P]` of the on-policy loss with these weights."""
    parameters = list(model.parameters())
    logprobs = token_logprobs(model(words), words).logp
    groups, mask = torch.zeros(len(words), dtype=torch.int64), torch.ones_like(words, dtype=torch.bool)
    loss = weighted_reward_loss(logprobs, logprobs.detach(), rewards, weights, groups, mask)
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])


def claim(*, quick: bool) -> Claim:
    """Hypervolumes against brute force, factors in their range, and (in full) steps until all rewards are high."""
    random = np.random.default_rng(0)
    apart = 0.0
    for width in (1, 2, 3, 4):
        for _ in range(2 if quick else 10):
            points, low = random.uniform(-0.2, 1.0, (9, width)), np.zeros(width)
            apart = max(apart, abs(hypervolume(points, low) - _brute_force(points, low)))
    keeper = HypervolumeWeight(np.zeros(3))
    factors = [keeper.update(random.uniform(-0.2, 1.0, 3)) for _ in range(50)]
    rows: tuple[Row, ...] = (
        at_most("hypervolume against inclusion and exclusion, largest difference", apart, 1e-12),
        at_least("least factor", min(factors), 0.5),
        at_most("largest factor", max(factors), 2.0),
    )
    if not quick:
        fixed, moved = ([learn(name, seed=seed) for seed in range(3)] for name in ("fixed", "gradient"))
        fewer = sum(b.steps < a.steps for a, b in zip(fixed, moved, strict=True))
        grown = min(one.hardest for one in moved)
        rows += (
            at_least("seeds of 3 in which gradient weights take fewer steps to all >= 0.9", fewer, 2),
            at_least("growth of the hard reward's weight, least of the seeds", grown, 5.0),
        )
    return Claim(rows)
