"""The references alone: their random numbers, and their laws by integrating the random numbers out."""

from __future__ import annotations

import itertools
import random
from fractions import Fraction

import pytest
import torch

from arcore.ops import _speculative_reference as rules
from arcore.ops import (
    reference_verify_chain,
    reference_verify_relaxed,
    reference_verify_tree,
)


def test_random_bits_are_the_kernels():
    numbers = random.Random(0)
    for _ in range(200):
        seed, position = (numbers.randrange(-(2**63), 2**63) for _ in range(2))
        stream, index = numbers.randrange(6), numbers.randrange(2**33)
        bits = torch.ops.arcore.random_bits(torch.tensor([seed]), torch.tensor([position]), stream, index)
        assert rules.random_bits(seed, position, stream, index) == int(bits) % 2**64


def test_draws_are_the_kernels():
    numbers = random.Random(1)
    for vocab in (1, 2, 63, 64, 65, 500):
        p = torch.rand(20, vocab).pow(8)
        p[:, 1:][torch.rand(20, vocab - 1) < 0.3] = 0.0
        p = (p / p.sum(1, keepdim=True)).float()
        bits = [numbers.randrange(2**64) for _ in range(20)]
        signed = torch.tensor([b - 2**64 if b >= 2**63 else b for b in bits])
        expected = torch.ops.arcore.inverse_cdf(p, signed)
        assert [rules.draw(p[i], bits[i]) for i in range(20)] == expected.tolist()


@pytest.mark.parametrize("row", [[0.0, 0.0], [float("nan"), 1.0], [float("inf"), 0.0], [-0.5, 1.0]])
def test_rows_that_are_no_distribution(row):
    with pytest.raises(rules.NotADistributionError):
        rules.draw(torch.tensor(row), 5)


class _Lattice:
    """Replaces the random numbers by a fine regular lattice, one dimension per number that a rule asks for.

    Laws whose steps fall on lattice lines come out exactly: probabilities here are multiples of 1 / 16, and so are
    acceptance probabilities and residuals where q is uniform over a power of two.
    """

    def __init__(self, values):
        self.values, self.asked = values, {}

    def __call__(self, seed, position, stream, index=0):
        key = (position, stream, index)
        if key not in self.asked:
            self.asked[key] = len(self.asked)
        return self.values[self.asked[key]]


def _law(monkeypatch, run, dimensions, steps):
    """Exact law of run() as a dict, by enumerating the lattice."""
    law: dict = {}
    points = [(2 * i + 1) * 2**63 // steps for i in range(steps)]
    for values in itertools.product(points, repeat=dimensions):
        lattice = _Lattice(values)
        monkeypatch.setattr(rules, "random_bits", lattice)
        outcome = run()
        assert len(lattice.asked) <= dimensions
        law[outcome] = law.get(outcome, Fraction(0)) + Fraction(1, steps**dimensions)
    return law


P = [[8, 4, 4, 0], [4, 4, 4, 4], [0, 8, 0, 8]]


def _probabilities(*rows):
    return torch.tensor([[[x / 16 for x in row] for row in rows]])


def _mixture(weights, laws):
    out: dict = {}
    for weight, law in zip(weights, laws, strict=True):
        for key, value in law.items():
            out[key] = out.get(key, Fraction(0)) + weight * value
    return out


def test_law_of_one_draft(monkeypatch):
    """q uniform over 4: accepted with min(1, 4 p); residual (p - 1/4)+ is all on token 0."""
    p, q = _probabilities(*P[:2]), _probabilities([4, 4, 4, 4])

    def run(x):
        return lambda: reference_verify_chain(p, torch.tensor([[x]]), q, seed=0, offset=0).tokens[0, 0].item()

    law = _mixture([Fraction(1, 4)] * 4, [_law(monkeypatch, run(x), 2, 8) for x in range(4)])
    assert {k: v for k, v in law.items() if v} == {i: Fraction(P[0][i], 16) for i in range(3)}


def test_law_of_two_siblings_without_replacement(monkeypatch):
    """Ordered pairs from q uniform over 4. First coin: min(1, 4 p). Then the residual, against the other three."""
    p, q = _probabilities(P[0], P[1], P[1]), _probabilities([4] * 4, [4] * 4)

    def run(pair):
        def call():
            step = reference_verify_tree(p, torch.tensor([pair]), [-1, -1], q, seed=0, offset=0)
            return step.tokens[0, 0].item()

        return call

    # Token 3, which p rules out, is refused; then all residual mass is on 0, accepted if proposed.
    pairs = list(itertools.permutations(range(4), 2))
    law = _mixture([Fraction(1, 12)] * 12, [_law(monkeypatch, run(pair), 3, 4) for pair in pairs])
    assert {k: v for k, v in law.items() if v} == {i: Fraction(P[0][i], 16) for i in range(3)}


def test_law_of_a_block(monkeypatch):
    """Two drafts under block verification: the first two emitted tokens follow the target's joint law.

    Where only one token is emitted, the next one is the target's by itself.
    """
    after_first = {0: [4, 4, 4, 4], 1: [8, 8, 0, 0], 2: [16, 0, 0, 0], 3: [4, 4, 4, 4]}
    q = [4, 4, 4, 4]
    joint: dict = {}
    for x, y in itertools.product(range(4), repeat=2):
        p = _probabilities(P[0], after_first[x], P[1])
        drafts = _probabilities(q, q)

        def run(p=p, drafts=drafts, x=x, y=y):
            step = reference_verify_chain(p, torch.tensor([[x, y]]), drafts, seed=0, offset=0, method="block")
            return tuple(step.tokens[0, : min(2, step.accepted.item() + 1)].tolist())

        for outcome, chance in _law(monkeypatch, run, 2, 12).items():
            weight = chance / 16
            if len(outcome) == 2:
                joint[outcome] = joint.get(outcome, Fraction(0)) + weight
            else:
                for z in range(4):
                    more = weight * Fraction(after_first[outcome[0]][z], 16)
                    joint[(*outcome, z)] = joint.get((*outcome, z), Fraction(0)) + more
    expected = {
        (x, y): Fraction(P[0][x], 16) * Fraction(after_first[x][y], 16)
        for x, y in itertools.product(range(4), repeat=2)
    }
    # h is a third or so in places: the lattice of 12 has lines there too.
    for key, value in expected.items():
        assert abs(joint.get(key, Fraction(0)) - value) < Fraction(1, 200), key


def test_law_of_a_relaxed_proposal(monkeypatch):
    """Proposal 3 takes token 1's four sixteenths (delta = 0.25), not token 2's."""
    p = _probabilities(P[0], P[1])
    neighbours = torch.tensor([[1, 2, 3], [0, 2, 3], [3, 1, 0], [1, 2, 0]])

    def run():
        step = reference_verify_relaxed(p, torch.tensor([[3]]), neighbours, seed=0, offset=0, delta=0.25)
        return step.tokens[0, 0].item()

    assert _law(monkeypatch, run, 2, 16) == {0: Fraction(8, 16), 2: Fraction(4, 16), 3: Fraction(4, 16)}


def test_references_take_float64():
    p = _probabilities(*P[:2])
    tokens = torch.tensor([[1]])
    single = reference_verify_chain(p, tokens, seed=3, offset=1)
    double = reference_verify_chain(p.double(), tokens, seed=3, offset=1)
    assert torch.equal(single.tokens, double.tokens)
