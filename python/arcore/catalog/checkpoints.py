"""Modules to files and back.

A checkpoint is a folder that appears whole or not at all:

    config.json            which system each module is, with its config, and whatever the writer adds
    <module>.safetensors   weights of each module
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from arcore._files import atomic_folder
from arcore._optional import require
from arcore.catalog.discovery import Entry, catalog
from arcore.catalog.gguf import GGUF
from arcore.catalog.lookup import find, load, model_class

CONFIG = "config.json"
INDEX = ".index.json"
GGUF_SUFFIX = ".gguf"
PUBLISHED = (
    "model.safetensors",
    f"model.safetensors{INDEX}",
    "pytorch_model.bin",
    f"pytorch_model.bin{INDEX}",
)
NAMES_SHOWN = 3


def describe(module: nn.Module) -> dict[str, Any]:
    """A JSON-ready description from which `build` makes the module again, with other weights.

    Raises:
        TypeError: the module is no system of the zoo.
    """
    config: Any = getattr(module, "config", None)
    kind = type(module)
    for entry in catalog().values():
        if entry.system.model == kind.__qualname__ and entry.source.module == kind.__module__:
            return {"system": entry.system.name, "config": dataclasses.asdict(config)}
    raise TypeError(f"expected a model or tokenizer of the zoo but got {type(module).__name__}")


def build(description: Mapping[str, Any]) -> nn.Module:
    """The module that `describe` described, with random weights.

    Raises:
        ValueError: unknown system, or a config that does not fit it.
    """
    try:
        entry, fields = find(description["system"]).entry, dict(description["config"])
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"expected a description with 'system' and 'config' but got {dict(description)}"
        ) from error
    model: Any = model_class(entry)
    # Any preset's config has the class of the system's configs.
    name, place = next(iter(entry.presets.items()))
    config_class = type(load(place, name)())
    known = {field.name for field in dataclasses.fields(config_class)}
    unknown = sorted(set(fields) - known)
    if unknown:
        raise ValueError(f"the config of {entry.system.name} has unknown settings: {_some(unknown)}")
    try:
        config = config_class(**{name: _tuples(value) for name, value in fields.items()})
    except TypeError as error:
        raise ValueError(f"the config of {entry.system.name} does not fit: {error}") from error
    module: nn.Module = model(config)
    return module


def save_checkpoint(
    folder: str | os.PathLike[str], modules: Mapping[str, nn.Module], meta: Mapping[str, Any] | None = None
) -> None:
    """Write modules of the zoo into a folder.

    Args:
        folder: an older checkpoint there is replaced as a whole.
        modules: by name, e.g. `{"model": model, "tokenizer": tokenizer}`.
        meta: JSON-ready entries to add to config.json.

    Raises:
        TypeError: a module is no system of the zoo.
        ValueError: `meta` has an entry "modules".
        OSError: the folder cannot be written.
        ImportError: safetensors is missing.
    """
    save_file = require("safetensors.torch", extra="zoo").save_file
    if meta and "modules" in meta:
        raise ValueError("meta must not have an entry 'modules': it describes the modules")
    content = {"modules": {name: describe(module) for name, module in modules.items()}, **(meta or {})}
    text = json.dumps(content, indent=2) + "\n"
    with atomic_folder(folder) as temporary:
        for name, module in modules.items():
            state = {key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()}
            save_file(state, temporary / f"{name}.safetensors")
        (temporary / CONFIG).write_text(text, encoding="utf-8")


def load_checkpoint(folder: str | os.PathLike[str]) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    """Rebuild the modules of a checkpoint folder.

    Returns:
        The modules by name, on the CPU, in training mode; and config.json without its entry "modules".

    Raises:
        FileNotFoundError: the folder or its config.json does not exist.
        ValueError: a file is damaged or does not fit (named).
        ImportError: safetensors is missing.
    """
    folder = Path(folder)
    content = _read_config(folder)
    modules = {}
    for name, description in content.pop("modules").items():
        try:
            with torch.device("meta"):
                modules[name] = build(description)
        except ValueError as error:
            raise ValueError(f"the checkpoint file {folder / CONFIG} does not fit: {error}") from error
        load_weights(modules[name], folder / f"{name}.safetensors")
    return modules, content


def load_weights(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load weights into a module of the zoo, all of them or none.

    Args:
        module: receives the weights; may be on the meta device.
        path: one of
            a `.safetensors` file;
            a file of `torch.save` (`.pth`, `.pt`, ...), read with `weights_only=True`: ours, or as the authors of the
            paper publish it, model file or trainer file;
            a checkpoint folder, of which the module of the same system is taken;
            a folder as model hubs have it, with model.safetensors or pytorch_model.bin, in one piece or with an index.

    Raises:
        FileNotFoundError: `path` does not exist.
        ValueError: the file is damaged, or its names, shapes or dtypes do not fit; the message names the file.
        ImportError: safetensors is needed and missing.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"the weights {path} do not exist")
    if path.is_dir():
        path = _published_file(path) or _file_for(module, path)
    state = _read_state(path, getattr(module, "official_entry", None))
    expected = module.state_dict()
    convert = getattr(module, "from_official", None)
    if convert is not None and state.keys() != expected.keys():
        try:
            renamed = convert(state)
        except ValueError as error:
            raise ValueError(f"the weights {path} do not fit: {error}") from error
        # Of our own names, renaming loses some: then the file is ours, and its faults are reported by our names.
        if len(renamed.keys() & expected.keys()) > len(state.keys() & expected.keys()):
            state = renamed
    _check_fit(path, state, expected)
    # With assign a module on the meta device becomes real; dtypes stay those of the module.
    cast = {key: value.to(expected[key].dtype) for key, value in state.items()}
    module.load_state_dict(cast, strict=True, assign=any(value.is_meta for value in expected.values()))


def _published_file(folder: Path) -> Path | None:
    """The weights in a folder as model hubs have it; None when it is none, or a checkpoint of ours."""
    if (folder / CONFIG).is_file() and "modules" in _read_json(folder / CONFIG):
        return None
    return next((folder / name for name in PUBLISHED if (folder / name).is_file()), None)


def config_beside(entry: Entry, path: str | os.PathLike[str]) -> Any:
    """The config that lies beside weights: of our checkpoint, or of a published model where the system can read it.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: it is damaged, of another system, or cannot be read by this one.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    if not path.exists():
        raise FileNotFoundError(f"the weights {path} do not exist")
    official_config = getattr(model_class(entry), "official_config", None)
    if path.suffix == GGUF_SUFFIX and official_config is not None:
        return official_config(GGUF(path).config())
    if (folder / CONFIG).is_file() and official_config is not None:
        content = _read_json(folder / CONFIG)
        if "modules" not in content:
            try:
                return official_config(content)
            except KeyError as error:
                raise ValueError(f"the config {folder / CONFIG} has no {error}") from error
            except (TypeError, ValueError) as error:
                raise ValueError(f"the config {folder / CONFIG} does not fit: {error}") from error
    modules = _read_config(folder)["modules"].values()
    fitting = [
        found for found in modules if isinstance(found, dict) and found.get("system") == entry.system.name
    ]
    if len(fitting) != 1:
        raise ValueError(
            f"expected one module of the system {entry.system.name!r} in {folder / CONFIG} but it has {len(fitting)}"
        )
    with torch.device("meta"):
        module: Any = build(fitting[0])
    return module.config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"the file {path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"the file {path} is damaged: it holds no table")
    return content


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no checkpoint: {path} does not exist")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content["modules"], dict):
            raise TypeError("'modules' is no table")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the checkpoint file {path} is damaged: {error}") from error
    return dict(content)


