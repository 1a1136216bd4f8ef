"""Runs a training task on PyTorch Lightning, so that a resumed run ends with the same weights, bit for bit.

Lightning keeps devices, precision, gradient accumulation and the loop. Its own progress counters are not restored:
a resumed run is a fresh loop over the remaining steps. Image order, random draws and learning rate are functions of
the seed and the absolute step (`stream.py`), so weights and optimiser state are all that a checkpoint must hold.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import Dataset

from arcore._optional import require
from arcore.matmul import half_matmul_of_commands
from arcore.nn.checks import check_text
from arcore.training import checkpoint, state
from arcore.training.config import TrainConfig
from arcore.training.guard import Diverged, Guard
from arcore.training.history import History
from arcore.training.keeping import Average, Keeper
from arcore.training.progress import Progress
from arcore.training.ranks import is_first
from arcore.training.run_folder import run_folder
from arcore.training.shard import Sharded
from arcore.training.stopping import Stop
from arcore.training.task import Task

# Lightning's short names of precisions.
_PRECISIONS = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}


@dataclass(frozen=True)
class FitResult:
    """What `fit` leaves behind.

    Attributes:
        checkpoint: folder of the last checkpoint.
        history: one row per logged step: `step`, `split` (`"train"` or `"test"`) and the task's figures.
        rank: which process of a run on several devices this is.
        steps: optimiser steps that this call did; 0 where the run was finished before.
        stopped_early: `patience` ended the run.
    """

    checkpoint: Path
    history: list[dict[str, Any]]
    rank: int = 0
    steps: int = 0
    stopped_early: bool = False


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
        out: run folder; receives `run.json`, `step-*/` checkpoints and `metrics.csv`.
        test: held-out data, evaluated whenever a checkpoint is written.
        resume: checkpoint or run folder to continue from. The finished run has the same weights as one that was
            never interrupted, provided that device type, number of threads and number of devices are the same.
        title: what the progress bar says.
        show_progress: False keeps the terminal quiet.

    Returns:
        The last checkpoint and the logged figures.

    Raises:
        FileNotFoundError: `resume` holds no checkpoint.
        TypeError: task or data are none.
        ValueError: the checkpoint is damaged or belongs to another model, the task has state that no checkpoint can
            hold, another process writes into the folder, or the settings ask for what is not there.
        arcore.training.guard.Diverged: loss or gradient are no longer finite; a RuntimeError.
        OSError: `out` cannot be written.
    """
    if not isinstance(task, Task):
        raise TypeError(f"task must be an arcore.training.Task but got {type(task).__name__}")
    task.check()
    for name, data in (("train", train), ("test", test)):
        items = (
            hasattr(data, "__len__") and hasattr(data, "__getitem__") and not isinstance(data, str | bytes)
        )
        if not items and (name, data) != ("test", None):
            raise TypeError(f"{name} must be a dataset with a length and items but got {type(data).__name__}")
    if not isinstance(out, (str, os.PathLike)):
        raise TypeError(f"out must be the path of a folder but got {type(out).__name__}")
    check_text("title", title)
    if not isinstance(show_progress, bool):
        raise TypeError(f"expected show_progress to be True or False but got {show_progress!r}")
    out = Path(out)
    _settle(task, len(train), evaluates=test is not None)  # type: ignore[arg-type]
    checkpoint.check_holdable(task)
    config = task.config
    source = None
    figures: dict[str, Any] = {}
    if resume is not None:
        source = checkpoint.find(resume)
        meta = checkpoint.read_meta(source)
        task.start_step, figures = meta["step"], meta.get("figures", {})
    history = History(out / "metrics.csv", start_step=task.start_step, state=figures)
    if source is not None and task.start_step >= config.steps:
        state.load(task, checkpoint.read_task(source, task))
        return FitResult(source, history.rows)
    keeper = Keeper(out, history)
    average = Average(config.ema) if config.ema else None
    callbacks: list[pl.Callback] = [
        Guard(out),
        *([average] if average else []),
        history,
        keeper,
        Stop(keeper),
    ]
    if show_progress:
        callbacks.append(Progress(title))
    facts = {"task": type(task).__name__, "training": dataclasses.asdict(config)}
    with run_folder(out, facts), _quiet(), _random_state():
        trainer = _trainer(task, out, callbacks, checkpoint.FolderCheckpointIO(task, history, average))
        if show_progress:
            _say_what_was_replaced(config, trainer, len(train))  # type: ignore[arg-type]
        task.train_data, task.test_data = train, test
        if average is not None:
            average.start(task, source)
        before = _wandb_run()
        try:
            # In float32 nothing is replaced, since that would cost each small product some microseconds.
            halves = nullcontext() if config.precision == "32-true" else half_matmul_of_commands()
            with halves:
                trainer.fit(task, ckpt_path=source)
        except MisconfigurationException as error:
            raise ValueError(f"the training engine refuses this: {error}") from error
        except (TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, Diverged) or task.step > task.start_step or not _converts_weights(config):
                raise
            raise ValueError(
                f"precision {config.precision} changes the dtype of all weights, which this model does not take: train "
                f"with precision bf16-mixed or 32-true. Its own words: {error}"
            ) from error
        finally:
            # A run of wandb that stays open would take the figures of the next training of this process.
            ours = _wandb_run()
            if before is None and ours is not None:
                ours.finish()
    last = checkpoint.find(out)
    return FitResult(
        last, history.rows, trainer.global_rank, task.step - task.start_step, keeper.stopped_early
    )


