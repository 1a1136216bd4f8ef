"""Writes checkpoints during a run, evaluates, and decides what stays and when to stop."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from arcore._files import atomic_folder
from arcore.training.checkpoint import AVERAGE, BEST, read_weights, step_folder, step_of, steps_of
from arcore.training.guard import Diverged, advice
from arcore.training.history import History


class Keeper(pl.Callback):
    """Writes a checkpoint every `checkpoint_every` steps and after the last, then evaluates.

    Args:
        run: the run folder.
        history: receives the held-out figures.
    """

    def __init__(self, run: Path, history: History) -> None:
        self.run, self.history = run, history
        self.stopped_early = False
        self._kept = -1

    def on_train_batch_end(
        self, trainer: pl.Trainer, task: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        config = task.config
        if (batch_idx + 1) % config.accumulate:
            return
        due = config.checkpoint_every and task.step % config.checkpoint_every == 0
        if not due and task.step != config.steps:
            return
        self.keep(trainer, task, evaluates=task.test_data is not None)
        if config.patience and self.history.evaluations_since_best() >= config.patience:
            self.stopped_early = trainer.should_stop = True

    def keep(self, trainer: pl.Trainer, task: Any, *, evaluates: bool = False) -> None:
        """Write a checkpoint of this step, unless there is one, and delete old ones.

        Args:
            trainer: of the run.
            task: of the run.
            evaluates: evaluate the held-out data, before older checkpoints are deleted.

        Raises:
            Diverged: weights are no longer finite.
        """
        if self._kept == task.step:
            return
        self._refuse_broken_weights(task)
        folder = step_folder(self.run, task.step)
        trainer.save_checkpoint(folder, weights_only=False)
        self._kept = task.step
        if evaluates:
            self.history.held_out(trainer, task, evaluate(trainer, task))
        if trainer.is_global_zero:
            if evaluates and task.config.keep_best and self.history.evaluations_since_best() == 0:
                with atomic_folder(self.run / BEST) as temporary:
                    shutil.copytree(folder, temporary, copy_function=_link, dirs_exist_ok=True)
            self._tidy(task)

    def _refuse_broken_weights(self, task: Any) -> None:
        broken = [
            name
            for name, value in task.named_parameters()
            if value.is_floating_point() and not bool(_here(value).isfinite().all())
        ]
        if broken:
            raise Diverged(
                f"step {task.step}: weights are no longer finite ({broken[0]}, {len(broken)} tensors in all); "
                f"{advice(task, self.run)}"
            )

    def _tidy(self, task: Any) -> None:
        # Checkpoints after this one are left over from a run that was resumed from an older one.
        kept = [path for path in steps_of(self.run) if step_of(path) <= task.step][-task.config.keep_last :]
        # Hidden folders are what a killed process left of a checkpoint that it was writing.
        for path in [*steps_of(self.run), *self.run.glob(".step-*")]:
            if path not in kept:
                shutil.rmtree(path)


def _here(value: torch.Tensor) -> torch.Tensor:
    """The part of a weight that this process holds."""
    return value.to_local() if isinstance(value, DTensor) else value


def _link(source: str, target: str) -> None:
    """The same file under a second name where the disk can do that, a copy elsewhere."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def evaluate(trainer: pl.Trainer, task: Any) -> dict[str, float]:
    """Means of a task's figures over its held-out data; every process of a run takes all of them."""
    modes = [(part, part.training) for part in task.modules()]
    sums: dict[str, Any] = {}
    count = 0
    task.eval()
    try:
        with torch.inference_mode(), torch.random.fork_rng(devices=[]):
            for index, batch in enumerate(task.val_dataloader()):
                moved = trainer.strategy.batch_to_device(batch)
                with trainer.precision_plugin.val_step_context():
                    out = task.validation_step(moved, index)
                for name, value in out["figures"].items():
                    sums[name] = sums.get(name, 0.0) + value * out["weight"]
                count += out["weight"]
            further = task.evaluated()
    finally:
        for part, mode in modes:
            part.training = mode
    return {name: float(total) / count for name, total in sums.items()} | dict(further)


class Average(pl.Callback):
    """A moving average of the trained weights.

    Args:
        decay: weight of what was, per step.
    """

    def __init__(self, decay: float) -> None:
        self._update = get_ema_multi_avg_fn(decay)
        self._weights: dict[str, torch.Tensor] = {}
        self._names: dict[str, str] = {}

    def start(self, task: Any, source: Path | None) -> None:
        """Begin at the weights as they are, or where a checkpoint left the average."""
        self._weights = {
            name: value.detach().clone() for name, value in task.named_parameters() if value.requires_grad
        }
        first = {id(value): name for name, value in task.named_parameters() if value.requires_grad}
        self._names = {
            name: first[id(value)]
            for name, value in task.named_parameters(remove_duplicate=False)
            if id(value) in first
        }
        for network in task.saved if source is not None else ():
            assert source is not None
            if (source / f"{network}{AVERAGE}.safetensors").is_file():
                for key, value in read_weights(source, f"{network}{AVERAGE}").items():
                    if f"{network}.{key}" in self._weights:
                        self._weights[f"{network}.{key}"].copy_(value)

    def weights(self) -> dict[str, torch.Tensor]:
        """The averages by the parameters' names in the task, all names of a shared one."""
        return {name: self._weights[first] for name, first in self._names.items()}

    def on_train_start(self, trainer: pl.Trainer, task: Any) -> None:
        for name, value in task.named_parameters():
            if name in self._weights:
                self._weights[name] = self._weights[name].to(value.device)

    def on_train_batch_end(
        self, trainer: pl.Trainer, task: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % task.config.accumulate == 0:
            now: Sequence[Any] = [value for name, value in task.named_parameters() if name in self._weights]
            with torch.no_grad():
                self._update(list(self._weights.values()), now, task.step)  # type: ignore[arg-type]
