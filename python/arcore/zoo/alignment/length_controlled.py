"""Length-controlled AlpacaEval: win rates as if both answers were equally long (Dubois et al., arXiv:2404.04475).

Judges prefer long answers, so a model's win rate against a baseline can be raised by talking more. A logistic
regression explains each preference by the model, by the difference of lengths and by how hard the instruction is,

    logit P(model wins on x) = theta + phi tanh(d / std(d)) + psi difficulty_x,    d = length of model - of baseline,

and the length-controlled win rate is the mean prediction with the second term set to 0. A model against itself has 50.
Soft preferences count as they are. The regression has a small penalty on phi, so that lengths which decide everything
do not make it infinite. The paper fits the difficulties jointly over the models of a leaderboard; here they are given,
or left out.

Lengths are in characters, as there; any other confounder of an evaluation can stand in their place.

Legend: n instructions.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from arcore._files import read_text
from arcore.catalog import System
from arcore.catalog.claims import Claim, at_least, at_most, equals
from arcore.catalog.running import Report, check_bounds
from arcore.nn.checks import check_number
from arcore.nn.kinds import check_kinds
from arcore.zoo.statistics.reusable_holdout import guard_file, told

SYSTEM = System(
    name="length_controlled",
    title="Length-controlled AlpacaEval",
    paper="arXiv:2404.04475",
    paper_title="Length-Controlled AlpacaEval: A Simple Way to Debias Automatic Evaluators",
    topic="alignment",
    kind="estimator",
    summary="Win rates from pairwise preferences, with the judge's liking for length taken out.",
    claim=(
        "Making answers longer or shorter moves the raw win rate by many points and the length-controlled one by few; "
        "a model against itself has 50."
    ),
    checked_on="synthetic data",
    reported="a rank correlation with Chatbot Arena of 0.98 after the correction, 0.94 before",
    builds_on=("reusable_holdout",),
)

try:
    from sklearn.base import BaseEstimator
except ImportError:
    BaseEstimator = object

Vector = NDArray[np.float64]


class LengthControlled(BaseEstimator):  # type: ignore[misc]
    """Win rates of one model against a baseline.

        LengthControlled().fit(preference, length, baseline_length).win_rate_

    Args:
        penalty: of phi squared, in units of one preference's loss; above 0.

    Attributes:
        raw_: mean preference in percent.
        win_rate_: the same at equal lengths.
        chances_: `[n]`, of which `win_rate_` is the mean: the model's chance on each instruction at equal lengths.
        error_: standard error of `win_rate_`, by the delta method.
        theta_: strength of the model, in logits.
        phi_: what length is worth.
        psi_: what difficulty is worth; 0 without difficulties.
    """

    def __init__(self, penalty: float = 1e-3) -> None:
        self.penalty = penalty

    @check_kinds
    def fit(
        self,
        preference: ArrayLike,
        length: ArrayLike,
        baseline_length: ArrayLike,
        difficulty: ArrayLike | None = None,
    ) -> LengthControlled:
        """Fit the regression by Newton's method.

        Args:
            preference: `[n]` in [0, 1], how sure the judge prefers the model.
            length: `[n]` of the model's answers, at least 0.
            baseline_length: `[n]` of the baseline's.
            difficulty: `[n]` of the instructions, or None.

        Raises:
            ValueError: shapes differ, or a value is out of range.
        """
        if not (np.isfinite(self.penalty) and self.penalty > 0):
            raise ValueError(
                f"arcore.LengthControlled: expected penalty > 0 but got {self.penalty!r}; without one, lengths that "
                "decide everything have no finite effect"
            )
        wins = _values("preference", preference, None)
        if ((wins < 0) | (wins > 1)).any():
            raise ValueError(
                f"arcore.LengthControlled: expected preference in [0, 1] but got {wins.min():g} to {wins.max():g}; "
                "subtract 1 from AlpacaEval's values of 1 to 2"
            )
        own, other = (
            _values(name, values, len(wins))
            for name, values in (("length", length), ("baseline_length", baseline_length))
        )
        if (own < 0).any() or (other < 0).any():
            raise ValueError(
                "arcore.LengthControlled: expected lengths of at least 0 but got "
                f"{min(own.min(), other.min()):g}; give both lengths, not their difference"
            )
        gap = own - other
        spread = gap.std()
        columns = [np.ones(len(wins)), np.tanh(gap / spread) if spread > 0 else np.zeros(len(wins))]
        if difficulty is not None:
            columns.append(_values("difficulty", difficulty, len(wins)))
        design = np.stack(columns, 1)
        # Theta and psi get a penalty a thousand times smaller, so that 0 % and 100 % are finite too.
        penalty = self.penalty * np.array([1e-3, 1.0, 1e-3][: design.shape[1]])
        weights, curve = _newton(design, wins, penalty)
        neutral = design.copy()
        neutral[:, 1] = 0.0
        chance = _sigmoid(neutral @ weights)
        self.chances_ = chance
        self.raw_ = 100 * float(wins.mean())
        self.win_rate_ = 100 * float(chance.mean())
        slope = (chance * (1 - chance)) @ neutral / len(wins)
        # The variance of the mean has a part from the coefficients and one from the choice of instructions.
        scatter = design.T * (wins - _sigmoid(design @ weights)) ** 2 @ design
        inverse = np.linalg.inv(curve)
        variance = slope @ inverse @ scatter @ inverse @ slope + chance.var() / len(wins)
        self.error_ = 100 * float(np.sqrt(variance))
        self.theta_, self.phi_ = float(weights[0]), float(weights[1])
        self.psi_ = float(weights[2]) if difficulty is not None else 0.0
        return self


def _newton(design: Vector, wins: Vector, penalty: Vector) -> tuple[Vector, Vector]:
    """Coefficients and curvature of the penalised logistic regression, by Newton's method with halved steps."""

    def loss(weights: Vector) -> float:
        logits = design @ weights
        return float((np.logaddexp(0, logits) - wins * logits).sum() + (penalty * weights**2).sum() / 2)

    weights = np.zeros(design.shape[1])
    for _ in range(200):
        chance = _sigmoid(design @ weights)
        slope = design.T @ (chance - wins) + penalty * weights
        curve = design.T * (chance * (1 - chance)) @ design + np.diag(penalty)
        move = np.linalg.solve(curve, slope)
        size = 1.0
        while loss(weights - size * move) > loss(weights) and size > 1e-6:
            size /= 2
        if np.abs(slope).max() < 1e-10 * len(wins) or size <= 1e-6:
            break
        weights = weights - size * move
    return weights, curve