def _settle(task: Task, items: int, *, evaluates: bool) -> None:
    """Replace settings that go by the data or the machine by what they mean, and refuse what makes no sense here."""
    config = task.config
    devices = _devices(config)
    if config.epochs is not None:
        batch = config.batch_size * config.accumulate * devices * config.num_nodes
        task.config = config = dataclasses.replace(
            config, steps=max(1, math.ceil(config.epochs * items / batch))
        )
    if (config.keep_best or config.patience) and not evaluates:
        raise ValueError("keep_best and patience go by held-out data, and there are none")
    if config.strategy == "fsdp" and config.ema:
        raise ValueError("a moving average (ema) of weights that are sharded (fsdp) is not kept: use 'ddp'")
    for word, why in _UNFIT_STRATEGIES.items():
        if word in config.strategy and config.strategy != "fsdp":
            raise ValueError(f"the strategy {config.strategy!r} {why}: use 'ddp'{_or_fsdp(word)}")
    if config.strategy == "fsdp" and devices * config.num_nodes == 1:
        raise ValueError(
            "fsdp shards weights over processes, and there is one: use 'auto', or give more devices"
        )
    if config.num_nodes > 1 and not any(name in os.environ for name in ("MASTER_ADDR", "SLURM_JOB_ID")):
        raise ValueError(
            f"num_nodes={config.num_nodes} needs to know the other machines: start it with torchrun or SLURM, or set "
            "MASTER_ADDR, MASTER_PORT and NODE_RANK on each"
        )
    if _on_cpu(config) and not config.oversubscribe:
        cores = _cores()
        for name, count in (("devices", devices), ("workers", config.workers)):
            if count > cores:
                raise ValueError(
                    f"{name}={count} would start {count} processes on the {cores} core{'s' if cores > 1 else ''} of "
                    f"this CPU: choose at most {cores}, or say that you mean it with oversubscribe (--oversubscribe)"
                )


# Strategies of Lightning's that our runs cannot be trained with, by a word in their names.
_UNFIT_STRATEGIES = {
    **dict.fromkeys(("spawn", "fork", "notebook"), "would start processes that cannot take over a run"),
    **dict.fromkeys(
        ("deepspeed", "fsdp", "model_parallel"), "keeps weights in a form that checkpoints do not hold"
    ),
    **dict.fromkeys(("xla", "tpu"), "is for devices that there are no kernels for"),
}


def _or_fsdp(word: str) -> str:
    return " or 'fsdp'" if word in ("deepspeed", "fsdp", "model_parallel") else ""


