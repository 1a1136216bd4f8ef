"""Thresholdout: which set answers, what it charges, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arcore.cli import main
from arcore.zoo.statistics.reusable_holdout import Options, Thresholdout, analyse


class Contract:
    """Of a column whose truth is known, asked for from honest training rows."""

    runs, least = 40, 38

    def make(self) -> Thresholdout:
        return Thresholdout()

    def data(self, seed: int) -> tuple[Any, Any]:
        random = np.random.default_rng(seed)
        return random.random(2000) < 0.3, random.random(2000) < 0.3

    def covers(self, fitted: Thresholdout, seed: int) -> bool:
        return abs(fitted.answer_ - 0.3) <= 2.5 * (0.21 / 2000) ** 0.5


def test_without_noise_the_rule_is_exact():
    guard = Thresholdout(threshold=0.1, sigma=0.0).fit([0.5, 0.5], [0.5, 0.55])
    assert guard.answer_ == 0.5
    assert guard.spent_ == 0
    # Within the threshold the training rows answer, beyond it the held-out ones.
    assert guard.answer([0.6], [0.5, 0.51]) == 0.6
    assert guard.answer([0.9], [0.5, 0.6]) == pytest.approx(0.55)
    assert guard.spent_ == 1


def test_the_noise_of_answers_is_laplaces():
    guard = Thresholdout(threshold=0.0, sigma=0.01).fit([1.0], np.zeros(100))
    answers = np.array([guard.answer([1.0], np.zeros(100)) for _ in range(20_000)])
    assert guard.spent_ == 20_001
    assert abs(np.median(answers)) < 5e-4
    assert np.abs(answers).mean() == pytest.approx(0.01, rel=0.03)
    assert answers.std() == pytest.approx(0.01 * 2**0.5, rel=0.05)


def test_a_spent_budget_refuses():
    guard = Thresholdout(threshold=0.01, sigma=0.0, budget=1).fit([1.0], [0.0, 0.0])
    with pytest.raises(RuntimeError, match="the budget of 1 answers from the held-out set is spent"):
        guard.answer([0.5], [0.5, 0.5])


def test_repeated_questions_do_not_uncover_the_held_out_rows():
    """The plain analyst overfits by more than ten points; the guarded one by less than four."""
    options = Options(seed=11)
    naive, guarded = analyse(options, guarded=False), analyse(options, guarded=True)
    assert naive.reported - naive.fresh > 0.1
    assert abs(guarded.reported - guarded.fresh) < 0.04


@pytest.mark.parametrize(
    ("settings", "questions", "message"),
    [
        ({}, ([2.0], [0.0]), "expected the values of train to lie in"),
        ({}, ([0.0], [float("nan")]), "expected the values of holdout to lie in"),
        ({}, ([0.0], []), "expected holdout to have one value per row"),
        ({}, ([[0.0]], [0.0]), r"expected train to have one value per row, .* but got \(1, 1\)"),
        ({"threshold": -1.0}, ([0.0], [0.0]), "expected threshold to be a number of at least 0 but got -1"),
        ({"budget": -1}, ([0.0], [0.0]), "expected budget to be at least 0 but got -1"),
    ],
)
def test_bad_input(settings: dict[str, Any], questions: Any, message: str):
    with pytest.raises(ValueError, match=message):
        Thresholdout(**settings).fit(*questions)


def test_rows_stay_those_of_fit():
    with pytest.raises(RuntimeError, match=r"expected fit\(\) before answer\(\)"):
        Thresholdout().answer([0.0], [0.0])
    with pytest.raises(ValueError, match="expected holdout to have 2 rows"):
        Thresholdout().fit([0.0], [0.0, 1.0]).answer([0.0], [0.0])


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    small = ["--rows", "300", "--columns", "400", "--chosen", "40", "--seed", "1"]
    where = ["--json", str(tmp_path / "found.json"), "--figure", str(tmp_path / "figure.png")]
    assert main(["run", "reusable_holdout", *small, *where]) == 0
    out = capsys.readouterr().out
    assert "plain held-out set" in out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["naive"]["reported"] > found["naive"]["fresh"] + 0.1
    assert (tmp_path / "figure.png").stat().st_size > 5000