def _sigmoid(logits: Vector) -> Vector:
    return np.asarray(0.5 * (1 + np.tanh(logits / 2)))


def _values(name: str, values: ArrayLike, rows: int | None) -> Vector:
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or not len(found) or (rows is not None and len(found) != rows):
        wanted = "at least one" if rows is None else str(rows)
        raise ValueError(
            f"arcore.LengthControlled: expected {name} to have one value per instruction, {wanted}, but got shape "
            f"{found.shape}; rows of preference, lengths and difficulty belong together"
        )
    if not np.isfinite(found).all():
        raise ValueError(
            f"arcore.LengthControlled: expected finite values of {name} but got {found[~np.isfinite(found)][0]} in row "
            f"{int(np.argmin(np.isfinite(found)))}; leave out instructions without a judgement"
        )
    return found


@check_kinds
@dataclass(frozen=True, kw_only=True)
class Options:
    """A file of preferences.

    Attributes:
        file: CSV with columns preference (0 to 1), length and baseline_length (characters), and optionally model and
            difficulty.
        penalty: of the effect of length.
        guard: file of a guard against looking too often at the same instructions while a model is being changed. Half
            of the instructions are worked with and the other half is held out; what is told is guarded. Default: none.
        guard_budget: how often the guard may tell what the held-out half says.
        seed: of the guard.
    """

    file: Path = field(metadata={"positional": True, "metavar": "CSV"})
    penalty: float = 1e-3
    guard: Path | None = None
    guard_budget: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        check_bounds(self, least={"penalty": 0})
        if self.guard_budget < 0:
            raise ValueError(f"--guard-budget: expected at least 0 but got {self.guard_budget}")