def _file_for(module: nn.Module, folder: Path) -> Path:
    wanted = describe(module)["system"]
    modules = _read_config(folder)["modules"]
    fitting = [
        name for name, entry in modules.items() if isinstance(entry, dict) and entry.get("system") == wanted
    ]
    if len(fitting) != 1:
        raise ValueError(
            f"expected one module of the system {wanted!r} in the checkpoint {folder} but it has {len(fitting)}; "
            "give the path of its .safetensors file"
        )
    return folder / f"{fitting[0]}.safetensors"


def _read_state(path: Path, official_entry: str | None) -> dict[str, Tensor]:
    """The tensors of a file by name, on the CPU."""
    if not path.is_file():
        raise FileNotFoundError(f"the weights {path} do not exist")
    if path.name.endswith(INDEX):
        table = _read_json(path).get("weight_map")
        if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
            raise ValueError(f"the file {path} is damaged: it has no table 'weight_map'")
        state: dict[str, Tensor] = {}
        for name in sorted(set(table.values())):
            # Nothing but files of this folder: an index must not point elsewhere.
            state |= _read_state(path.parent / Path(name).name, official_entry)
        return state
    if path.suffix == GGUF_SUFFIX:
        return GGUF(path).state()
    if path.suffix == ".safetensors":
        safetensors = require("safetensors.torch", extra="zoo")
        try:
            return dict(safetensors.load_file(path))
        except (require("safetensors", extra="zoo").SafetensorError, OSError) as error:
            raise _damaged(path, error) from error
    try:
        if zipfile.is_zipfile(path):
            # torch.load does not look at checksums.
            with zipfile.ZipFile(path) as archive:
                bad = archive.testzip()
            if bad is not None:
                raise zipfile.BadZipFile(f"wrong checksum of {bad}")
        # Trainers store their command line beside the weights: a Namespace, which holds plain values and runs no code.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            # Hints about the format of a file that will be refused, or is fine.
            warnings.simplefilter("ignore", UserWarning)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"the weights {path} are damaged or hold more than tensors and plain values, which is not read because "
            f"it could run code: {_first_line(error)}"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise _damaged(path, error) from error
    for name in (official_entry or "").split("."):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if (
        not isinstance(content, dict)
        or not content
        or not all(isinstance(v, Tensor) for v in content.values())
    ):
        raise ValueError(f"the weights {path} are no table of tensors by name")
    return content


def _check_fit(path: Path, state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    both = [key for key in expected if key in state]
    shapes = [
        f"{key} is {tuple(state[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in both
        if state[key].shape != expected[key].shape
    ]
    dtypes = [
        f"{key} is {str(state[key].dtype).removeprefix('torch.')}"
        for key in both
        if state[key].is_floating_point() != expected[key].is_floating_point()
    ]
    faults = [
        f"{len(found)} {what} ({_some(found)})"
        for found, what in (
            (missing, "missing"),
            (unexpected, "unexpected"),
            (shapes, "of another shape"),
            (dtypes, "of another kind of dtype"),
        )
        if found
    ]
    if faults:
        raise ValueError(
            f"the weights {path} do not fit the model: {', '.join(faults)}; "
            "choose the preset, or the overrides, that they were made for"
        )


def _tuples(value: Any) -> Any:
    """JSON knows lists only; configs hold tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:NAMES_SHOWN])
    return shown if len(names) <= NAMES_SHOWN else f"{shown}, ..."


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _damaged(path: Path, error: BaseException) -> ValueError:
    return ValueError(f"the weights {path} are damaged or truncated: {_first_line(error)}")
