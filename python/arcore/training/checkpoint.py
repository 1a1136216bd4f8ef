"""Checkpoints of a run: folders that appear whole or not at all.

run/step-00000500/config.json                what the networks are, the settings of the run, the step
run/step-00000500/<network>.safetensors      weights
run/step-00000500/<network>.ema.safetensors  their moving average, where the run keeps one
run/step-00000500/task.safetensors           tensors of the task that belong to no network
run/step-00000500/extra.pt                   state of modules that is no tensor (`get_extra_state`)
run/step-00000500/optimizer.pt               optimiser and precision state, read with weights_only=True
run/best/                                    the checkpoint with the least held-out loss, where the run keeps it
"""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import CheckpointIO
from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

from arcore._files import atomic_folder
from arcore.training.run_folder import RECORD
from arcore.training.state import is_extra, overlaps

CONFIG = "config.json"
OPTIMIZER = "optimizer.pt"
EXTRA = "extra.pt"
TASK = "task"
AVERAGE = ".ema"
BEST = "best"
_STEP = re.compile(r"step-(\d{8,})")


def step_folder(run: Path, step: int) -> Path:
    return run / f"step-{step:08}"


def step_of(folder: Path) -> int:
    """The step of a folder named by `step_folder`."""
    return int(folder.name.removeprefix("step-"))


def steps_of(run: Path) -> list[Path]:
    """Complete checkpoints of a run folder, oldest first."""
    found = [path for path in run.iterdir() if _STEP.fullmatch(path.name) and (path / CONFIG).is_file()]
    return sorted(found, key=step_of)


def newest(run: Path) -> Path | None:
    """The newest checkpoint of a run folder, if there is one."""
    steps = steps_of(run) if run.is_dir() else []
    return steps[-1] if steps else None


def begun(run: Path) -> bool:
    """Whether a run was started in this folder."""
    return (run / RECORD).is_file() or newest(run) is not None


class NoCheckpointError(FileNotFoundError, ValueError):
    """A place that was named holds no checkpoint: a missing file, and an argument that does not fit."""


def find(path: str | Path) -> Path:
    """The checkpoint folder that `path` means: itself, or the newest one of a run folder.

    Raises:
        NoCheckpointError: there is none.
    """
    path = Path(path)
    if (path / CONFIG).is_file():
        return path
    if not path.is_dir():
        raise NoCheckpointError(f"the checkpoint {path} does not exist (expected a folder)")
    found = newest(path)
    if found is None:
        raise NoCheckpointError(
            f"{path} holds no checkpoint: expected {CONFIG} or folders named step-00000500 in it"
        )
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """Contents of a checkpoint's config.json, with the table `modules`.

    Raises:
        ValueError: the file is damaged.
    """
    return _read(folder, "modules", dict)


def read_meta(folder: Path) -> dict[str, Any]:
    """Contents of the config.json of a run's checkpoint, with the number `step`.

    Raises:
        ValueError: the file is damaged.
    """
    return _read(folder, "step", int)


def _read(folder: Path, name: str, kind: type) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        meta: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(meta[name], kind):
            raise TypeError("fields of the wrong kind")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
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


def read_state_of(folder: Path, name: str, expected: Mapping[str, Any]) -> dict[str, Any]:
    """State of one network of a checkpoint, tensors and the rest, for a network that has to fit.

    Args:
        folder: the checkpoint.
        name: of the network.
        expected: the network's own state.

    Raises:
        ValueError: the state is damaged or has other names or shapes than the network's.
    """
    weights: dict[str, Any] = {}
    if name != TASK or (folder / f"{TASK}.safetensors").is_file():
        weights |= read_weights(folder, name)
    extra = _load(folder / EXTRA) if (folder / EXTRA).is_file() else {}
    weights |= {
        key.removeprefix(f"{name}/"): value for key, value in extra.items() if key.startswith(f"{name}/")
    }
    for key in dict.fromkeys([*expected, *weights]):
        there = _shape(weights[key]) if key in weights else "missing"
        here = _shape(expected[key]) if key in expected else "missing"
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
    return _load(path)


def load_average(folder: Path, networks: Mapping[str, nn.Module]) -> None:
    """Give networks the moving average of their weights.

    Raises:
        ValueError: the run kept none.
    """
    names = [name for name in networks if (folder / f"{name}{AVERAGE}.safetensors").is_file()]
    if not names:
        raise ValueError(
            f"{folder} holds no moving average of weights: train with --ema 0.999, or leave --ema out here"
        )
    for name in names:
        networks[name].load_state_dict(read_weights(folder, f"{name}{AVERAGE}"), strict=False)


def _load(path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"the checkpoint file {path} is damaged ({reason}): use another checkpoint"
        ) from error


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else "no tensor"


def check_holdable(task: Any) -> None:
    """Make sure, before a step is done, that a checkpoint can hold all state of a task.

    Raises:
        ValueError: it cannot; the message names what.
    """
    for name in task.saved:
        if not isinstance(getattr(task, name, None), nn.Module):
            raise ValueError(f"the task's `saved` names {name!r}, which is no network of it")
        if name == TASK or "/" in name:
            raise ValueError(f"a network cannot be called {name!r} in a checkpoint: rename it")
    for key, value in task.state_dict().items():
        reason = _unfit(value)
        if reason:
            raise ValueError(f"a checkpoint cannot hold {key} ({reason}): the run would not resume as it was")
    for key, parameter in task.named_parameters():
        if parameter.requires_grad and overlaps(parameter):
            raise ValueError(
                f"the parameter {key} cannot be trained: several of its elements are one place in memory (clone it)"
            )
    try:
        json.dumps(task.meta())
    except (TypeError, ValueError) as error:
        raise ValueError(f"what the task's meta() returns cannot be written as JSON: {error}") from error