def read_preferences(path: Path) -> dict[str, dict[str, list[float]]]:
    """Columns of the file by model; the model is "" where the file names none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column is missing, or a value is no number; names the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected a CSV file of preferences but there is no {path}; check the name")
    needed = ("preference", "length", "baseline_length")
    models: dict[str, dict[str, list[float]]] = {}
    with io.StringIO(read_text(path)) as stream:
        reader = csv.DictReader(stream)
        names = reader.fieldnames or []
        missing = [name for name in needed if name not in names]
        if missing:
            raise ValueError(
                f"{path}: expected columns {', '.join(needed)} but {', '.join(missing)} is missing; the first line has "
                f"{', '.join(names) or 'nothing'}"
            )
        wanted = [*needed, *(["difficulty"] if "difficulty" in names else [])]
        for row in reader:
            columns = models.setdefault(row.get("model") or "", {name: [] for name in wanted})
            if None in row:
                raise ValueError(
                    f"{path}:{reader.line_num}: expected {len(names)} columns but got {len(names) + len(row[None])}"
                )
            for name in wanted:
                try:
                    columns[name].append(check_number(name, float(row[name])))
                except (TypeError, ValueError):
                    raise ValueError(
                        f"{path}:{reader.line_num}: expected a finite number in column {name} but got {row[name]!r}; "
                        "leave out lines without a judgement"
                    ) from None
    if not models:
        raise ValueError(
            f"{path}: expected at least one line below the names of the columns but there is none"
        )
    return models


def run(options: Options) -> Report:
    """Both win rates of each model in the file."""
    lines = [f"{'model':24}{'raw':>8}{'controlled':>12}{'s.e.':>8}{'length':>9}{'rows':>7}"]
    values: dict[str, Any] = {}
    models = read_preferences(options.file)
    if options.guard is not None:
        return _guarded(options, options.guard, models)
    for model, columns in models.items():
        found = LengthControlled(options.penalty).fit(**columns)
        name = model or options.file.stem
        ratio = sum(columns["length"]) / max(sum(columns["baseline_length"]), 1.0)
        lines.append(
            f"{name:24}{found.raw_:8.2f}{found.win_rate_:12.2f}{found.error_:8.2f}{ratio:8.2f}x"
            f"{len(columns['length']):7}"
        )
        values[name] = {
            "raw": found.raw_,
            "length_controlled": found.win_rate_,
            "error": found.error_,
            "theta": found.theta_,
            "phi": found.phi_,
            "psi": found.psi_,
            "length_ratio": ratio,
            "rows": len(columns["length"]),
        }
    lines.append(
        "Win rates in percent; controlled: at equal lengths. Length: of all answers, over the baseline's."
    )

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for name, found in values.items():
            axes.plot([0, 1], [found["raw"], found["length_controlled"]], marker="o", label=name)
        axes.set(xticks=[0, 1], xticklabels=["raw", "length-controlled"], ylabel="win rate in percent")
        axes.legend()

    return Report("\n".join(lines), values, draw)


def _guarded(options: Options, path: Path, models: Mapping[str, Mapping[str, Sequence[float]]]) -> Report:
    """The length-controlled win rate of each model, from one half of the instructions unless the other disagrees.

    Halves are the even and the odd lines, the same ones for every model and every call.
    """
    lines, values = [], {}
    with guard_file(path, budget=options.guard_budget, seed=options.seed) as guard:
        for model, columns in models.items():
            name = model or options.file.stem
            if len(columns["preference"]) < 4:
                raise ValueError(
                    f"{options.file}: expected at least 4 lines of {name!r} to guard half of them but got "
                    f"{len(columns['preference'])}; leave --guard out"
                )
            halves = [
                LengthControlled(options.penalty).fit(**{n: column[part::2] for n, column in columns.items()})
                for part in (0, 1)
            ]
            found = guard.check(*(half.chances_ for half in halves))
            lines.append(f"{name:24} length-controlled win rate {told(found)}")
            values[name] = found._asdict()
    lines.append(f"Win rates from 0 to 1. The guard's state is in {path}.")
    return Report("\n".join(lines), values)


@check_kinds
def synthetic(
    verbosity: float, *, rows: int = 805, theta: float = 0.4, phi: float = 1.5, seed: int = 0
) -> dict[str, Vector]:
    """Preferences of a judge that likes length, of a model whose answers are `verbosity` times the baseline's."""
    random = np.random.default_rng(seed)
    baseline = np.round(random.lognormal(7.0, 0.5, rows))
    length = np.round(baseline * verbosity * random.lognormal(0.0, 0.35, rows))
    difficulty = random.standard_normal(rows)
    chance = _sigmoid(theta + phi * np.tanh((length - baseline) / 700.0) + 0.8 * difficulty)
    wins = (random.random(rows) < chance).astype(np.float64)
    return {"preference": wins, "length": length, "baseline_length": baseline, "difficulty": difficulty}


def claim(*, quick: bool) -> Claim:
    """A model of one strength that is told to be short, or to be long; and a model against itself."""
    verbosities = (0.7, 1.0, 1.5)
    raw, controlled = [], []
    for seed in range(3 if quick else 10):
        found = [LengthControlled().fit(**synthetic(v, seed=seed)) for v in verbosities]
        raw.append([one.raw_ for one in found])
        controlled.append([one.win_rate_ for one in found])
    lengths = np.arange(100.0, 200.0)
    itself = LengthControlled().fit(np.full(100, 0.5), lengths, lengths)

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        axes.plot(verbosities, raw[0], marker="o", label="raw")
        axes.plot(verbosities, controlled[0], marker="o", label="length-controlled")
        axes.set(xlabel="length over the baseline's", ylabel="win rate in percent")
        axes.legend()

    return Claim(
        (
            at_least(
                "range of the raw win rate over lengths, points, mean of seeds",
                np.ptp(raw, axis=1).mean(),
                15.0,
            ),
            at_most(
                "range of the length-controlled win rate, points, mean of seeds",
                np.ptp(controlled, axis=1).mean(),
                4.0,
            ),
            equals("a model against itself", itself.win_rate_, 50.0, tolerance=1e-9),
        ),
        draw=draw,
    )