def _converts_weights(config: TrainConfig) -> bool:
    asked = _PRECISIONS.get(config.precision, config.precision)
    return asked.endswith("-true") and asked != "32-true"


def _on_cpu(config: TrainConfig) -> bool:
    if config.accelerator == "cpu":
        return True
    there = torch.cuda.is_available() or torch.backends.mps.is_available()
    return config.accelerator == "auto" and not there


def _devices(config: TrainConfig) -> int:
    if config.devices != "auto":
        return int(config.devices)
    return 1 if _on_cpu(config) else max(1, torch.cuda.device_count())


def _cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def _trainer(
    task: Task, out: Path, callbacks: list[pl.Callback], files: checkpoint.FolderCheckpointIO
) -> pl.Trainer:
    config = task.config
    precision: Any = config.precision
    # Before the attempt below: that a package is missing is not a setting that the engine refuses.
    logger = _loggers(config, out)
    try:
        return pl.Trainer(
            accelerator=config.accelerator,
            devices=config.devices if config.devices == "auto" else int(config.devices),
            num_nodes=config.num_nodes,
            strategy=_strategy(config),
            precision=precision,
            max_steps=config.steps - task.start_step,
            max_epochs=-1,
            accumulate_grad_batches=config.accumulate,
            # Evaluation belongs to the checkpoints, see keeping.py.
            limit_val_batches=0,
            callbacks=callbacks,
            plugins=[files],
            logger=logger,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=out,
        )
    except (MisconfigurationException, ValueError, TypeError, ImportError) as error:
        raise ValueError(f"the training engine refuses these settings: {error}") from error


def _strategy(config: TrainConfig) -> Any:
    if config.strategy == "auto" and config.num_nodes > 1:
        # Lightning would train on each machine by itself where each has one device.
        return "ddp"
    return Sharded(_devices(config) * config.num_nodes) if config.strategy == "fsdp" else config.strategy


def _loggers(config: TrainConfig, out: Path) -> Any:
    """Loggers of Lightning's that take the figures beside metrics.csv; False where there are none."""
    from pytorch_lightning import loggers

    # In the order in which they were named; all packages are asked for before any logger makes a file.
    names = [name for name in config.logger.split(",") if name != "csv"]
    for name in names:
        require(name, extra=name)
    make = {
        "tensorboard": lambda: loggers.TensorBoardLogger(save_dir=out, name="", version="tensorboard"),
        "wandb": lambda: loggers.WandbLogger(project="arcore", name=out.name, save_dir=out),
    }
    return [make[name]() for name in names] or False


def _wandb_run() -> Any:
    """The run of wandb that is open in this process, or None."""
    return getattr(sys.modules.get("wandb"), "run", None)


def _say_what_was_replaced(config: TrainConfig, trainer: pl.Trainer, items: int) -> None:
    """Tell people where what happens is not what the settings make one expect."""
    batch = config.batch_size * config.accumulate * trainer.world_size
    if batch > items and is_first():
        print(
            f"a step takes {batch} items and there are {items}: some come several times in a step",
            file=sys.stderr,
        )
    asked = _PRECISIONS.get(config.precision, config.precision)
    if str(trainer.precision) != asked and is_first():
        print(
            f"precision {config.precision} is not to be had on this device: {trainer.precision} is used instead",
            file=sys.stderr,
        )
    lacks_units = _on_cpu(config) and str(torch.ops.arcore.cpu_bf16()) == "none"
    if lacks_units and str(trainer.precision).startswith("bf16") and is_first():
        print(
            "this processor has no units for bfloat16: its products are computed in float32, and precision 32-true "
            "takes no longer",
            file=sys.stderr,
        )


@contextmanager
def _random_state() -> Iterator[None]:
    """Leave the caller's random numbers alone; each step seeds its own."""
    before = random.getstate()
    numpy: Any = sys.modules.get("numpy")
    state_of_numpy = numpy.random.get_state() if numpy is not None else None
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(before)
            if numpy is not None:
                numpy.random.set_state(state_of_numpy)


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
