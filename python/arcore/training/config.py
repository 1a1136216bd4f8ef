"""What a training run is told."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from arcore.training.checks import number

Schedule = Literal["cosine", "constant", "wsd"]
LOGGERS = ("csv", "tensorboard", "wandb")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of one training run.

    Attributes:
        steps: optimiser steps.
        epochs: passes over the training data, instead of a number of steps.
        batch_size: images or pieces of text per device and micro-batch; one step sees
            `batch_size * accumulate * devices` of them.
        accumulate: micro-batches whose gradients are added up before each optimiser step; raises the batch without
            raising the memory.
        lr: peak learning rate of AdamW.
        schedule: course of the learning rate after the warm-up: `"cosine"` falls along a half cosine, `"constant"`
            stays, `"wsd"` stays and falls linearly over the last fifth of the steps.
        warmup: steps of linear warm-up.
        final_lr: learning rate at the last step as a fraction of the peak; means nothing for `"constant"`.
        weight_decay: decoupled weight decay of matrices (vectors are not decayed).
        betas: AdamW's two averaging constants, each in [0, 1).
        clip: largest gradient norm; 0 switches clipping off.
        ema: decay of the moving average of the weights that is saved beside them, e.g. 0.999; 0 keeps none.
        seed: decides initial weights, data order and all random draws.
        precision: `"32-true"`, `"bf16-mixed"`, or another name that Lightning knows.
        checkpoint_every: steps between checkpoints and held-out evaluations; 0: only at the end.
        keep_last: checkpoints that stay, the newest ones.
        keep_best: keep the checkpoint with the least held-out loss too, in the folder `best` of the run.
        patience: stop after this many held-out evaluations without a new least loss; 0 never stops early.
        accelerator: where to compute: `"auto"`, `"cpu"` or `"gpu"`.
        devices: devices per node: a number, or `"auto"` for all (one on a CPU).
        num_nodes: machines; start the same command on each with MASTER_ADDR, MASTER_PORT and NODE_RANK set, or use
            SLURM or torchrun.
        strategy: how devices share the work: `"auto"`, `"ddp"`, `"fsdp"` (weights sharded over the processes), or
            another name that Lightning knows and our checkpoints can hold, such as
            `"ddp_find_unused_parameters_true"`.
        oversubscribe: allow more processes on a CPU than it has cores.
        workers: processes that read data; 0 reads them in the training process.
        logger: where the figures go: `"csv"` is metrics.csv, which is always written; `"tensorboard"` and `"wandb"`
            come beside it, several separated by commas (`"tensorboard,wandb"`).

    Raises:
        TypeError: a value is of the wrong kind (named).
        ValueError: a number is out of range (named).
    """

    steps: int = 1000
    epochs: float | None = None
    batch_size: int = 64
    accumulate: int = 1
    lr: float = 1e-3
    schedule: Schedule = "cosine"
    warmup: int = 50
    final_lr: float = 0.05
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 2.0
    ema: float = 0.0
    seed: int = 0
    precision: str = "32-true"
    checkpoint_every: int = 500
    keep_last: int = 1
    keep_best: bool = False
    patience: int = 0
    accelerator: str = "auto"
    devices: str = "auto"
    num_nodes: int = 1
    strategy: str = "auto"
    oversubscribe: bool = False
    workers: int = 0
    logger: str = field(default="csv", metadata={"names": True, "metavar": "|".join(LOGGERS)})

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "num_nodes", "keep_last"):
            number(name, getattr(self, name), whole=True, least=1)
        for name in ("warmup", "seed", "checkpoint_every", "patience", "workers"):
            number(name, getattr(self, name), whole=True, least=0)
        for name in ("clip", "weight_decay"):
            number(name, getattr(self, name), whole=False, least=0)
        number("final_lr", self.final_lr, whole=False, least=0, most=1)
        number("ema", self.ema, whole=False, least=0)
        if not self.ema < 1:
            raise ValueError(f"ema must be below 1 but got {self.ema}")
        number("lr", self.lr, whole=False, least=0, most=1e30)
        if self.lr == 0:
            raise ValueError(f"lr must be a positive number but got {self.lr}")
        if self.epochs is not None:
            number("epochs", self.epochs, whole=False, least=0)
            if self.epochs == 0:
                raise ValueError("epochs must be above 0 but got 0")
        if not isinstance(self.betas, (tuple, list)) or len(self.betas) != 2:
            raise TypeError(f"betas must be two numbers such as (0.9, 0.95) but got {self.betas!r}")
        for beta in self.betas:
            number("betas", beta, whole=False, least=0)
            if not beta < 1:
                raise ValueError(f"betas must lie in [0, 1) but got {tuple(self.betas)}")
        object.__setattr__(self, "betas", tuple(self.betas))
        if self.schedule not in get_args(Schedule):
            raise ValueError(
                f"schedule must be one of {', '.join(get_args(Schedule))} but got {self.schedule!r}"
            )
        for name in ("keep_best", "oversubscribe"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False but got {getattr(self, name)!r}")
        for name in ("precision", "accelerator", "strategy"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} must be a name but got {getattr(self, name)!r}")
        object.__setattr__(self, "logger", _loggers(self.logger))
        devices: Any = self.devices
        if isinstance(devices, int) and not isinstance(devices, bool):
            devices = str(devices)
        if not isinstance(devices, str):
            raise TypeError(f"devices must be 'auto' or a number of devices but got {devices!r}")
        if devices != "auto" and not (devices.isdecimal() and int(devices) >= 1):
            raise ValueError(f"devices must be 'auto' or a number of devices but got {devices!r}")
        object.__setattr__(self, "devices", devices)

    def lr_factor(self, step: int) -> float:
        """Learning rate of 0-based `step` as a fraction of the peak."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        last = self.steps - 1
        if self.schedule == "constant":
            return 1.0
        if self.schedule == "wsd":
            falls_from = max(self.warmup, self.steps - max(1, self.steps // 5) - 1)
            progress = min(1.0, max(0.0, (step - falls_from) / max(1, last - falls_from)))
            return 1 - (1 - self.final_lr) * progress
        progress = min(1.0, (step - self.warmup) / max(1, last - self.warmup))
        return self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def _loggers(given: Any) -> str:
    """Names of loggers separated by commas, each once."""
    if not isinstance(given, str):
        raise TypeError(
            f"logger must be a text such as 'tensorboard' or 'tensorboard,wandb' but got {given!r}"
        )
    names = [name.strip() for name in given.split(",")]
    for name in names:
        if name not in LOGGERS:
            raise ValueError(
                f"logger must be one of {', '.join(LOGGERS)}, or several separated by commas, but got {given!r}"
            )
    return ",".join(dict.fromkeys(names))


# A run may continue with other values of these; all others decide its result.
FREE_ON_RESUME = frozenset(
    {
        "steps",
        "epochs",
        "checkpoint_every",
        "keep_last",
        "keep_best",
        "patience",
        "accelerator",
        "devices",
        "num_nodes",
        "strategy",
        "oversubscribe",
        "workers",
        "logger",
    }
)
