"""Clips gradients, and stops a run whose numbers are no longer finite."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_

from arcore.training.checkpoint import newest


class Diverged(RuntimeError):
    """Training has no finite numbers any more, or a loss far above where it began."""


class Guard(pl.Callback):
    """Measures and clips the gradient before each step, and stops at a NaN or an infinity before the weights take it.

    Args:
        run: the run folder, for the message.
    """

    def __init__(self, run: Path) -> None:
        self.run = run

    def on_before_optimizer_step(self, trainer: pl.Trainer, task: Any, optimizer: Any) -> None:
        parameters = [value for group in optimizer.param_groups for value in group["params"]]
        norm = clip_grad_norm_(parameters, task.config.clip or math.inf)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        task.grad_norm = norm.detach()
        # A gradient scaler skips steps with infinite gradients by itself and tries a smaller scale.
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        loss = task.last_loss
        what = "loss" if not bool(torch.isfinite(loss)) else "gradient"
        if what == "loss" or (not scaled and not bool(torch.isfinite(norm))):
            value = float(loss) if what == "loss" else float(norm)
            raise Diverged(f"step {task.step + 1}: the {what} is {value}; {advice(task, self.run)}")


def advice(task: Any, run: Path) -> str:
    """What is left of a run that diverged, and what to try."""
    kept = newest(run)
    config = task.config
    hints = [f"a smaller lr than {config.lr:g}", f"a longer warmup than {config.warmup} steps"]
    if not 0 < config.clip <= 1:
        hints.append("clip 1")
    if config.precision != "32-true":
        hints.append("precision 32-true")
    left = f"the checkpoint {kept} is from before" if kept else "no checkpoint was written before"
    return f"training stops, {left}. Try {', '.join(hints)}, or look for bad values in the data"
