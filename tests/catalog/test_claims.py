"""Rows hold when they should, claims run under fixed conditions, and what goes wrong is said."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from arcore.catalog import catalog
from arcore.catalog.claims import Claim, Row, at_least, at_most, equals, run_claim, shown, steps
from arcore.catalog.lookup import Found


@pytest.mark.parametrize(
    ("row", "holds"),
    [
        (at_most("x", 1.0, 1.0), True),
        (at_most("x", 1.1, 1.0), False),
        (at_least("x", torch.tensor(1.0), 1.0), True),
        (at_least("x", 0.9, 1.0), False),
        (equals("x", 3, 3), True),
        (equals("x", 3.2, 3), False),
        (equals("x", 3.2, 3, tolerance=0.25), True),
        (at_most("x", math.nan, 1.0), False),
        (at_least("x", math.nan, 1.0), False),
        (equals("x", math.nan, 1.0, tolerance=9), False),
    ],
)
def test_rows(row: Row, holds: bool):
    assert row.holds is holds
    assert Claim((row, at_most("fine", 0, 1))).holds is holds


def test_a_claim_needs_rows():
    with pytest.raises(ValueError, match="it would hold whatever happens"):
        Claim(())
    with pytest.raises(TypeError, match="expected the rows of a claim"):
        Claim((True,))


def run(monkeypatch: pytest.MonkeyPatch, function) -> object:
    """`run_claim` of a system whose claim is `function`."""
    monkeypatch.setattr("arcore.catalog.claims.load", lambda place, name: function)
    return run_claim("var", quick=True, listener=None)


def test_fixed_conditions(monkeypatch: pytest.MonkeyPatch):
    drawn = []

    def claim(*, quick: bool) -> Claim:
        assert quick
        drawn.append((torch.rand(3), torch.get_num_threads()))
        return Claim((at_most("x", 0, 1),))

    torch.manual_seed(5)
    threads = torch.get_num_threads()
    before = torch.get_rng_state()
    assert run(monkeypatch, claim).holds
    torch.rand(1)
    assert run(monkeypatch, claim).holds
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert drawn[0][1] == 1
    assert torch.get_num_threads() == threads
    torch.set_rng_state(before)


def test_a_claim_that_raises_or_returns_something_else(monkeypatch: pytest.MonkeyPatch):
    def raises(*, quick: bool) -> Claim:
        raise RuntimeError("two\nlines")

    outcome = run(monkeypatch, raises)
    assert not outcome.holds
    line = raises.__code__.co_firstlineno + 1
    assert outcome.error == f"RuntimeError: two lines (test_claims.py:{line})"
    assert "expected claim() to return a Claim but got True" in run(monkeypatch, lambda *, quick: True).error
    assert run(monkeypatch, lambda *, quick: Claim((at_most("x", 2, 1),))).error is None


def test_a_system_without_a_claim(monkeypatch: pytest.MonkeyPatch):
    entry = dataclasses.replace(catalog()["var"], functions={})
    monkeypatch.setattr("arcore.catalog.claims.find", lambda name: Found(entry, None))
    assert run_claim("var").error == "there is no claim() in var.py"


def test_progress_is_told(monkeypatch: pytest.MonkeyPatch):
    told = []

    def claim(*, quick: bool) -> Claim:
        assert list(steps(3, "counting")) == [0, 1, 2]
        return Claim((at_most("x", 0, 1),))

    monkeypatch.setattr("arcore.catalog.claims.load", lambda place, name: claim)
    run_claim("var", quick=True, listener=lambda *what: told.append(what))
    assert told == [("counting", 0, 3), ("counting", 1, 3), ("counting", 2, 3)]
    run_claim("var", quick=True)
    assert len(told) == 3


def test_values_for_people():
    assert [shown(v) for v in (3.0, 0.000123456, 1e7, math.inf)] == ["3", "0.000123", "1e+07", "inf"]


def test_every_system_has_its_claim():
    for entry in catalog().values():
        assert entry.functions["claim"].summary


def test_an_error_far_below_names_the_line_of_the_system(monkeypatch: pytest.MonkeyPatch):
    """What torch raises inside says nothing by its own place alone."""
    from arcore.zoo.alignment.inpo import inpo_loss

    sums = torch.zeros(2, 2)
    outcome = run(monkeypatch, lambda *, quick: inpo_loss(sums, sums, sums, torch.zeros(3), tau=0.1, eta=0.3))
    assert "(zoo/alignment/inpo.py:" in outcome.error
