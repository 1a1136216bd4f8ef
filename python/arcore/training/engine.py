"""Runs a training task on PyTorch Lightning, so that a resumed run ends with the same weights, bit for bit.

Lightning keeps devices, precision, gradient accumulation and the loop. Its own progress counters are not restored:
a resumed run is a fresh loop over the remaining steps. Image order, random draws and learning rate are functions of
the seed and the absolute step (`stream.py`), so weights and optimiser state are all that a checkpoint must hold.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import Dataset

from arcore.training import checkpoint
from arcore.training.history import History
from arcore.training.progress import Progress
from arcore.training.task import Task


@dataclass(frozen=True)
class FitResult:
    """What `fit` leaves behind.

    Attributes:
        checkpoint: folder of the last checkpoint.
        history: one row per logged step: `step`, `split` (`"train"` or `"test"`) and the task's figures.
        rank: which process of a run on several devices this is.
    """

    checkpoint: Path
    history: list[dict[str, Any]]
    rank: int = 0


def fit(
    task: Task,
    train: Dataset,
    out: str | Path,
    *,
    test: Dataset | None = None,
    resume: str | Path | None = None,
    title: str = "training",
    show_progress: bool = True,
) -> FitResult:
    """Train a task and write checkpoints into a run folder.

    Args:
        task: model, loss and settings.
        train: training data; items are pairs of what `task.loss` takes.
        out: run folder; receives `step-*/` checkpoints (the newest stays) and `metrics.csv`.
        test: held-out data, evaluated whenever a checkpoint is written.
        resume: checkpoint or run folder to continue from. The finished run has the same weights as one that was
            never interrupted, provided that device type, number of threads and number of devices are the same.
        title: what the progress bar says.
        show_progress: False keeps the terminal quiet.

    Returns:
        The last checkpoint and the logged figures.

    Raises:
        FileNotFoundError: `resume` holds no checkpoint.
        ValueError: the checkpoint is damaged or belongs to another model.
        OSError: `out` cannot be written.
    """
    config = task.config
    out = Path(out)
    source = None
    if resume is not None:
        source = checkpoint.find(resume)
        task.start_step = checkpoint.read_meta(source)["step"]
    history = History(out / "metrics.csv", start_step=task.start_step)
    if source is not None and task.start_step >= config.steps:
        for name, module in task.modules_to_save().items():
            module.load_state_dict(checkpoint.read_weights_of(source, name, module))
        return FitResult(source, history.rows)
    callbacks: list[pl.Callback] = [history, checkpoint.Checkpoints(out)]
    if show_progress:
        callbacks.append(Progress(title))
    with _quiet(), torch.random.fork_rng(devices=[]):
        trainer = _trainer(task, out, callbacks, evaluate=test is not None)
        task.train_data, task.test_data = train, test
        trainer.fit(task, ckpt_path=source)
    return FitResult(checkpoint.find(out), history.rows, trainer.global_rank)


def _trainer(task: Task, out: Path, callbacks: list[pl.Callback], *, evaluate: bool) -> pl.Trainer:
    config = task.config
    left = config.steps - task.start_step
    precision: Any = config.precision
    try:
        return pl.Trainer(
            accelerator=config.accelerator,
            devices=config.devices if config.devices == "auto" else int(config.devices),
            num_nodes=config.num_nodes,
            strategy=config.strategy,
            precision=precision,
            max_steps=left,
            max_epochs=-1,
            accumulate_grad_batches=config.accumulate,
            gradient_clip_val=config.clip or None,
            check_val_every_n_epoch=None,
            # A run shorter than the interval is evaluated at its end.
            val_check_interval=min(config.checkpoint_every or left, left) * config.accumulate,
            num_sanity_val_steps=0,
            limit_val_batches=1.0 if evaluate else 0,
            callbacks=callbacks,
            plugins=[checkpoint.FolderCheckpointIO(task)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=out,
        )
    except MisconfigurationException as error:
        raise ValueError(f"the training engine refuses these settings: {error}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's notices about loaders, workers and tips off the terminal; errors still come through."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        # Hints about loaders, and deprecations that Lightning itself walks into, are not for our users.
        warnings.filterwarnings("ignore", module=r"pytorch_lightning|lightning_fabric")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
