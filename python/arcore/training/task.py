"""What is trained: a model with its loss. The base class holds what all tasks share."""

from __future__ import annotations

import random
import signal
import sys
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader

from arcore.nn.kinds import check_kinds
from arcore.training import state
from arcore.training.config import TrainConfig
from arcore.training.groups import parameter_groups
from arcore.training.shard import Sharded, shard
from arcore.training.stream import StreamSampler, derive_seed


@check_kinds
class Task(pl.LightningModule):
    """Base of all training tasks.

    A subclass sets its networks as attributes, names them in `saved`, and implements `loss` and `meta`.

    Attributes:
        saved: names of the attributes that are networks; a checkpoint holds one safetensors file for each.
        sampler_type: decides which items of the dataset a batch holds.
        config: settings of the run.
        start_step: optimiser steps that were done before this process took over.
        run_facts: further entries of config.json, from whoever starts the run.
        sharded: the weights are spread over processes.
        grad_norm: norm of the last gradient before clipping.
        last_loss: of the last micro-batch.
    """

    saved: tuple[str, ...]
    sampler_type: ClassVar[type[StreamSampler]] = StreamSampler

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        self.config = config
        self.start_step = 0
        self.sharded = False
        self.run_facts: dict[str, Any] = {}
        self.grad_norm: Any = 0.0
        self.last_loss = torch.zeros(())
        self.train_data: Any = None
        self.test_data: Any = None

    @abstractmethod
    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Training loss of a batch.

        Args:
            images: `[B, C, H, W]` in [-1, 1]; or whatever comes first in an item of the dataset.
            labels: `[B]` class numbers; or whatever comes second.

        Returns:
            The scalar to minimise and further scalars worth logging.
        """

    @abstractmethod
    def meta(self) -> dict[str, Any]:
        """What config.json says, ready for JSON; `step` is added to it."""

    def files(self) -> dict[str, str]:
        """Texts that stand in a checkpoint beside the weights, by file name."""
        return {}

    def check(self) -> None:
        """See that a subclass has what it must have.

        Raises:
            TypeError: `saved` is not there or no names, or `loss` or `meta` is not there.
        """
        kind = type(self).__name__
        saved: Any = getattr(self, "saved", None)
        if not isinstance(saved, (tuple, list)) or not saved or not all(isinstance(n, str) for n in saved):
            raise TypeError(
                f"{kind}.saved must name the attributes that are networks, as in saved = ('model',), but is {saved!r}"
            )
        for name in ("loss", "meta"):
            if getattr(type(self), name) is getattr(Task, name):
                raise TypeError(f"{kind} must have a method {name}: see arcore.training.Task.{name}")

    def modules_to_save(self) -> dict[str, nn.Module]:
        """The networks of a checkpoint by name."""
        return {name: getattr(self, name) for name in self.saved}

    @property
    def step(self) -> int:
        """Optimiser steps done since the very beginning of the run."""
        return self.start_step + int(self.global_step)

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, Sharded) and not self.sharded:
            self.sharded = True
            for network in self.modules_to_save().values():
                shard(network, self.device_mesh["data_parallel"])  # type: ignore[index]

    def evaluated(self) -> Mapping[str, float]:
        """Called in evaluation mode when the held-out data have been evaluated.

        Returns:
            Figures of all of them that are no mean over batches.
        """
        return {}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As for any module; tensors with elements that share memory are loaded too."""
        if strict and not assign:
            return state.load(self, state_dict)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Any]:
        found: Any = self.loss(*batch)
        if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], Mapping)):
            raise TypeError(
                f"{type(self).__name__}.loss must return the loss and a table of figures, as in `return loss, {{}}`, "
                f"but returned a {type(found).__name__}"
            )
        loss, figures = found
        self.last_loss = loss.detach()
        return {"loss": loss, "figures": {"loss": loss.detach(), **figures}}

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Any]:
        loss, figures = self.loss(*batch)
        return {"figures": {"loss": loss, **figures}, "weight": len(batch[0])}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        micro_batch = self.start_step * self.config.accumulate + batch_idx
        seed = derive_seed(self.config.seed, "draws", micro_batch, self.global_rank)
        torch.manual_seed(seed)
        random.seed(seed)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(seed % 2**32)
        factor = self.config.lr_factor(self.step)
        for group in self.trainer.optimizers[0].param_groups:
            # A group may have a rate of its own, a factor of the run's.
            group["lr"] = self.config.lr * factor * group.get("rate", 1.0)

    def configure_optimizers(self) -> Optimizer:
        groups = parameter_groups(self, self.config.weight_decay)
        return AdamW(groups, lr=self.config.lr, betas=self.config.betas)

    def train_dataloader(self) -> DataLoader:
        sampler = self.sampler_type(
            len(self.train_data),
            self.config.batch_size,
            start=self.start_step * self.config.accumulate,
            stop=self.config.steps * self.config.accumulate,
            seed=self.config.seed,
            rank=self.global_rank,
            world_size=self.trainer.world_size,
            places=getattr(self.train_data, "placed", False),
        )
        return DataLoader(
            self.train_data,
            batch_sampler=sampler,
            num_workers=self.config.workers,
            persistent_workers=self.config.workers > 0,
            worker_init_fn=_ignore_ctrl_c,
        )

    def val_dataloader(self) -> DataLoader | list[Any]:
        if self.test_data is None:
            return []
        return DataLoader(
            self.test_data,
            batch_size=self.config.batch_size,
            num_workers=self.config.workers,
            worker_init_fn=_ignore_ctrl_c,
        )


def _ignore_ctrl_c(worker: int) -> None:
    """A terminal's Ctrl-C reaches the processes that load data too, and the run needs them for the step it finishes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
