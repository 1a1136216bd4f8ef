"""ARSQ: soft Q-learning whose values are log-probabilities of action tokens (Liu et al., arXiv:2502.00288).

A continuous action is written coarse to fine: at each of L levels, for each of D dimensions, one of B bins of the
interval that is left of that dimension. A network reads the state and where the intervals are by now, and gives u in
R^B for the next token; `A = u - alpha logsumexp(u / alpha)` is its soft advantage, and

    Q(s, a) = V(s) + sum over tokens of A,     policy of a token = softmax(u / alpha).

So `sum over actions of exp((Q - V) / alpha) = 1` whatever the weights are: V is the soft maximum of Q, and `Q - V` is
alpha times the policy's log-probability. With a head that does not see the earlier tokens, Q is a sum of terms of
single tokens, and cannot say that two tokens are good together only. Demonstrations of mixed quality train the
same Q, with a margin that keeps what they did above what they did not.

Left out: images and convolutional encoders of the paper's robot tasks.

Nearest neighbours here: VLA-RL, whose tokens have probabilities alone. Legend: N rows, K = L D tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from arcore._optional import require
from arcore.catalog import System
from arcore.catalog.claims import Claim, Row, at_least, at_most, equals
from arcore.catalog.running import Report, check_bounds
from arcore.nn.kinds import check_kinds
from arcore.zoo.agents.arsq.episodes import learn
from arcore.zoo.agents.arsq.values import ActionValues, climb, normalisation_error

SYSTEM = System(
    name="arsq",
    title="ARSQ",
    paper="arXiv:2502.00288",
    paper_title="Learning from Suboptimal Data in Continuous Control via Auto-Regressive Soft Q-Network",
    topic="agents",
    kind="agent",
    summary="Soft Q-learning over action tokens, coarse to fine, from demonstrations of mixed quality.",
    claim=(
        "Values of all actions are normalised exactly; where two tokens are good together only, the autoregressive "
        "head finds them and a factorised one does not; with mixed demonstrations of Pendulum it earns as much."
    ),
    checked_on="synthetic data",
)


@check_kinds
@dataclass(frozen=True, kw_only=True)
class Options:
    """Learning from mixed demonstrations and own episodes.

    Attributes:
        env: name of a gymnasium environment with box observations and actions.
        demos: .npz with states, actions (in [-1, 1]), rewards, after and ended. Default: made, for Pendulum-v1.
        demo_steps: of demonstrations to make: 30 percent by a controller, 70 percent by it and noise.
        steps: of the environment.
        rooms: environments that are acted in together.
        levels: L.
        bins: B.
        alpha: temperature, in units of scaled rewards.
        reward_scale: what rewards are multiplied by.
        discount: gamma.
        batch: transitions of an update, half of them demonstrations.
        updates: for each step of all rooms.
        factorised: a head that does not see earlier tokens.
        episodes: of the evaluation.
        out: file for the weights. Default: none.
        seed: decides everything random.
    """

    env: str = "Pendulum-v1"
    demos: Path | None = None
    demo_steps: int = 4000
    steps: int = 10000
    rooms: int = 8
    levels: int = 3
    bins: int = 5
    alpha: float = 0.02
    reward_scale: float = 0.1
    discount: float = 0.98
    batch: int = 256
    updates: int = 2
    factorised: bool = False
    episodes: int = 16
    out: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_bounds(self, above={"reward_scale": 0})
        for name in ("demo_steps", "steps", "rooms", "levels", "batch", "updates", "episodes"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"--{name.replace('_', '-')}: expected at least 1 but got {getattr(self, name)}"
                )
        if self.bins < 2 or not self.alpha > 0 or not 0 < self.discount < 1:
            raise ValueError(
                f"expected --bins >= 2, --alpha > 0 and --discount in (0, 1) but got {self.bins}, {self.alpha} and "
                f"{self.discount}"
            )


def run(options: Options) -> Report:
    """Learn from demonstrations of mixed quality and from own episodes."""
    returned, earned, learner = learn(options)
    if options.out is not None:
        from arcore._files import atomic_path

        with atomic_path(options.out) as temporary:
            require("safetensors.torch", extra="zoo").save_file(learner.twins.state_dict(), temporary)
    head = "factorised" if options.factorised else "autoregressive"
    text = (
        f"{options.env}, {head} head: mean return {earned:.1f} over {options.episodes} episodes after "
        f"{options.steps} steps; the demonstrations' {returned:.1f}"
    )
    return Report(text, {"return": earned, "demonstrations": returned})


def claim(*, quick: bool) -> Claim:
    """Normalisation, the climb table, and (in full) Pendulum against the factorised head."""
    torch.manual_seed(0)
    worst = 0.0
    for dims, levels, bins, alpha in ((1, 3, 5, 1e-3), (2, 2, 3, 0.05), (3, 1, 4, 1.0)):
        net = ActionValues(4, dims=dims, levels=levels, bins=bins, alpha=alpha, width=32).double()
        worst = max(worst, normalisation_error(net, torch.randn(3, 4, dtype=torch.float64)))
    seeds = range(1 if quick else 3)
    ours = [climb(autoregressive=True, seed=seed, updates=400 if quick else 1500) for seed in seeds]
    plain = [climb(autoregressive=False, seed=seed, updates=400 if quick else 1500) for seed in seeds]
    rows: tuple[Row, ...] = (
        at_most("sum over all actions of exp(A / alpha), distance from 1", worst, 1e-10),
        equals("climb: value of the autoregressive head's action, least", min(v for v, _ in ours), 1.0),
        equals(
            "climb: value of the factorised head's action, largest",
            max(v for v, _ in plain),
            0.6,
            tolerance=1e-6,
        ),
        at_least("climb: error of the factorised head's Q, least", min(e for _, e in plain), 1e-2),
        at_most("climb: error of the autoregressive head's Q, largest", max(e for _, e in ours), 1e-3),
    )
    if not quick:
        ar = [learn(Options(seed=seed))[:2] for seed in range(3)]
        apart = [learn(Options(seed=seed, factorised=True))[1] for seed in range(3)]
        mean = sum(earned for _, earned in ar) / 3
        rows += (
            at_least(
                "Pendulum: mean return over the factorised head's, of 3 seeds", mean - sum(apart) / 3, 0
            ),
            at_least("Pendulum: over the demonstrations'", mean - sum(d for d, _ in ar) / 3, 100),
        )
    return Claim(rows)
