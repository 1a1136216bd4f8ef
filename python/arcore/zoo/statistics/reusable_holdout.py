"""The reusable holdout: a held-out set that may be asked again and again (Dwork et al., arXiv:1411.2664).

Whoever looks at a held-out set, changes what is measured, and looks again, soon measures the held-out set and not the
world. Thresholdout answers each question from the training data as long as the two sets agree up to a noisy threshold;
only where they disagree does it tell what the held-out set says, with Laplace noise, and charges its budget. So
overfitting to the training data shows, and little is learnt about the held-out rows. The paper's mechanisms for
exponentially many questions (private multiplicative weights) are left out; this is its practical form, algorithm
Thresholdout of the companion paper in Science (arXiv:1506.02629).

It is an estimator of means: a question is a value in [0, 1] for every training row and every held-out row.

Legend: n rows, d columns, T threshold, sigma rate of the noise.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from arcore._files import atomic_path
from arcore.catalog import System
from arcore.catalog.claims import Claim, at_least, at_most, steps
from arcore.catalog.running import Report
from arcore.nn.kinds import check_kinds

SYSTEM = System(
    name="reusable_holdout",
    title="Reusable holdout",
    paper="arXiv:1411.2664",
    paper_title="Preserving Statistical Validity in Adaptive Data Analysis",
    topic="statistics",
    kind="estimator",
    summary="Answers questions about a held-out set that depend on earlier answers, without overfitting to it.",
    claim=(
        "After features were selected on pure noise with its help, a plain held-out set reports skill and the guarded "
        "one does not."
    ),
    checked_on="synthetic data",
)

try:
    from sklearn.base import BaseEstimator
except ImportError:
    BaseEstimator = object


class Thresholdout(BaseEstimator):  # type: ignore[misc]
    """Guards a held-out set.

        guard = Thresholdout().fit(right_on_training_rows, right_on_held_out_rows)
        guard.answer(training_values, held_out_values)      # as often as wanted

    Args:
        threshold: T, how far the sets may differ before the held-out one is told; None takes 2 / sqrt(n), which is four
            standard deviations of the mean of n coins.
        sigma: rate of the noise; None takes T / 16. The threshold's own noise has 2 sigma, the comparison's 4 sigma,
            an answer's sigma.
        budget: how many answers may come from the held-out set; None for as many as asked for.
        seed: decides the noise.

    Attributes:
        answer_: answer to the question that `fit` was given.
        spent_: answers from the held-out set so far.
        rows_: held-out rows n.
    """

    def __init__(
        self,
        threshold: float | None = None,
        sigma: float | None = None,
        budget: int | None = None,
        seed: int = 0,
    ) -> None:
        self.threshold = threshold
        self.sigma = sigma
        self.budget = budget
        self.seed = seed

    @check_kinds
    def fit(self, train: ArrayLike, holdout: ArrayLike) -> Thresholdout:
        """Begin anew, with a first question.

        Args:
            train: `[n_train]` in [0, 1], a value of each training row.
            holdout: `[n]` in [0, 1], of each held-out row.

        Raises:
            ValueError: values outside [0, 1] or no rows, or a setting is out of range.
        """
        for name in ("threshold", "sigma"):
            value = getattr(self, name)
            if value is not None and not (np.isfinite(value) and value >= 0):
                raise ValueError(f"expected {name} to be a number of at least 0 but got {value!r}")
        if self.budget is not None and self.budget < 0:
            raise ValueError(f"expected budget to be at least 0 but got {self.budget!r}")
        self.rows_ = len(_values("holdout", holdout))
        self.spent_ = 0
        self._random = np.random.default_rng(self.seed)
        self._noisy_threshold = self._fresh_threshold()
        self.answer_ = self.answer(train, holdout)
        return self

    @check_kinds
    def answer(self, train: ArrayLike, holdout: ArrayLike) -> float:
        """The mean of a question, from the training rows unless the held-out rows clearly disagree.

        Arguments are those of `fit`; the held-out rows must be as many as there.

        Raises:
            ValueError: see `fit`.
            RuntimeError: `fit` was not called, or the budget is spent.
        """
        if not hasattr(self, "_random"):
            raise RuntimeError("arcore.Thresholdout: expected fit() before answer()")
        mean = float(_values("train", train).mean())
        held_out = _values("holdout", holdout)
        if len(held_out) != self.rows_:
            raise ValueError(
                f"expected holdout to have {self.rows_} rows, as in fit(), but got {len(held_out)}"
            )
        if self.budget is not None and self.spent_ >= self.budget:
            raise RuntimeError(
                f"the budget of {self.budget} answers from the held-out set is spent: its next answers would no "
                "longer be worth more than those of the training rows"
            )
        true = float(held_out.mean())
        if abs(mean - true) <= self._noisy_threshold + self._noise(4):
            return mean
        self.spent_ += 1
        self._noisy_threshold = self._fresh_threshold()
        return true + self._noise(1)

    def _fresh_threshold(self) -> float:
        return self._limit + self._noise(2)

    @property
    def _limit(self) -> float:
        return 2 / self.rows_**0.5 if self.threshold is None else self.threshold

    def _noise(self, times: float) -> float:
        sigma = self._limit / 16 if self.sigma is None else self.sigma
        return float(self._random.laplace(scale=times * sigma)) if sigma > 0 else 0.0


class Guarded(NamedTuple):
    """What `EvalGuard.check` answers.

    Attributes:
        value: to report, in the units of the scores; NaN once the budget is spent and the sets disagree.
        held_out: whether the held-out prompts were told, which costs one of the budget.
        spent: of the budget so far.
    """

    value: float
    held_out: bool
    spent: int


class EvalGuard:
    """Thresholdout around an evaluation that is repeated while what it measures is being changed.

    Its state is JSON, so a run that is resumed or evaluated again goes on with the same budget and noise.

    Args:
        low: least possible score.
        high: largest possible score.
        budget: answers from held-out rows; None for no limit.
        threshold: see `Thresholdout`, in units of scores scaled to [0, 1].
        sigma: likewise.
        seed: decides the noise.

    Raises:
        ValueError: low is not below high.
    """

    def __init__(
        self,
        *,
        low: float = 0.0,
        high: float = 1.0,
        budget: int | None = 20,
        threshold: float | None = None,
        sigma: float | None = None,
        seed: int = 0,
    ) -> None:
        if not low < high:
            raise ValueError(f"arcore.EvalGuard: expected low < high but got {low} and {high}")
        self.low, self.high = low, high
        self._inner = Thresholdout(threshold, sigma, budget, seed)
        self._begun = False

    def check(self, train: ArrayLike, held_out: ArrayLike) -> Guarded:
        """The score to report.

        Args:
            train: `[n_train]` scores on what was trained on.
            held_out: `[n]` scores on what was not, as many each time.

        Raises:
            ValueError: a score is outside of [low, high], there is none, or the number of rows changed.
        """
        scaled = []
        for name, values in (("train", train), ("held_out", held_out)):
            found = np.asarray(values, dtype=np.float64)
            if found.size and not ((found >= self.low) & (found <= self.high)).all():
                raise ValueError(
                    f"arcore.EvalGuard: expected the scores of {name} from {self.low} to {self.high} but got "
                    f"{found.min()} to {found.max()}; give the range of the reward"
                )
            scaled.append((found - self.low) / (self.high - self.low))
        before = self._inner.spent_ if self._begun else 0
        try:
            if self._begun:
                value = self._inner.answer(*scaled)
            else:
                value = self._inner.fit(*scaled).answer_
                self._begun = True
        except RuntimeError:
            value = float("nan")
        spent = self._inner.spent_
        return Guarded(self.low + (self.high - self.low) * value, spent > before, spent)

    def state(self) -> dict[str, Any]:
        """What goes on, ready for JSON; {} before the first check."""
        if not self._begun:
            return {}
        inner = self._inner
        return {
            "rows": inner.rows_,
            "spent": inner.spent_,
            "threshold": inner._noisy_threshold,
            "random": inner._random.bit_generator.state,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        if not state:
            return
        inner = self._inner
        inner.rows_, inner.spent_ = int(state["rows"]), int(state["spent"])
        inner._noisy_threshold = float(state["threshold"])
        inner._random = np.random.default_rng()
        inner._random.bit_generator.state = state["random"]
        self._begun = True


@contextmanager
def guard_file(path: Path, **settings: Any) -> Iterator[EvalGuard]:
    """A guard whose state stands in a file, so that a command that is run again goes on with it.

        with guard_file(Path("guard.json"), budget=20) as guard:
            guard.check(train, held_out)

    Args:
        path: JSON; made where there is none, and written when all went well.
        settings: of `EvalGuard`.

    Raises:
        ValueError: the file is damaged, or of a guard with another range.
    """
    guard = EvalGuard(**settings)
    if path.exists():
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            span, kept = (float(state["low"]), float(state["high"])), dict(state["guard"])
            guard.load(kept)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"--guard {path}: this is no guard's file ({error}); give another name"
            ) from error
        if span != (guard.low, guard.high):
            raise ValueError(
                f"--guard {path}: expected the guard of scores from {guard.low:g} to {guard.high:g} but got one of "
                f"{span[0]:g} to {span[1]:g}; each kind of evaluation needs a file of its own"
            )
    yield guard
    with atomic_path(path) as temporary:
        content = {"low": guard.low, "high": guard.high, "guard": guard.state()}
        temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")


def told(found: Guarded, *, digits: int = 4) -> str:
    """One clause about an answer, for reports."""
    if np.isnan(found.value):
        return "not told: the guard's budget is spent, take fresh rows"
    how = "from the held-out part" if found.held_out else "both parts agree"
    return f"{found.value:.{digits}f} ({how}; {found.spent} answers spent)"


def _values(name: str, values: ArrayLike) -> NDArray[np.float64]:
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or not len(found):
        raise ValueError(f"expected {name} to have one value per row, [n] with n >= 1, but got {found.shape}")
    if not ((found >= 0) & (found <= 1)).all():
        raise ValueError(
            f"expected the values of {name} to lie in [0, 1] but got {found.min()} to {found.max()}"
        )
    return found


@check_kinds
@dataclass(frozen=True, kw_only=True)
class Options:
    """An analyst who selects columns of pure noise by what the held-out set says.

    Attributes:
        rows: rows of each of the three sets.
        columns: columns of noise.
        chosen: how many columns the analyst keeps.
        seed: decides the data and the answers' noise.
    """

    rows: int = 1500
    columns: int = 3000
    chosen: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rows", "columns", "chosen"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1 but got {getattr(self, name)}")


@dataclass(frozen=True)
class Found:
    """Accuracies of the analyst's classifier.

    Attributes:
        reported: by the held-out set, as the analyst reads it.
        fresh: on rows that nobody has looked at.
    """

    reported: float
    fresh: float


def analyse(options: Options, *, guarded: bool) -> Found:
    """The paper's experiment: keep columns whose correlation with the label has the same sign in both sets.

    The analyst asks the held-out set about every column, keeps the `chosen` strongest whose signs agree, lets them
    vote, and asks how good that vote is.

    Args:
        options: data and sizes.
        guarded: whether the held-out set is asked through `Thresholdout`.
    """
    random = np.random.default_rng(options.seed)
    (train, holdout, fresh), labels = _data(options, random)
    # A question in [0, 1] per column: how often column and label agree.
    agree = [
        np.where(x * y[:, None] > 0, 1.0, 0.0) for x, y in zip((train, holdout), labels[:2], strict=True)
    ]
    guard = Thresholdout(seed=options.seed).fit(agree[0][:, 0], agree[1][:, 0]) if guarded else None
    in_train = agree[0].mean(0) - 0.5
    if guard is None:
        in_holdout = agree[1].mean(0) - 0.5
    else:
        columns = zip(agree[0].T, agree[1].T, strict=True)
        in_holdout = np.array([guard.answer(one, other) for one, other in columns]) - 0.5
    strength = np.where(in_train * in_holdout > 0, np.abs(in_train) + np.abs(in_holdout), -1.0)
    kept = np.argsort(-strength)[: options.chosen]
    signs = np.sign(in_train[kept])
    right = [
        ((np.sign(x[:, kept]) @ signs >= 0) == (y > 0)).astype(float)
        for x, y in zip((train, holdout, fresh), labels, strict=True)
    ]
    reported = float(right[1].mean()) if guard is None else guard.answer(right[0], right[1])
    return Found(reported, float(right[2].mean()))


def _data(options: Options, random: Any) -> tuple[Sequence[Any], Sequence[Any]]:
    """Training, held-out and fresh rows, and labels of -1 and 1 that have nothing to do with them."""
    sets = [random.standard_normal((options.rows, options.columns)) for _ in range(3)]
    return sets, [random.integers(0, 2, len(x)) * 2 - 1 for x in sets]


def run(options: Options) -> Report:
    """Both analysts on the same data."""
    naive, guarded = analyse(options, guarded=False), analyse(options, guarded=True)
    lines = [f"{'':22}{'reported':>10}{'fresh rows':>12}"]
    for name, found in (("plain held-out set", naive), ("reusable holdout", guarded)):
        lines.append(f"{name:22}{found.reported:10.3f}{found.fresh:12.3f}")
    lines.append("There is nothing to find: accuracy is 0.5 for any classifier.")
    values = {
        "naive": {"reported": naive.reported, "fresh": naive.fresh},
        "guarded": {"reported": guarded.reported, "fresh": guarded.fresh},
    }

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for place, found in enumerate((naive, guarded)):
            axes.bar([place - 0.2, place + 0.2], [found.reported, found.fresh], 0.38, color=["C1", "C0"])
        axes.axhline(0.5, color="0.4", linewidth=1)
        axes.set(xticks=[0, 1], xticklabels=["plain held-out set", "reusable holdout"], ylim=(0.4, 0.75))
        axes.set_ylabel("accuracy: reported (orange), on fresh rows (blue)")

    return Report("\n".join(lines), values, draw)


def claim(*, quick: bool) -> Claim:
    """Noise of the paper's kind: what a plain and a guarded held-out set report, over seeds."""
    seeds = range(1 if quick else 10)
    naive, guarded = [], []
    for seed in steps(len(seeds), "analysing"):
        naive.append(analyse(Options(seed=seed), guarded=False))
        guarded.append(analyse(Options(seed=seed), guarded=True))
    return Claim(
        (
            at_least(
                "accuracy that a plain held-out set reports", min(found.reported for found in naive), 0.62
            ),
            at_most("accuracy of the same choice on fresh rows", max(found.fresh for found in naive), 0.55),
            at_most(
                "guarded: reported accuracy against fresh rows, largest distance",
                max(abs(found.reported - found.fresh) for found in guarded),
                0.04,
            ),
        )
    )
