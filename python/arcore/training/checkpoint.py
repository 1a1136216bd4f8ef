"""Checkpoints of a run: folders that appear whole or not at all.

run/step-00000500/config.json            what the networks are, the settings of the run, the step
run/step-00000500/<network>.safetensors  weights
run/step-00000500/optimizer.pt           optimiser and precision state, read with weights_only=True
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.io import CheckpointIO
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from arcore._files import atomic_folder

CONFIG = "config.json"
OPTIMIZER = "optimizer.pt"
_STEP = re.compile(r"step-(\d{8,})")


def step_folder(run: Path, step: int) -> Path:
    return run / f"step-{step:08}"


def _steps(run: Path) -> list[Path]:
    """Complete checkpoints of a run folder, oldest first."""
    found = [path for path in run.iterdir() if _STEP.fullmatch(path.name) and (path / CONFIG).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def newest(run: Path) -> Path | None:
    """The newest checkpoint of a run folder, if there is one."""
    steps = _steps(run) if run.is_dir() else []
    return steps[-1] if steps else None


def find(path: str | Path) -> Path:
    """The checkpoint folder that `path` means: itself, or the newest one of a run folder.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(path)
    if (path / CONFIG).is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"the checkpoint {path} does not exist (expected a folder)")
    found = newest(path)
    if found is None:
        raise FileNotFoundError(
            f"{path} holds no checkpoint: expected {CONFIG} or folders named step-00000500 in it"
        )
    return found


def read_meta(folder: Path) -> dict[str, Any]:
    """Contents of a checkpoint's config.json.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / CONFIG
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(meta["step"], int):
            raise TypeError("fields of the wrong kind")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"the checkpoint file {path} is damaged ({error}): use another checkpoint"
        ) from error
    return meta


def read_weights(folder: Path, name: str) -> dict[str, Tensor]:
    """Weights of one network of a checkpoint, on the CPU.

    Raises:
        ValueError: the file is missing, truncated or damaged.
    """
    path = folder / f"{name}.safetensors"
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"the checkpoint file {path} is damaged ({error}): use another checkpoint"
        ) from error


def read_weights_of(folder: Path, name: str, module: nn.Module) -> dict[str, Tensor]:
    """Like `read_weights`, for a network that has to fit.

    Raises:
        ValueError: the weights are damaged or have other names or shapes than the network.
    """
    weights = read_weights(folder, name)
    expected = module.state_dict()
    for key in dict.fromkeys([*expected, *weights]):
        there = tuple(weights[key].shape) if key in weights else "missing"
        here = tuple(expected[key].shape) if key in expected else "missing"
        if there != here:
            raise ValueError(
                f"the checkpoint {folder} belongs to another model: {name}.{key} is {there} in the checkpoint "
                f"but {here} in the model"
            )
    return weights


def read_optimizer(folder: Path) -> dict[str, Any]:
    """Optimiser state of a checkpoint, on the CPU.

    Raises:
        ValueError: the file is missing (weights-only checkpoint), truncated or damaged.
    """
    path = folder / OPTIMIZER
    if not path.exists():
        raise ValueError(f"{folder} holds weights only, without {OPTIMIZER}: training cannot resume from it")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"the checkpoint file {path} is damaged ({reason}): use another checkpoint"
        ) from error


def write(
    folder: Path,
    weights: dict[str, dict[str, Tensor]],
    meta: dict[str, Any],
    optimizer: dict[str, Any] | None,
    files: Mapping[str, str] | None = None,
) -> None:
    """Write a checkpoint under a temporary name and rename it, so that a half-written one is never seen.

    Args:
        folder: final place; an older checkpoint there is replaced.
        weights: state dict of each network.
        meta: contents of config.json.
        optimizer: optimiser state; None writes weights only.
        files: further texts by file name.
    """
    with atomic_folder(folder) as temporary:
        for name, state in weights.items():
            tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
            save_file(tensors, temporary / f"{name}.safetensors")
        if optimizer is not None:
            torch.save(optimizer, temporary / OPTIMIZER)
        for name, text in (files or {}).items():
            (temporary / name).write_text(text, encoding="utf-8")
        (temporary / CONFIG).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


class FolderCheckpointIO(CheckpointIO):
    """Teaches Lightning the folder format.

    Args:
        task: the task that is trained; names the networks.
    """

    def __init__(self, task: Any) -> None:
        self.task = task

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        state = checkpoint.pop("state_dict")
        weights = {
            name: {key[len(name) + 1 :]: value for key, value in state.items() if key.startswith(f"{name}.")}
            for name in self.task.saved
        }
        # Lightning's own counters would make it skip batches on resume; see engine.py.
        rest = {key: value for key, value in checkpoint.items() if key not in ("loops", "callbacks")}
        write(Path(path), weights, self.task.meta() | {"step": self.task.step}, rest, self.task.files())

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = True, **_: Any
    ) -> dict[str, Any]:
        folder = Path(path)
        state: dict[str, Tensor] = {}
        for name, module in self.task.modules_to_save().items():
            weights = read_weights_of(folder, name, module)
            state |= {f"{name}.{key}": value for key, value in weights.items()}
        return {**read_optimizer(folder), "state_dict": state}

    def remove_checkpoint(self, path: Any) -> None:
        shutil.rmtree(path)


class Checkpoints(pl.Callback):
    """Writes a checkpoint every `checkpoint_every` steps and after the last, and keeps the newest only.

    Args:
        run: the run folder.
    """

    def __init__(self, run: Path) -> None:
        self.run = run

    def on_train_batch_end(
        self, trainer: pl.Trainer, task: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        config = task.config
        if (batch_idx + 1) % config.accumulate:
            return
        due = config.checkpoint_every and task.step % config.checkpoint_every == 0
        if not due and task.step != config.steps:
            return
        folder = step_folder(self.run, task.step)
        trainer.save_checkpoint(folder, weights_only=False)
        if trainer.is_global_zero:
            # Hidden folders are what a killed process left of a checkpoint that it was writing.
            for older in [*_steps(self.run), *self.run.glob(".step-*")]:
                if older != folder:
                    shutil.rmtree(older)
