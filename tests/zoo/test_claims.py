"""The claim of every system holds; in full with --runslow."""

from __future__ import annotations

import math

import pytest

from arcore.catalog import list_systems
from arcore.catalog.claims import run_claim, shown


def check(name: str, *, quick: bool) -> None:
    outcome = run_claim(name, quick=quick)
    assert outcome.error is None, outcome.error
    wrong = [
        f"{row.what}: {shown(row.measured)}, required {row.required}"
        for row in outcome.claim.rows
        if not row.holds
    ]
    assert wrong == []
    assert not any(math.isnan(row.measured) for row in outcome.claim.rows)


# Those of theories run in contract_theory.py, which draws their figures too.
@pytest.mark.parametrize("name", sorted(set(list_systems()) - set(list_systems(kind="theory"))))
def test_claim_holds(name: str):
    check(name, quick=True)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", list_systems())
def test_claim_holds_in_full(name: str):
    check(name, quick=False)
