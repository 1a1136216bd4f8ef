"""Reads weight files and loads them strictly."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from arcore._optional import require

StateDict = dict[str, Tensor]


def read_state_dict(path: str | os.PathLike[str]) -> StateDict:
    """Tensors of a .safetensors, .pth or .pt file, on the CPU; the latter are read with weights_only=True.

    Raises:
        FileNotFoundError: `path` does not exist.
        ValueError: the file is damaged, of another kind, or holds something else than a state dict.
    """
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f"the weights {file} do not exist")
    if file.suffix == ".safetensors":
        safetensors = require("safetensors.torch", "zoo")
        try:
            state: Any = safetensors.load_file(file)
        except (require("safetensors", "zoo").SafetensorError, OSError) as error:
            raise ValueError(f"the weights {file} are damaged ({error}); fetch or copy them again") from error
        return dict(state)
    if file.suffix not in (".pth", ".pt", ".bin", ".ckpt"):
        raise ValueError(f"expected weights as .safetensors, .pth, .pt, .bin or .ckpt but got {file.name}")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"the weights {file} are damaged or not a plain state dict ({reason})") from error
    return _unwrap(state, file)


def _unwrap(state: Any, file: Path) -> StateDict:
    """The innermost state dict: trainers nest it under names of their own."""
    while isinstance(state, dict):
        if state and all(isinstance(value, Tensor) for value in state.values()):
            return state
        inner = [state[key] for key in ("trainer", "var_wo_ddp", "model", "module", "state_dict") if key in state]
        if not inner:
            break
        state = inner[0]
    raise ValueError(f"the weights {file} hold no state dict (a mapping from names to tensors)")


def load_weights(model: nn.Module, path: str | os.PathLike[str], *, name: str) -> None:
    """Loads a file or a checkpoint folder into `model`; every tensor must find its place.

    A folder holds `<name>.safetensors` or `model.safetensors`. If the model has `from_official(state)`, it renames or
    drops the tensors of official checkpoints first.

    Raises:
        FileNotFoundError: `path` does not exist, or the folder holds no such file.
        ValueError: the file is damaged, or names or shapes differ; the message lists the first few.
    """
    file = Path(path)
    if file.is_dir():
        candidates = [file / f"{name}.safetensors", file / "model.safetensors"]
        found = [c for c in candidates if c.exists()]
        if not found:
            raise FileNotFoundError(f"{file} holds neither {candidates[0].name} nor {candidates[1].name}")
        file = found[0]
    state = read_state_dict(file)
    convert = getattr(model, "from_official", None)
    if convert is not None:
        state = convert(state)
    expected = {key: value.shape for key, value in model.state_dict().items()}
    problems = [f"{key} is missing" for key in expected if key not in state]
    problems += [f"{key} is not part of the model" for key in state if key not in expected]
    problems += [
        f"{key} is {tuple(state[key].shape)} in the file but {tuple(shape)} in the model"
        for key, shape in expected.items()
        if key in state and state[key].shape != shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"the weights {file} do not fit {name}: {'; '.join(problems[:3])}{more}")
    model.load_state_dict(state, strict=True)
