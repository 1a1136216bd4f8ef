"""What a training run is told."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of one training run.

    The learning rate rises linearly over `warmup` steps and then falls along a half cosine to `lr * final_lr` at the
    last step.

    Attributes:
        steps: optimiser steps.
        batch_size: images or pieces of text per device and micro-batch; one step sees
            `batch_size * accumulate * devices` of them.
        context: tokens of a piece of text; means nothing for images.
        accumulate: micro-batches whose gradients are added up before each optimiser step.
        lr: peak learning rate of AdamW.
        warmup: steps of linear warm-up.
        final_lr: learning rate at the last step as a fraction of the peak.
        weight_decay: decoupled weight decay of matrices (vectors are not decayed).
        betas: AdamW's averaging constants.
        clip: largest gradient norm; 0 switches clipping off.
        seed: decides initial weights, data order and all random draws.
        precision: `"32-true"`, `"bf16-mixed"`, or another name that Lightning knows.
        checkpoint_every: steps between checkpoints and held-out evaluations; 0: only at the end.
        accelerator: `"auto"`, `"cpu"` or `"gpu"`.
        devices: devices per node: a number, or `"auto"` for all.
        num_nodes: machines.
        strategy: `"auto"`, `"ddp"`, `"fsdp"`, or another name that Lightning knows.
        workers: processes that read images; 0 reads them in the training process.

    Raises:
        ValueError: a number is out of range (named).
    """

    steps: int = 1000
    batch_size: int = 64
    context: int = 256
    accumulate: int = 1
    lr: float = 1e-3
    warmup: int = 50
    final_lr: float = 0.05
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 2.0
    seed: int = 0
    precision: str = "32-true"
    checkpoint_every: int = 500
    accelerator: str = "auto"
    devices: str = "auto"
    num_nodes: int = 1
    strategy: str = "auto"
    workers: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("steps", 1),
            ("batch_size", 1),
            ("context", 1),
            ("accumulate", 1),
            ("num_nodes", 1),
            ("warmup", 0),
            ("clip", 0),
            ("seed", 0),
            ("checkpoint_every", 0),
            ("workers", 0),
            ("weight_decay", 0),
        ):
            value = getattr(self, name)
            if not value >= least:
                raise ValueError(f"{name} must be at least {least} but got {value}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be a positive number but got {self.lr}")
        if not 0 <= self.final_lr <= 1:
            raise ValueError(f"final_lr must lie between 0 and 1 but got {self.final_lr}")
        if self.devices != "auto" and not (self.devices.isdecimal() and int(self.devices) >= 1):
            raise ValueError(f"devices must be 'auto' or a number of devices but got {self.devices!r}")

    def lr_factor(self, step: int) -> float:
        """Learning rate of 0-based `step` as a fraction of the peak."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        progress = min(1.0, (step - self.warmup) / max(1, self.steps - 1 - self.warmup))
        return self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))


# A run may continue with other values of these; all others decide its result.
FREE_ON_RESUME = frozenset(
    {"steps", "checkpoint_every", "accelerator", "devices", "num_nodes", "strategy", "workers"}
)


# What each family of the zoo is trained with unless told otherwise.
DEFAULTS = {
    "tokenizer": TrainConfig(steps=1000, batch_size=64, lr=3e-3),
    "next-scale": TrainConfig(steps=1000, batch_size=64, lr=1e-3),
    "next-cluster": TrainConfig(steps=1000, batch_size=32, lr=3e-3),
    "diffusion": TrainConfig(steps=2000, batch_size=64, lr=2e-3, weight_decay=0.0),
    "block-diffusion": TrainConfig(steps=2000, batch_size=64, lr=2e-3, weight_decay=0.0),
    "frame-diffusion": TrainConfig(steps=2000, batch_size=64, lr=2e-3, weight_decay=0.0),
    "masked-autoregressive": TrainConfig(steps=2000, batch_size=64, lr=2e-3, weight_decay=0.0),
    "classifier": TrainConfig(steps=500, batch_size=32, lr=1e-3),
    "language": TrainConfig(steps=1000, batch_size=8, lr=4e-3, weight_decay=0.1, clip=1.0),
}
