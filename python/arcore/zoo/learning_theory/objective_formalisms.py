"""Objective-specification formalisms: which rankings of policies a way of writing objectives can express (Subramani et
al., arXiv:2310.11840).

An objective ranks policies. Whether some reward of a Markov kind, `R(s, a, s')`, ranks given policies as wanted is a
question about their discounted occupancy measures m, as a policy's value is the inner product of R with m: it is a
linear program (after Abel et al., arXiv:2111.00876). Where it has no solution, Farkas' lemma gives weights whose sum of
differences of occupancies is 0 though each should be worth more than nothing, which is a proof. With a reward machine
the reward may depend on a finite memory; the question is the same on the product of environment and machine.

Checked here: "choose the same action in both states, or different ones" (XOR) has no Markov reward, and a machine
that remembers the last action expresses it; and "a is chosen eventually", a formula of temporal logic, whose value
jumps where the policy's probability of a leaves 0, as no discounted value does.

Legend: S states, A actions, U states of memory.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from arcore._optional import require
from arcore.catalog import System
from arcore.catalog.claims import Claim, at_least, at_most, equals
from arcore.catalog.running import Report
from arcore.nn.kinds import check_kinds

SYSTEM = System(
    name="objective_formalisms",
    title="Objective-specification formalisms",
    paper="arXiv:2310.11840",
    paper_title="On The Expressivity of Objective-Specification Formalisms in Reinforcement Learning",
    topic="learning_theory",
    kind="theory",
    summary="Whether a Markov reward or a reward machine can express a ranking of policies, with a witness.",
    claim=(
        "No Markov reward expresses XOR, with a certificate of zero residual, and a reward machine does; the value of "
        "'eventually' is discontinuous in the policy, and no discounted value is."
    ),
    checked_on="closed form",
)

Array = NDArray[np.float64]
Formalism = Literal["markov", "machine"]


@dataclass(frozen=True)
class Environment:
    """A finite Markov decision process without a reward.

    Attributes:
        transitions: `[S, A, S]` probabilities.
        start: `[S]` probabilities.
        discount: in (0, 1).

    Raises:
        ValueError: shapes do not fit, or rows are no distributions.
    """

    transitions: Array
    start: Array
    discount: float = 0.9

    def __post_init__(self) -> None:
        shape = self.transitions.shape
        if len(shape) != 3 or shape[0] != shape[2] or 0 in shape or self.start.shape != shape[:1]:
            raise ValueError(
                f"expected transitions [S, A, S] and start [S] but got {list(shape)} and {list(self.start.shape)}; "
                "give for each state and action the probabilities of the next states"
            )
        for name, rows in (("transitions", self.transitions), ("start", self.start)):
            if not (rows >= 0).all() or np.abs(rows.sum(-1) - 1).max() > 1e-9:
                raise ValueError(
                    f"expected the rows of {name} to be probabilities that sum to 1 but got a sum of "
                    f"{rows.sum(-1).flat[np.abs(rows.sum(-1) - 1).argmax()]:g}, least entry {rows.min():g}; repair them"
                )
        if not 0 < self.discount < 1:
            raise ValueError(f"expected discount between 0 and 1 but got {self.discount}; 0.9 is usual")


def with_memory(environment: Environment) -> Environment:
    """The product with a memory of the last action and of whether there was one: U = A + 1, states `s (A + 1) + u`."""
    states, actions, _ = environment.transitions.shape
    memory = actions + 1
    product = np.zeros((states, memory, actions, states, memory))
    for action in range(actions):
        product[:, :, action, :, action + 1] = environment.transitions[:, None, action]
    start = np.zeros((states, memory))
    start[:, 0] = environment.start
    return Environment(
        product.reshape(states * memory, actions, states * memory), start.flatten(), environment.discount
    )


def occupancy(environment: Environment, policy: Array) -> Array:
    """Discounted occupancy measure `[S, A, S]` of a policy `[S, A]`; it sums to 1 / (1 - discount).

    Raises:
        ValueError: no policy of this environment.
    """
    states, actions, _ = environment.transitions.shape
    if policy.shape != (states, actions) or not (policy >= 0).all() or np.abs(policy.sum(1) - 1).max() > 1e-9:
        raise ValueError(
            f"expected a policy [{states}, {actions}] of probabilities but got shape {list(policy.shape)}; each row "
            "sums to 1"
        )
    chain = np.einsum("sa,sat->st", policy, environment.transitions)
    visits = np.linalg.solve(np.eye(states) - environment.discount * chain.T, environment.start)
    return np.asarray(visits[:, None, None] * policy[:, :, None] * environment.transitions)


@dataclass(frozen=True)
class Expressed:
    """Whether a ranking can be expressed.

    Attributes:
        possible: whether a reward exists.
        reward: `[S, A, S]` of the environment, or of its product with the memory; None where there is none.
        witness: where there is none, the weight of each demand: at least 0 for "better", any for "as good"; their
            weighted sum of differences of occupancies is 0. None otherwise.
        residual: of the certificate: largest violation by the reward, or largest entry of that sum.
    """

    possible: bool
    reward: Array | None
    witness: Array | None
    residual: float


@check_kinds
def express(
    environment: Environment,
    policies: Sequence[Array],
    ranking: Sequence[Sequence[int]],
    *,
    formalism: Formalism,
) -> Expressed:
    """Look for a reward that ranks the policies.

    Args:
        environment: where they act.
        policies: `[S, A]` each, stationary.
        ranking: numbers of policies by rank, best first; those of one rank are to be worth the same.
        formalism: "markov", a reward R(s, a, s'); or "machine", a reward machine that remembers the last action.

    Raises:
        ValueError: a policy or the ranking does not fit.
        ImportError: scipy is missing.
    """
    ranked = [number for rank in ranking for number in rank]
    if len(set(ranked)) != len(ranked) or not set(ranked) <= set(range(len(policies))) or len(ranked) < 2:
        raise ValueError(
            f"expected a ranking of at least two of the {len(policies)} policies, each once, but got {list(ranking)}; "
            "name them by their places in the list, best first"
        )
    if formalism not in ("markov", "machine"):
        raise ValueError(
            f"expected formalism to be 'markov' or 'machine' but got {formalism!r}; choose one of them"
        )
    actions = environment.transitions.shape[1]
    if formalism == "machine":
        environment = with_memory(environment)
        policies = [np.repeat(policy, actions + 1, axis=0) for policy in policies]
    measures = [occupancy(environment, policy).flatten() for policy in policies]
    same = [measures[rank[0]] - measures[other] for rank in ranking for other in rank[1:]]
    better = [measures[one[0]] - measures[other[0]] for one, other in itertools.pairwise(ranking)]
    width = len(measures[0])
    ties, gains = np.array(same).reshape(-1, width), np.array(better).reshape(-1, width)
    solve = require("scipy.optimize", extra="train").linprog
    # Smallest largest reward with gains R >= 1 and ties R = 0.
    bound = np.hstack([np.eye(width), -np.ones((width, 1))])
    mirrored = np.hstack([-np.eye(width), -np.ones((width, 1))])
    found = solve(
        np.append(np.zeros(width), 1.0),
        A_ub=np.vstack([np.hstack([-gains, np.zeros((len(gains), 1))]), bound, mirrored]),
        b_ub=np.concatenate([-np.ones(len(gains)), np.zeros(2 * width)]),
        A_eq=np.hstack([ties, np.zeros((len(ties), 1))]) if len(ties) else None,
        b_eq=np.zeros(len(ties)) if len(ties) else None,
        bounds=[(None, None)] * (width + 1),
    )
    if found.status == 0:
        reward = found.x[:width]
        wrong = max([0.0, *(1 - gains @ reward), *np.abs(ties @ reward)])
        return Expressed(True, reward.reshape(environment.transitions.shape), None, float(wrong))
    # Farkas: weights y >= 0 of the gains, not all 0, and z of the ties, with y gains + z ties = 0.
    demands = np.vstack([gains, ties])
    total = np.append(np.ones(len(gains)), np.zeros(len(ties)))[None]
    proof = solve(
        np.zeros(len(demands)),
        A_eq=np.vstack([demands.T, total]),
        b_eq=np.append(np.zeros(width), 1.0),
        bounds=[(0, None)] * len(gains) + [(None, None)] * len(ties),
    )
    if proof.status != 0:
        raise RuntimeError(
            f"neither a reward nor a proof against one was found (status {found.status}, {proof.status}): the "
            "policies' occupancies are too close to call"
        )
    return Expressed(False, None, proof.x, float(np.abs(demands.T @ proof.x).max()))


def deterministic(environment: Environment) -> list[Array]:
    """All deterministic policies, the first state's action slowest: `00`, `01`, `10`, `11` for two of each."""
    states, actions, _ = environment.transitions.shape
    return [np.eye(actions)[list(choice)] for choice in itertools.product(range(actions), repeat=states)]


def eventually(environment: Environment, policy: Array, action: int) -> float:
    """Probability that the action is ever chosen: the value of the formula "eventually a"."""
    states = len(environment.start)
    chain = np.einsum("sa,sat->sat", policy, environment.transitions)
    stay = np.delete(chain, action, axis=1).sum(1)
    hit = policy[:, action]
    # The least solution of x = hit + stay x; states that never reach the action are left out, they have 0.
    reach = hit > 0
    for _ in range(states):
        reach = reach | ((stay > 0) & reach[None]).any(1)
    value = np.zeros(states)
    if reach.any():
        value[reach] = np.linalg.solve(np.eye(reach.sum()) - stay[np.ix_(reach, reach)], hit[reach])
    return float(environment.start @ value)


def two_states() -> Environment:
    """Two states that follow each other whatever is done."""
    transitions = np.zeros((2, 2, 2))
    transitions[0, :, 1] = transitions[1, :, 0] = 1.0
    return Environment(transitions, np.array([1.0, 0.0]))


@check_kinds
@dataclass(frozen=True, kw_only=True)
class Options:
    """An environment, and how its policies should rank.

    Attributes:
        file: JSON with "transitions" [S, A, S], "start" [S], "ranking" (ranks of policies, best first, a policy being a
            text of one action per state, such as [["00", "11"], ["01", "10"]]), and optionally "discount".
    """

    file: Path = field(metadata={"positional": True, "metavar": "JSON"})


def run(options: Options) -> Report:
    """Which formalism can express the ranking of the file."""
    if not options.file.is_file():
        raise FileNotFoundError(
            f"expected a JSON file of an environment but there is no {options.file}; check the name"
        )
    try:
        found = json.loads(options.file.read_text(encoding="utf-8"))
        environment = Environment(
            np.array(found["transitions"], dtype=np.float64),
            np.array(found["start"], dtype=np.float64),
            float(found.get("discount", 0.9)),
        )
        texts = [[str(one) for one in rank] for rank in found["ranking"]]
    except KeyError as error:
        raise ValueError(
            f"{options.file}: expected transitions, start and ranking but {error} is missing; see --help"
        ) from None
    except (TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{options.file}: {error}") from None
    states, actions, _ = environment.transitions.shape
    for text in itertools.chain.from_iterable(texts):
        if len(text) != states or not all(letter.isdigit() and int(letter) < actions for letter in text):
            raise ValueError(
                f"{options.file}: expected policies of {states} digits below {actions}, one action per state, but got "
                f"{text!r}; give one digit per state"
            )
    if any(not rank for rank in texts):
        raise ValueError(
            f"{options.file}: expected a policy in each rank but one is empty; leave that rank out"
        )
    names = list(itertools.chain.from_iterable(texts))
    policies = [np.eye(actions)[[int(letter) for letter in text]] for text in names]
    count = itertools.count()
    ranking = [[next(count) for _ in rank] for rank in texts]
    lines = ["ranking: " + " > ".join(" = ".join(rank) for rank in texts)]
    values: dict[str, Any] = {}
    labels: tuple[tuple[Formalism, str], ...] = (("markov", "Markov reward"), ("machine", "reward machine"))
    for formalism, label in labels:
        one = express(environment, policies, ranking, formalism=formalism)
        lines.append(
            f"{label:16}{'possible' if one.possible else 'impossible'} (certificate's residual {one.residual:.1e})"
        )
        values[formalism] = {
            "possible": one.possible,
            "residual": one.residual,
            "reward": None if one.reward is None else one.reward.tolist(),
            "witness": None if one.witness is None else one.witness.tolist(),
        }
    lines.append("The machine remembers the last action.")
    return Report("\n".join(lines), values)


def claim(*, quick: bool) -> Claim:
    """XOR by both formalisms, and the value of "eventually" beside a discounted one."""
    environment = two_states()
    policies = deterministic(environment)
    xor = [[0, 3], [1, 2]]
    markov = express(environment, policies, xor, formalism="markov")
    machine = express(environment, policies, xor, formalism="machine")
    ordered = express(environment, policies, [[3], [1], [2], [0]], formalism="markov")
    leaks = np.array([0.0, 1e-6, 1e-4, 1e-2, 1.0])
    mixed = [np.tile([1 - leak, leak], (2, 1)) for leak in leaks]
    formula = np.array([eventually(environment, policy, 1) for policy in mixed])
    discounted = np.array([occupancy(environment, policy)[:, 1].sum() for policy in mixed])

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        axes.plot(formula, marker="o", label="eventually a")
        axes.plot(discounted * (1 - environment.discount), marker="o", label="discounted share of a")
        axes.set(xticks=range(5), xticklabels=[f"{leak:g}" for leak in leaks], xlabel="probability of a")
        axes.legend()

    return Claim(
        (
            equals("XOR by a Markov reward", float(markov.possible), 0.0),
            at_most("residual of the proof that there is none", markov.residual, 1e-9),
            equals("XOR by a reward machine", float(machine.possible), 1.0),
            at_most("violation by its rewards", machine.residual, 1e-6),
            equals("a strict order of the same policies by a Markov reward", float(ordered.possible), 1.0),
            at_least("jump of 'eventually a' at a probability of 1e-6", formula[1] - formula[0], 1 - 1e-9),
            at_most("jump of the discounted count of a there", discounted[1] - discounted[0], 1e-4),
        ),
        draw=draw,
    )
