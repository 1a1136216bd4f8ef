"""Collects the figures of a run; `metrics.csv` grows with them."""

from __future__ import annotations

import csv
import math
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from arcore._files import atomic_path
from arcore.training.guard import Diverged, advice

LOG_EVERY = 10
# A mean loss this many times that of the first step is no training any more.
HOPELESS = 1e3


class History(pl.Callback):
    """Means of the training figures over every `LOG_EVERY` steps, and held-out figures whenever they are taken.

    A row of the training also holds the learning rate, the norm of the gradient before clipping (of the row's last
    step) and the samples per second. Figures stay on the device between rows. The rows do not depend on when
    checkpoints are written or the run is resumed, samples per second aside.

    Args:
        path: CSV file; a row is appended as soon as it is known.
        start_step: rows after this step are left over from an interrupted run and are dropped.
        state: what `state()` gave when the checkpoint was written from which the run goes on.
    """

    def __init__(self, path: Path, start_step: int = 0, state: dict[str, Any] | None = None) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if start_step and path.exists():
            self.rows = [row for row in _read(path) if row["step"] <= start_step]
        state = state or {}
        self._sums: dict[str, Any] = defaultdict(float, state.get("sums", {}))
        self._count = int(state.get("count", 0))
        self._first: float | None = state.get("first")
        self._columns: list[str] = []
        self._samples, self._since = 0, time.monotonic()

    def state(self) -> dict[str, Any]:
        """What is collected for the next row, ready for JSON."""
        sums = {name: float(total) for name, total in self._sums.items()}
        return {"sums": sums, "count": self._count, "first": self._first}

    def evaluations_since_best(self) -> int:
        """Held-out evaluations since the one with the least loss."""
        losses = [row["loss"] for row in self.rows if row["split"] == "test"]
        return len(losses) - 1 - losses.index(min(losses)) if losses else 0

    def on_train_start(self, trainer: pl.Trainer, task: Any) -> None:
        self._since = time.monotonic()
        if trainer.is_global_zero:
            self._rewrite()

    def on_train_batch_end(
        self, trainer: pl.Trainer, task: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        figures = outputs["figures"]
        if self._first is None:
            self._first = float(figures["loss"])
        for name, value in figures.items():
            self._sums[name] += value
        self._count += 1
        self._samples += task.config.batch_size * trainer.world_size
        if (batch_idx + 1) % task.config.accumulate == 0 and (
            task.step % LOG_EVERY == 0 or task.step == task.config.steps
        ):
            self._close_row(trainer, task)

    def _close_row(self, trainer: pl.Trainer, task: Any) -> None:
        means = {name: float(total) / self._count for name, total in self._sums.items()}
        if trainer.world_size > 1:
            here = torch.tensor(list(means.values()), dtype=torch.float64, device=task.device)
            means = dict(zip(means, trainer.strategy.reduce(here, reduce_op="mean").tolist(), strict=True))
        now = time.monotonic()
        rest = {
            "lr": task.trainer.optimizers[0].param_groups[0]["lr"],
            "grad_norm": float(task.grad_norm),
            "samples_per_second": round(self._samples / max(now - self._since, 1e-9), 1),
        }
        self._add_row(trainer, {"step": task.step, "split": "train", **means, **rest})
        self._sums.clear()
        self._count = self._samples = 0
        self._since = now
        if self._first is not None and 0 < self._first * HOPELESS < means["loss"]:
            raise Diverged(
                f"step {task.step}: the loss is {means['loss']:.3g} and was {self._first:.3g} in the first step; "
                f"{advice(task, self.path.parent)}"
            )

    def held_out(self, trainer: pl.Trainer, task: Any, figures: dict[str, float]) -> None:
        """Enter the figures of an evaluation; the time that it took does not count as training."""
        self._add_row(trainer, {"step": task.step, "split": "test", **figures})
        self._since, self._samples = time.monotonic(), 0
        if math.isnan(figures["loss"]):
            raise Diverged(f"step {task.step}: the held-out loss is nan; {advice(task, self.path.parent)}")

    def _add_row(self, trainer: pl.Trainer, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if not trainer.is_global_zero:
            return
        if set(row) <= set(self._columns):
            try:
                with open(self.path, "a", newline="") as file:
                    csv.DictWriter(file, self._columns).writerow(row)
            except OSError as error:
                raise OSError(f"cannot write {self.path}: {error.strerror}") from error
        else:
            self._rewrite()
        for logger in trainer.loggers:
            split = row["split"]
            logger.log_metrics(
                {f"{split}/{name}": value for name, value in row.items() if name not in ("step", "split")},
                step=row["step"],
            )

    def _rewrite(self) -> None:
        """Write all rows; needed where a row brings a new column, and once at the start."""
        last = ("lr", "grad_norm", "samples_per_second")
        names = list(dict.fromkeys(name for row in self.rows for name in row)) or ["step", "split", "loss"]
        self._columns = [name for name in names if name not in last]
        self._columns += [name for name in last if name in names]
        if not self.path.parent.is_dir():
            raise OSError(f"cannot write {self.path}: the run folder is gone")
        with atomic_path(self.path) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
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
