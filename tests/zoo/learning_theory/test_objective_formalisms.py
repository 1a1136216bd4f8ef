"""Which rankings have a reward: certificates, occupancies, the file for the command, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arcore.cli import main
from arcore.zoo.learning_theory.objective_formalisms import (
    Environment,
    Options,
    deterministic,
    eventually,
    express,
    occupancy,
    run,
    two_states,
    with_memory,
)

pytest.importorskip("scipy")


def random_environment(seed: int, states: int = 3, actions: int = 2) -> Environment:
    random = np.random.default_rng(seed)
    return Environment(
        random.dirichlet(np.ones(states), size=(states, actions)), random.dirichlet(np.ones(states)), 0.8
    )


def test_occupancies_are_sums_over_time():
    environment = random_environment(0)
    policy = np.random.default_rng(1).dirichlet(np.ones(2), size=3)
    state, total = environment.start, np.zeros((3, 2, 3))
    for step in range(200):
        flow = state[:, None, None] * policy[:, :, None] * environment.transitions
        total += 0.8**step * flow
        state = flow.sum((0, 1))
    np.testing.assert_allclose(occupancy(environment, policy), total, atol=1e-14)
    # A memory does not change what happens.
    product = occupancy(with_memory(environment), np.repeat(policy, 3, axis=0))
    np.testing.assert_allclose(product.reshape(3, 3, 2, 3, 3).sum((1, 4)), total, atol=1e-14)


def test_xor_is_beyond_a_markov_reward_and_within_a_machine():
    environment = two_states()
    policies = deterministic(environment)
    xor = [[0, 3], [1, 2]]
    found = express(environment, policies, xor, formalism="markov")
    assert not found.possible
    differences = [
        occupancy(environment, policies[one]) - occupancy(environment, policies[other])
        for one, other in ((0, 1), (0, 3), (1, 2))
    ]
    assert found.witness[0] > 0
    assert np.abs(np.tensordot(found.witness, differences, 1)).max() < 1e-12
    found = express(environment, policies, xor, formalism="machine")
    assert found.possible
    product = with_memory(environment)
    worth = [(occupancy(product, np.repeat(p, 3, axis=0)) * found.reward).sum() for p in policies]
    assert worth[0] == pytest.approx(worth[3], abs=1e-8)
    assert worth[1] == pytest.approx(worth[2], abs=1e-8)
    assert worth[0] - worth[1] >= 1 - 1e-8


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_ranking_that_a_reward_made_is_found(seed: int):
    environment = random_environment(seed)
    policies = deterministic(environment)
    reward = np.random.default_rng(seed + 9).standard_normal((3, 2, 3))
    order = np.argsort([-(occupancy(environment, p) * reward).sum() for p in policies])
    found = express(environment, policies, [[int(i)] for i in order], formalism="markov")
    assert found.possible
    again = np.argsort([-(occupancy(environment, p) * found.reward).sum() for p in policies])
    assert again.tolist() == order.tolist()


def test_a_mixture_is_never_best_alone():
    """A stationary policy between two is worth between them where nothing follows from its action."""
    environment = two_states()
    both = [np.eye(2)[[0, 0]], np.array([[0.5, 0.5], [1.0, 0.0]]), np.eye(2)[[1, 0]]]
    assert not express(environment, both, [[1], [0, 2]], formalism="markov").possible
    assert express(environment, both, [[0], [1], [2]], formalism="markov").possible
    assert express(environment, both, [[0, 1, 2]], formalism="markov").possible


def test_eventually():
    environment = two_states()
    assert eventually(environment, np.array([[1.0, 0.0], [1.0, 0.0]]), 1) == 0
    assert eventually(environment, np.array([[1.0, 0.0], [0.5, 0.5]]), 1) == pytest.approx(1)
    # A trap: the first choice decides.
    trap = np.zeros((2, 2, 2))
    trap[:, :, 1] = 1.0
    found = eventually(Environment(trap, np.array([1.0, 0.0])), np.array([[0.7, 0.3], [1.0, 0.0]]), 1)
    assert found == pytest.approx(0.3)


XOR = {
    "transitions": [[[0, 1], [0, 1]], [[1, 0], [1, 0]]],
    "start": [1, 0],
    "ranking": [["00", "11"], ["01", "10"]],
}


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file, found = tmp_path / "env.json", tmp_path / "found.json"
    file.write_text(json.dumps(XOR))
    assert main(["run", "objective_formalisms", str(file), "--json", str(found)]) == 0
    out = capsys.readouterr().out
    assert "Markov reward   impossible" in out
    assert "reward machine  possible" in out
    values = json.loads(found.read_text())
    assert values["markov"]["witness"] is not None
    assert values["machine"]["reward"] is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"start": [1, 0, 0]},
            r"expected transitions \[S, A, S\] and start \[S\] but got \[2, 2, 2\] and \[3\]",
        ),
        (
            {"start": [0.5, 0.4]},
            "expected the rows of start to be probabilities that sum to 1 but got a sum of 0.9",
        ),
        ({"discount": 1}, "expected discount between 0 and 1 but got 1"),
        (
            {"ranking": [["00", "02"]]},
            "expected policies of 2 digits below 2, one action per state, but got '02'",
        ),
        ({"ranking": [["00"]]}, "expected a ranking of at least two of the 1 policies"),
        ({"ranking": [["00", "11"], []]}, "expected a policy in each rank but one is empty"),
        ({"transitions": [[1], [2, 3]]}, "env.json: "),
        ({"transitions": None}, "env.json: "),
    ],
)
def test_files_that_are_none(tmp_path: Path, change: dict[str, Any], message: str):
    file = tmp_path / "env.json"
    file.write_text(json.dumps(XOR | change))
    with pytest.raises(ValueError, match=message):
        run(Options(file=file))
    file.write_text(json.dumps({"start": [1]}))
    with pytest.raises(ValueError, match="'transitions' is missing"):
        run(Options(file=file))
    with pytest.raises(FileNotFoundError, match="there is no"):
        run(Options(file=tmp_path / "none.json"))


def test_bad_input():
    environment = two_states()
    with pytest.raises(ValueError, match=r"expected a policy \[2, 2\] of probabilities"):
        occupancy(environment, np.ones((2, 2)))
    with pytest.raises(ValueError, match="expected formalism to be one of 'markov', 'machine'"):
        express(environment, deterministic(environment), [[0], [1]], formalism="ltl")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="each once"):
        express(environment, deterministic(environment), [[0], [0, 1]], formalism="markov")