def _unfit(value: Any) -> str:
    """Why a value cannot be held; empty if it can."""
    if isinstance(value, Tensor):
        if isinstance(value, nn.parameter.UninitializedParameter | nn.parameter.UninitializedBuffer):
            return "its shape is not known before the first forward"
        if value.layout is not torch.strided or value.is_quantized:
            return f"it is no dense tensor but {'a quantised one' if value.is_quantized else value.layout}"
        if value.is_meta:
            return "it has no values, on the meta device"
        try:
            save({"x": torch.empty(0, dtype=value.dtype)})
        except (SafetensorError, KeyError, ValueError, RuntimeError):
            return f"its dtype {value.dtype} has no place in a safetensors file"
        return ""
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except (pickle.PicklingError, pickle.UnpicklingError, AttributeError, TypeError, RuntimeError) as error:
        return (
            f"its extra state of type {type(value).__name__} is more than tensors and plain values: {error}"
        )
    return ""


def write(
    folder: Path,
    weights: Mapping[str, Mapping[str, Any]],
    meta: dict[str, Any],
    optimizer: dict[str, Any] | None,
    files: Mapping[str, str] | None = None,
) -> None:
    """Write a checkpoint under a temporary name and rename it, so that a half-written one is never seen.

    Args:
        folder: final place; an older checkpoint there is replaced.
        weights: state dict of each network. Tensors that share memory are written once each.
        meta: contents of config.json.
        optimizer: optimiser state; None writes weights only.
        files: further texts by file name.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    full = False
    try:
        with atomic_folder(folder) as temporary:
            try:
                _write_files(temporary, weights, meta, optimizer, files or {})
            except Exception as error:
                # Looked at now: what was written is about to go, and then there is space again.
                full = _is_full(error, temporary)
                raise
    except (OSError, SafetensorError, RuntimeError) as error:
        kept = newest(folder.parent)
        last = f"; the last checkpoint is {kept}" if kept else ""
        told = "no space is left on the disk" if full or _is_full(error, folder) else _reason(error)
        raise OSError(f"cannot write the checkpoint {folder}: {told}{last}") from error


def _write_files(
    folder: Path,
    weights: Mapping[str, Mapping[str, Any]],
    meta: Mapping[str, Any],
    optimizer: Any,
    files: Mapping[str, str],
) -> None:
    extra: dict[str, Any] = {}
    for name, state in weights.items():
        extra |= {f"{name}/{key}": value for key, value in state.items() if is_extra(key, value)}
        save_file(_tensors(state), folder / f"{name}.safetensors")
    if extra:
        torch.save(extra, folder / EXTRA)
    if optimizer is not None:
        torch.save(optimizer, folder / OPTIMIZER)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / CONFIG).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    _open_to_others(folder)


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state, on the CPU, none of which shares memory with another."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, value in state.items():
        if is_extra(key, value):
            continue
        tensor = value.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        if place in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        tensors[key] = tensor
    return tensors


def _open_to_others(folder: Path) -> None:
    """Give files the mode that the umask asks for; some writers make them private."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~mask)


def _is_full(error: BaseException, folder: Path) -> bool:
    """Whether a file could not be written for want of space; torch's writer says only that its position is off."""
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        return True
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return "unexpected pos" in str(error) or shutil.disk_usage(there).free < 2**16


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error).splitlines()[0]


class FolderCheckpointIO(CheckpointIO):
    """Teaches Lightning the folder format.

    Args:
        task: the task that is trained; names the networks.
        figures: what is collected at this moment, for the next row of the metrics.
        average: the moving average of the weights, or None.
    """

    def __init__(self, task: Any, figures: Any, average: Any = None) -> None:
        self.task, self.figures, self.average = task, figures, average

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        state = checkpoint.pop("state_dict")
        weights = _by_network(state, self.task.saved)
        if self.average is not None:
            averages = _by_network({**state, **self.average.weights()}, self.task.saved)
            trained = {key.partition(".")[0] for key in self.average.weights()}
            weights |= {f"{name}{AVERAGE}": averages[name] for name in self.task.saved if name in trained}
        # Lightning's own counters would make it skip batches on resume; see engine.py.
        rest = {key: value for key, value in checkpoint.items() if key not in ("loops", "callbacks")}
        meta = {
            **self.task.meta(),
            **self.task.run_facts,
            "step": self.task.step,
            "figures": self.figures.state(),
        }
        if not Path(path).parent.is_dir():
            raise OSError(f"cannot write the checkpoint {path}: the run folder is gone")
        write(Path(path), weights, meta, rest, self.task.files())

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = True, **_: Any
    ) -> dict[str, Any]:
        return {**read_optimizer(Path(path)), "state_dict": read_task(Path(path), self.task)}

    def remove_checkpoint(self, path: Any) -> None:
        shutil.rmtree(path)


def read_task(folder: Path, task: Any) -> dict[str, Any]:
    """State of a task from a checkpoint.

    Raises:
        ValueError: the checkpoint is damaged or belongs to another model.
    """
    state: dict[str, Any] = {}
    for name, expected in _by_network(task.state_dict(), task.saved).items():
        prefix = "" if name == TASK else f"{name}."
        found = read_state_of(folder, name, expected)
        state |= {f"{prefix}{key}": value for key, value in found.items()}
    return state


def _by_network(state: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """A task's state dict by network, and under `TASK` what belongs to none."""
    parts: dict[str, dict[str, Any]] = {name: {} for name in names}
    for key, value in state.items():
        name, _, rest = key.partition(".")
        if name in parts and rest:
            parts[name][rest] = value
        else:
            parts.setdefault(TASK, {})[key] = value
    return parts
