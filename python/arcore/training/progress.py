"""Progress of a run: a bar on a terminal, a line every tenth of the way elsewhere."""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

UPDATE_EVERY_SECONDS = 0.2


class Progress(pl.Callback):
    """Shows step, loss and remaining time.

    Args:
        title: what is being trained.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._console = Console(stderr=True)
        self._bar: RichProgress | None = None
        self._next_update = 0.0
        self._began = 0.0

    def on_train_start(self, trainer: pl.Trainer, task: Any) -> None:
        self._began = time.monotonic()
        if not trainer.is_global_zero or not self._console.is_terminal:
            return
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._bar.start()
        self._bar.add_task(self.title, total=task.config.steps, completed=task.start_step, figures="")

    def on_train_batch_end(
        self, trainer: pl.Trainer, task: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % task.config.accumulate or not trainer.is_global_zero:
            return
        step, steps = task.step, task.config.steps
        if self._bar is not None:
            now = time.monotonic()
            if now >= self._next_update or step == steps:
                self._next_update = now + UPDATE_EVERY_SECONDS
                self._bar.update(self._bar.task_ids[0], completed=step, figures=_text(outputs["figures"]))
        elif step % max(1, steps // 10) == 0 or step == steps:
            elapsed = time.monotonic() - self._began
            self._console.print(
                f"{self.title}: step {step}/{steps}  {_text(outputs['figures'])}  {elapsed:.0f} s",
                highlight=False,
                soft_wrap=True,
            )

    def on_train_end(self, trainer: pl.Trainer, task: Any) -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, task: Any, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _text(figures: dict[str, Any]) -> str:
    return "  ".join(f"{name} {float(value):.4g}" for name, value in figures.items())
