"""Collects the figures of a run and keeps `metrics.csv` up to date."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from arcore._files import atomic_path

LOG_EVERY = 10


class History(pl.Callback):
    """Means of the training figures over every `LOG_EVERY` steps, and held-out figures whenever they are taken.

    Figures stay on the device between rows, so logging does not make a GPU wait.

    Args:
        path: CSV file; rewritten as a whole, under a temporary name first.
        start_step: rows after this step are left over from an interrupted run and are dropped.
    """

    def __init__(self, path: Path, start_step: int = 0) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if start_step and path.exists():
            self.rows = [row for row in _read(path) if row["step"] <= start_step]
        self._sums: dict[str, Any] = defaultdict(float)
        self._count = 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, task: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._add(outputs["figures"], 1)
        if (batch_idx + 1) % task.config.accumulate == 0 and (
            task.step % LOG_EVERY == 0 or task.step == task.config.steps
        ):
            self._row(task.step, "train")

    def on_validation_start(self, trainer: pl.Trainer, task: Any) -> None:
        # Half-collected training figures wait while the same sums serve the evaluation.
        self._waiting = self._sums, self._count
        self._sums, self._count = defaultdict(float), 0

    def on_validation_batch_end(self, trainer: pl.Trainer, task: Any, outputs: Any, *_: Any) -> None:
        self._add(outputs["figures"], outputs["weight"])

    def on_validation_end(self, trainer: pl.Trainer, task: Any) -> None:
        self._row(task.step, "test")
        self._sums, self._count = self._waiting
        self._write(trainer)

    def on_save_checkpoint(self, trainer: pl.Trainer, task: Any, checkpoint: dict[str, Any]) -> None:
        self._write(trainer)

    def on_train_end(self, trainer: pl.Trainer, task: Any) -> None:
        self._write(trainer)

    def _add(self, figures: dict[str, Any], weight: int) -> None:
        for name, value in figures.items():
            self._sums[name] += value * weight
        self._count += weight

    def _row(self, step: int, split: str) -> None:
        means = {name: float(total) / self._count for name, total in self._sums.items()}
        self.rows.append({"step": step, "split": split, **means})
        self._sums.clear()
        self._count = 0

    def _write(self, trainer: pl.Trainer) -> None:
        if not trainer.is_global_zero:
            return
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        with atomic_path(self.path) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)


def _read(path: Path) -> list[dict[str, Any]]:
    with open(path, newline="") as file:
        return [
            {
                name: text if name == "split" else int(text) if name == "step" else float(text)
                for name, text in row.items()
                if text
            }
            for row in csv.DictReader(file)
        ]
