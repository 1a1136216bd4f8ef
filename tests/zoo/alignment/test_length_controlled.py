"""Length-controlled win rates: the regression, its edges, files of preferences and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arcore.cli import main
from arcore.zoo.alignment.length_controlled import LengthControlled, Options, run, synthetic


class Contract:
    """Of a judge whose liking for length is known, as the regression assumes it."""

    runs, least = 30, 26
    truth = 100 / (1 + np.exp(-0.4))

    def make(self) -> LengthControlled:
        return LengthControlled()

    def data(self, seed: int) -> tuple[Any, ...]:
        random = np.random.default_rng(seed)
        gap = np.round(random.normal(150, 300, 600))
        chance = 1 / (1 + np.exp(-0.4 - 1.2 * np.tanh(gap / gap.std())))
        return (random.random(600) < chance).astype(float), gap + 2000, np.full(600, 2000.0)

    def covers(self, fitted: LengthControlled, seed: int) -> bool:
        return fitted.error_ < 4 and abs(fitted.win_rate_ - self.truth) < 2 * fitted.error_


def test_against_scikit_learn():
    linear = pytest.importorskip("sklearn.linear_model")
    data = synthetic(1.2, rows=400, seed=3)
    found = LengthControlled(penalty=1e-9).fit(**data)
    gap = data["length"] - data["baseline_length"]
    design = np.stack([np.tanh(gap / gap.std()), data["difficulty"]], 1)
    peer = linear.LogisticRegression(C=1e9, tol=1e-10, max_iter=1000).fit(design, data["preference"])
    assert found.theta_ == pytest.approx(peer.intercept_[0], abs=1e-4)
    assert [found.phi_, found.psi_] == pytest.approx(peer.coef_[0], abs=1e-4)
    design[:, 0] = 0
    assert found.win_rate_ == pytest.approx(100 * peer.predict_proba(design)[:, 1].mean(), abs=1e-3)


def test_soft_preferences_are_repeated_rows():
    data = synthetic(1.0, rows=100)
    soft = LengthControlled(penalty=1e-9).fit(np.full(100, 0.75), data["length"], data["baseline_length"])
    hard = LengthControlled(penalty=1e-9).fit(
        np.repeat([1.0, 1.0, 1.0, 0.0], 100), np.tile(data["length"], 4), np.tile(data["baseline_length"], 4)
    )
    assert soft.win_rate_ == pytest.approx(75, abs=1e-6)
    assert hard.win_rate_ == pytest.approx(75, abs=1e-6)


def test_length_alone_explains_a_judge_of_length():
    random = np.random.default_rng(0)
    length = random.integers(1, 1000, 300)
    found = LengthControlled().fit(length > 500, length, np.full(300, 500))
    assert np.isfinite([found.win_rate_, found.phi_, found.error_]).all()
    assert found.phi_ > 5
    assert found.raw_ == pytest.approx(100 * (length > 500).mean())
    always = LengthControlled().fit(np.ones(50), np.full(50, 10), np.full(50, 10))
    assert always.win_rate_ > 99
    assert LengthControlled().fit(np.full(9, 0.5), np.full(9, 10), np.full(9, 10)).win_rate_ == 50


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preference": [1.0, 2.0]}, r"expected preference in \[0, 1\] but got 1 to 2; subtract 1"),
        ({"preference": [1.0, float("nan")]}, "expected finite values of preference but got nan in row 1"),
        ({"length": [1.0]}, r"expected length to have one value per instruction, 2, but got shape \(1,\)"),
        ({"length": [-1.0, 2.0]}, "expected lengths of at least 0 but got -1"),
        ({"difficulty": [[1.0, 2.0]]}, r"expected difficulty .* but got shape \(1, 2\)"),
        ({"preference": []}, "expected preference to have one value per instruction, at least one"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str):
    data = {"preference": [0.0, 1.0], "length": [1.0, 2.0], "baseline_length": [2.0, 1.0]}
    with pytest.raises(ValueError, match=message):
        LengthControlled().fit(**(data | change))
    with pytest.raises(ValueError, match="expected penalty > 0 but got 0"):
        LengthControlled(penalty=0).fit(**data)


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lines = ["model,preference,length,baseline_length,difficulty"]
    for name, verbosity in (("brief", 0.7), ("long", 1.5)):
        columns = synthetic(verbosity, rows=300).values()
        lines += [",".join([name, *map(str, row)]) for row in zip(*columns, strict=True)]
    file, found = tmp_path / "prefs.csv", tmp_path / "found.json"
    file.write_text("\n".join(lines) + "\n")
    where = ["--json", str(found), "--figure", str(tmp_path / "figure.png")]
    assert main(["run", "length_controlled", str(file), *where]) == 0
    assert "controlled" in capsys.readouterr().out
    values = json.loads(found.read_text())
    assert list(values) == ["brief", "long"]
    raw, controlled = (values["long"][k] - values["brief"][k] for k in ("raw", "length_controlled"))
    assert abs(controlled) < raw / 2
    assert values["long"]["rows"] == 300


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "preference,length\n1,2\n",
            "expected columns preference, length, baseline_length but baseline_length is",
        ),
        (
            "preference,length,baseline_length\n1,2,x\n",
            ":2: expected a finite number in column baseline_length but got 'x'",
        ),
        ("preference,length,baseline_length\n", "expected at least one line below the names of the columns"),
        ("", "the first line has nothing"),
    ],
)
def test_files_that_are_none(tmp_path: Path, text: str, message: str):
    file = tmp_path / "prefs.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        run(Options(file=file))
    with pytest.raises(FileNotFoundError, match="there is no"):
        run(Options(file=tmp_path / "other.csv"))


def test_a_guarded_file_tells_no_more_than_its_budget(tmp_path: Path) -> None:
    """Models of which one has learnt the lines that are worked with."""
    rows = ["model,preference,length,baseline_length"]
    for line in range(200):
        length = 900 + 7 * (line % 13)
        rows.append(f"honest,{int(line % 4 < 2)},{length},900")  # half of both halves
    for line in range(200):
        rows.append(f"cheating,{int(line % 2 == 0)},{900 + 7 * (line % 13)},900")
    file, guard = tmp_path / "prefs.csv", tmp_path / "guard.json"
    file.write_text("\n".join(rows) + "\n")
    first = run(Options(file=file, guard=guard, guard_budget=1))
    assert not first.values["honest"]["held_out"]
    assert first.values["honest"]["value"] == pytest.approx(0.5, abs=0.05)
    assert first.values["cheating"]["held_out"]
    assert first.values["cheating"]["value"] < 0.2
    assert "from the held-out part; 1 answers spent" in first.text
    again = run(Options(file=file, guard=guard, guard_budget=1))
    assert "not told: the guard's budget is spent" in again.text
    guard.write_text('{"low": 0, "high": 3, "guard": {}}')
    with pytest.raises(ValueError, match="expected the guard of scores from 0 to 1 but got one of 0 to 3"):
        run(Options(file=file, guard=guard))
    guard.write_text("[]")
    with pytest.raises(ValueError, match="this is no guard's file"):
        run(Options(file=file, guard=guard))
    file.write_text("\n".join(rows[:3]) + "\n")
    with pytest.raises(
        ValueError, match="expected at least 4 lines of 'honest' to guard half of them but got 2"
    ):
        run(Options(file=file, guard=tmp_path / "new.json"))
    with pytest.raises(ValueError, match="--guard-budget: expected at least 0 but got -1"):
        Options(file=file, guard_budget=-1)
