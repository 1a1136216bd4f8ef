"""Ctrl-C and SIGTERM: the step that is under way is finished and saved, then the run ends."""

from __future__ import annotations

import signal
import sys
import threading
from typing import Any

import pytorch_lightning as pl

from arcore.training.keeping import Keeper

# What a terminal sends at Ctrl-C, and what schedulers, `timeout` and `kill` send before they kill.
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop(pl.Callback):
    """Saves a run that is asked to stop; a second request stops it at once.

    Runs of several processes stop at once: their steps do not end together. So do runs outside of the main thread,
    which alone receives signals.

    Args:
        keeper: writes the checkpoint. Its own callback comes before this one.
    """

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._asked = False
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, task: Any) -> None:
        if trainer.world_size == 1 and threading.current_thread() is threading.main_thread():
            # After the engine's own handlers, which let go of the step.
            self._before = {number: signal.signal(number, self._ask) for number in _SIGNALS}

    def on_train_batch_end(
        self, trainer: pl.Trainer, task: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._asked and (batch_idx + 1) % task.config.accumulate == 0 and task.step < task.config.steps:
            self._keeper.keep(trainer, task)
            raise KeyboardInterrupt

    def on_train_end(self, trainer: pl.Trainer, task: Any) -> None:
        self._restore()

    def on_exception(self, trainer: pl.Trainer, task: Any, exception: BaseException) -> None:
        self._restore()

    def _ask(self, number: int, frame: Any) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        print("stopping: this step is finished and saved; once more stops at once", file=sys.stderr)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            # None stands for a handler that Python did not set and cannot set again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}
