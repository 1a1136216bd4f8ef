"""What a run of `align` shows: a table that grows on a terminal, lines elsewhere, a plot in the run's folder."""

from __future__ import annotations

import math
from pathlib import Path
from types import TracebackType
from typing import Any

from arcore._files import atomic_path
from arcore._optional import require

COLUMNS = ("step", "reward", "kl", "entropy", "length", "loss", "seconds")
TITLES = {
    "reward": "reward",
    "kl": "KL per token, nats",
    "entropy": "entropy per token, nats",
    "length": "tokens",
}
KEPT_ROWS = 15
# Steps without an update of which each is told.
TOLD = 3


class Shown:
    """Shows a run while it goes on.

    Args:
        aligner: the run.
    """

    def __init__(self, aligner: Any) -> None:
        self.aligner = aligner
        self._console = require("rich.console", extra="train").Console(stderr=True)
        self._live: Any = None
        self._skipped = len(aligner.skipped)

    def __enter__(self) -> Shown:
        if self._console.is_terminal:
            self._live = require("rich.live", extra="train").Live(console=self._console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def add(self, figures: dict[str, float]) -> None:
        """Show the figures of a step; the first ones without an update are told at once."""
        skipped = self.aligner.skipped
        if len(skipped) != self._skipped:
            self._skipped = len(skipped)
            if self._skipped <= TOLD:
                self._tell(f"no update: {skipped[-1]}")
        if self._live is not None:
            self._live.update(self._table())
            return
        steps = self.aligner.options.steps
        step = int(figures["step"])
        if step % max(1, steps // 10) == 0 or step in (1, steps):
            told = "  ".join(f"{name} {figures[name]:.4g}" for name in COLUMNS[1:] if name in figures)
            self._console.print(f"step {step}/{steps}  {told}", highlight=False, soft_wrap=True)

    def evaluated(self, figures: dict[str, float]) -> None:
        """Show the figures of an evaluation, or that there are none."""
        if figures:
            self._tell(f"evaluation at step {int(figures['step'])}: {_evaluation(figures)}")
        else:
            self._tell(self.aligner.unjudged[-1])

    def _tell(self, text: str) -> None:
        console = self._live.console if self._live is not None else self._console
        console.print(text, highlight=False, soft_wrap=True, markup=False)

    def plot(self) -> None:
        """Write plot.png into the run's folder, if matplotlib is there."""
        try:
            agg = require("matplotlib.backends.backend_agg", extra="plot")
            made = require("matplotlib.figure", extra="plot").Figure(figsize=(9, 6), layout="constrained")
        except ImportError:
            return
        agg.FigureCanvasAgg(made)
        draw(made, self.aligner)
        with atomic_path(Path(self.aligner.options.out) / "plot.png") as temporary:
            made.savefig(temporary, dpi=120, format="png")

    def _table(self) -> Any:
        table = require("rich.table", extra="train").Table(title=f"align: {self.aligner.options.objective}")
        for name in COLUMNS:
            table.add_column(name, justify="right")
        for row in self.aligner.rows[-KEPT_ROWS:]:
            table.add_row(*(f"{row[name]:.4g}" if name in row else "-" for name in COLUMNS))
        return table


def draw(figure: Any, aligner: Any) -> None:
    """Reward, KL divergence, entropy and length by step."""
    for axes, (name, title) in zip(figure.subplots(2, 2).flat, TITLES.items(), strict=True):
        rows = [row for row in aligner.rows if name in row]
        axes.plot([row["step"] for row in rows], [row[name] for row in rows], linewidth=1)
        if name == "reward" and aligner.evaluations:
            found = aligner.evaluations
            axes.plot(
                [e["step"] for e in found], [e["guarded"] for e in found], "o", label="held out, guarded"
            )
            axes.legend()
        axes.set(title=title, xlabel="step")


def summary(aligner: Any) -> str:
    """What a run came to, for people."""
    o, rows = aligner.options, [row for row in aligner.rows if "reward" in row]
    lines = [f"{o.objective}: {aligner.step} steps of {o.prompts_per_step} x {o.group} responses"]
    if rows:
        part = rows[: max(1, len(rows) // 5)], rows[-max(1, len(rows) // 5) :]
        lines.append(f"{'':10}{'first fifth':>14}{'last fifth':>14}")
        for name in TITLES:
            means = [sum(row[name] for row in some) / len(some) for some in part]
            lines.append(f"{name:10}{means[0]:14.4f}{means[1]:14.4f}")
        worst = max((row["ratio_error"] for row in rows if "ratio_error" in row), default=math.nan)
        gap = max((row["sampler_gap"] for row in rows if "sampler_gap" in row), default=math.nan)
        lines.append(f"largest |ratio - 1| before each rollout's first update: {worst:.3g}")
        lines.append(f"largest difference of the sampler's and the scorer's log-probabilities: {gap:.3g}")
    for found in aligner.evaluations:
        lines.append(f"evaluation at step {int(found['step'])}: {_evaluation(found)}")
    lines += [f"not judged: {one}" for one in aligner.unjudged]
    if aligner.skipped:
        lines.append(f"{len(aligner.skipped)} steps without an update, first: {aligner.skipped[0]}")
    return "\n".join(lines)


def _evaluation(found: dict[str, float]) -> str:
    told = f"training prompts {found['train']:.4f} (s.e. {found['train_error']:.4f}), held out "
    if math.isnan(found["guarded"]):
        return f"{told}not told: the guard's budget is spent"
    return f"{told}(guarded) {found['guarded']:.4f}, {int(found['spent'])} answers spent"
