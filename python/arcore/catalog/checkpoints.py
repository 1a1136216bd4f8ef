"""Modules to files and back.

A checkpoint is a folder that appears whole or not at all:

    config.json            which system each module is, with its config, and whatever the writer adds
    <module>.safetensors   weights of each module
"""

from __future__ import annotations

import argparse
import codecs
import collections
import contextlib
import dataclasses
import datetime
import importlib
import json
import os
import pickle
import re
import types
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch import Tensor, nn

from arcore._files import atomic_folder
from arcore._optional import require
from arcore.catalog.discovery import Entry, catalog
from arcore.catalog.gguf import GGUF
from arcore.catalog.lookup import find, load, model_class
from arcore.nn.block_weight import BlockWeight
from arcore.nn.checks import check_instance, check_path

CONFIG = "config.json"
INDEX = ".index.json"
GGUF_SUFFIX = ".gguf"
PUBLISHED = (
    "model.safetensors",
    f"model.safetensors{INDEX}",
    "pytorch_model.bin",
    f"pytorch_model.bin{INDEX}",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
)
WEIGHT_SUFFIXES = frozenset({".safetensors", ".pt", ".pth", ".bin", ".ckpt"})
# Entries under which files keep their table of weights, in the order in which they are tried.
WRAPPERS = (
    *("model", "state_dict", "model_state_dict", "module", "net", "network", "weights", "params"),
    *("model_ema", "ema", "ema_state_dict", "ema_model", "params_ema"),
)
# What wrappers of modules put before every name.
PREFIXES = ("module.", "model.", "net.", "network.", "ema_model.")
# Entries under which trainers keep their command line.
ARGS = ("args", "config", "cfg", "hyper_parameters")
# Entries that the config.json of a model hub has and ours has not.
HUB_KEYS = {"model_type", "architectures", "_class_name", "transformers_version", "d_model", "hidden_size"}
# Settings that change nothing about what trained weights compute.
TRAINING_ONLY = {
    "class_drop",
    "drop_path",
    "dropout",
    "gate_init",
    "restart_below",
    "teacher_forcing",
    "token_dropout",
    # Of forecasters: how training windows are cut.
    "context",
    "horizon",
}
# Settings that shapes tell, where files have other words for the same: 50277 rows padded to 50280, or 50280 rows. A
# model may also be used for longer texts than it was made for.
TOLD = {"vocab_size", "pad_vocab_size_multiple", "tie_embeddings", "head_dim", "dt_rank", "max_length"}
NAMES_SHOWN = 3
# Bytes to which torch aligns what it allocates on a CPU.
ALIGNMENT = 64


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
    check_path("folder", folder)
    check_instance("modules", modules, Mapping, "; name each, as in {'model': model}")
    if meta and "modules" in meta:
        raise ValueError("meta must not have an entry 'modules': it describes the modules")
    content = {"modules": {name: describe(module) for name, module in modules.items()}, **(meta or {})}
    text = json.dumps(content, indent=2) + "\n"
    with atomic_folder(folder) as temporary:
        for name, module in modules.items():
            # Weights in blocks are saved as the floats that they stand for.
            state = {
                key: (value.expanded() if isinstance(value, BlockWeight) else value)
                .detach()
                .cpu()
                .contiguous()
                for key, value in module.state_dict().items()
            }
            save_file(state, temporary / f"{name}.safetensors")
        (temporary / CONFIG).write_text(text, encoding="utf-8")


def save_pretrained(module: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write one module as a folder for the model hub: config.json and model.safetensors.

    Arguments and errors are those of `save_checkpoint`, which this is for one module.
    """
    save_checkpoint(folder, {"model": module})


def from_pretrained(source: str | os.PathLike[str]) -> nn.Module:
    """The module that `save_pretrained` wrote.

    Args:
        source: its folder, or `"owner/name"` on the model hub, from where the two files are fetched through the library
            `huggingface_hub`. An existing folder of that name comes first.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: see `load_checkpoint`, or it holds other modules than one.
        OSError: the hub cannot be reached; the message names the files.
        ImportError: safetensors or huggingface_hub is missing.
    """
    folder = check_path("source", source)
    if isinstance(source, str) and not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        from arcore.catalog.hub import download

        folder = download(source, ("model.safetensors", CONFIG), source).parent
    modules, _ = load_checkpoint(folder)
    if set(modules) != {"model"}:
        raise ValueError(
            f"expected one module, 'model', in {folder} but it has {', '.join(sorted(modules)) or 'none'}; "
            "arcore.models.load_checkpoint reads all of them"
        )
    return modules["model"]


def load_checkpoint(folder: str | os.PathLike[str]) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    """Rebuild the modules of a checkpoint folder.

    Returns:
        The modules by name, on the CPU, in training mode; and config.json without its entry "modules".

    Raises:
        FileNotFoundError: the folder or its config.json does not exist.
        ValueError: a file is damaged or does not fit (named).
        ImportError: safetensors is missing.
    """
    folder = check_path("folder", folder)
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


def load_weights(
    module: nn.Module, path: str | os.PathLike[str], *, entry: str | None = None, stored: bool = False
) -> None:
    """Load weights into a module of the zoo, all of them or none.

    Names may be ours or those of the paper's authors, with `module.` (DDP) or `_orig_mod.` (torch.compile) in front, in
    a table of their own or in the usual wrappers (`model`, `state_dict`, `model_ema`, `ema`, ...). The precision in
    which they are stored makes no difference; dtypes stay those of the module. What a file says about itself, in a
    stored command line or in a config.json beside it, must agree with the module's config.

    A language model gets the attribute `eos_ids`, the tokens that end a text, from what lies beside its weights.

    Args:
        module: receives the weights; may be on the meta device.
        path: one of
            a `.safetensors` file;
            a file of `torch.save` (`.pth`, `.pt`, ...), read with `weights_only=True`: ours, or as the authors of the
            paper publish it, model file or trainer file;
            a checkpoint folder, of which the module of the same system is taken;
            a folder as model hubs have it, with model.safetensors or pytorch_model.bin, in one piece or with an index.
            `FILE#ENTRY` names the entry of the file, as `entry` does.
        entry: which table of a file with several, e.g. `"ema"` or `"trainer.vae_local"`; None takes the one that the
            authors sample with, or the first of the usual ones.
        stored: keep the 8- and 4-bit blocks of a GGUF file as they are, each weight an `arcore.nn.BlockWeight`, for
            inference. Matrices that the module joins and the file stores in several kinds become floats.

    Raises:
        FileNotFoundError: `path` does not exist.
        ValueError: `stored` with another file than a GGUF file; the file is damaged, has no such entry, or its names,
            shapes, dtypes or settings do not fit; the message names the file.
        ImportError: safetensors is needed and missing.
    """
    check_instance("module", module, nn.Module)
    path, entry = _split_entry(path, entry)
    if not path.exists():
        raise FileNotFoundError(f"the weights {path} do not exist")
    beside: dict[str, Any] = {}
    if path.is_dir():
        published = _published_file(path)
        beside = _config_of(module, path)
        path = published or _file_for(module, path)
    elif path.name in PUBLISHED:
        beside = _config_of(module, path.parent)
    elif path.suffix == GGUF_SUFFIX:
        beside = _settings_of(module, path, GGUF(path).config())
    if stored and path.suffix != GGUF_SUFFIX:
        raise ValueError(
            f"the weights {path} are no GGUF file, which alone stores weights in blocks: load them without "
            "stored=True, then arcore.nn.quantise(model, 'q8_0')"
        )
    contents = GGUF(path).state(stored=True) if stored else _read_contents(path)
    args = _args_of(contents)
    _check_settings(path, module, beside)
    if args is not None and hasattr(module, "official_settings"):
        _check_settings(path, module, _read_settings(path, module, args))
    expected = module.state_dict()
    try:
        state = _fitting(
            path, module, _table(path, contents, entry, getattr(module, "official_entry", None)), expected
        )
        for name in getattr(module, "statistics", ()):
            if name not in state or state[name].shape != expected[name].shape:
                state[name] = torch.zeros(expected[name].shape, device="cpu")
        _check_fit(path, state, expected)
    except ValueError as error:
        saved = _saved_system(path)
        if saved is None or saved == _system_of(module):
            raise
        raise ValueError(f"the weights {path} were saved from the system {saved!r}: {error}") from error
    # With assign a module on the meta device becomes real; dtypes stay those of the module.
    cast = {key: value.to(expected[key].dtype) for key, value in state.items()}
    assign = stored or any(value.is_meta for value in expected.values())
    module.load_state_dict(_aligned(cast) if assign else cast, strict=True, assign=assign)
    for parameter in module.parameters() if stored else ():
        if isinstance(parameter, BlockWeight):
            parameter.requires_grad_(False)
    if hasattr(module, "prefill"):
        module.eos_ids = eos_beside(path, int(getattr(module, "vocab_size", 0)))  # type: ignore[assignment]


def _aligned(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors in memory as torch allocates it, one for each that the table has under several names.

    Those of a safetensors file lie where the file has them. Kernels add in another order where memory begins elsewhere
    in a line of cache, so a model that was loaded would differ from the saved one in the last digits.
    """
    moved: dict[tuple[Any, ...], Tensor] = {}
    found = {}
    for key, value in state.items():
        if value.is_cpu and not isinstance(value, BlockWeight) and value.data_ptr() % ALIGNMENT:
            place = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
            value = moved.setdefault(place, value.clone())
        found[key] = value
    return found


def eos_beside(path: str | os.PathLike[str], vocab_size: int) -> tuple[int, ...]:
    """The tokens that end a text, as published weights or files beside them have it.

    What a GGUF file says of itself; else `eos_token_id` of generation_config.json or config.json, or else the id that
    tokenizer.json gives to `eos_token` of tokenizer_config.json.

    Args:
        path: of the weights, or of their folder.
        vocab_size: ids from here on are left out, as the model cannot give them.

    Returns:
        Ids, possibly none.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    if path.suffix == GGUF_SUFFIX:
        end = GGUF(path).metadata.get("tokenizer.ggml.eos_token_id")
        return (int(end),) if isinstance(end, int) and 0 <= end < vocab_size else ()

    def content(name: str) -> dict[str, Any]:
        try:
            return _read_json(folder / name) if (folder / name).is_file() else {}
        except ValueError:
            return {}

    found: Any = None
    for name in ("generation_config.json", CONFIG):
        table = content(name)
        nested = table.get("text_config")
        found = table.get("eos_token_id")
        if found is None and isinstance(nested, dict):
            found = nested.get("eos_token_id")
        if found is not None:
            break
    if found is None:
        token = content("tokenizer_config.json").get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        added = content("tokenizer.json").get("added_tokens")
        found = [
            one.get("id")
            for one in (added if isinstance(added, list) else [])
            if isinstance(one, dict) and token is not None and one.get("content") == token
        ]
    ids = found if isinstance(found, list) else [found]
    return tuple(one for one in ids if type(one) is int and 0 <= one < vocab_size)


def _split_entry(path: str | os.PathLike[str], entry: str | None) -> tuple[Path, str | None]:
    """`file.pt#ema` as a path and an entry."""
    whole = check_path("path", path)
    if "#" in whole.name and not whole.exists():
        name, _, named = whole.name.rpartition("#")
        if entry is not None and entry != named:
            raise ValueError(
                f"the weights {whole} name the entry {named!r} but entry={entry!r}: give one of them"
            )
        return whole.with_name(name), named
    return whole, entry


def _published_file(folder: Path) -> Path | None:
    """The weights in a folder as model hubs have it; None when it is none, or a checkpoint of ours."""
    if (folder / CONFIG).is_file() and "modules" in _read_json(folder / CONFIG):
        return None
    known = next((folder / name for name in PUBLISHED if (folder / name).is_file()), None)
    if known is not None:
        return known
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in WEIGHT_SUFFIXES)
    if len(files) == 1:
        return files[0]
    if files:
        raise ValueError(
            f"the folder {folder} has several files of weights ({_some([path.name for path in files])}) and none of "
            "the usual names: give the path of one"
        )
    _refuse_run_folder(folder)
    if (folder / CONFIG).is_file():
        raise ValueError(
            f"the folder {folder} has a {CONFIG} as model hubs do but no weights beside it: expected "
            f"{', '.join(PUBLISHED[::2])} or one file ending in {', '.join(sorted(WEIGHT_SUFFIXES))}"
        )
    return None


def _config_of(module: nn.Module, folder: Path) -> dict[str, Any]:
    """Settings that the config.json in a folder says a module of this system was made with."""
    if not (folder / CONFIG).is_file():
        return {}
    return _settings_of(module, folder / CONFIG, _read_json(folder / CONFIG))


def _settings_of(module: nn.Module, path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that a table of a checkpoint, or of published weights, says a module of this system was made with."""
    if "modules" in content:
        modules = content["modules"]
        wanted = describe(module)["system"]
        found = [
            one.get("config")
            for one in (modules.values() if isinstance(modules, dict) else ())
            if isinstance(one, dict) and one.get("system") == wanted
        ]
        if len(found) != 1 or not isinstance(found[0], dict):
            return {}
        return {name: _tuples(value) for name, value in found[0].items()}
    read = getattr(module, "official_config", None)
    if read is None:
        return {}
    try:
        config = read(content)
    except KeyError as error:
        raise ValueError(f"the config {path} has no {error}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"the config {path} does not fit: {error}") from error
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in TOLD}


def _check_settings(path: Path, module: nn.Module, settings: Mapping[str, Any]) -> None:
    """Raise ValueError where a file says that it was made with another config."""
    config: Any = getattr(module, "config", None)
    known = (
        {field.name for field in dataclasses.fields(config)} if dataclasses.is_dataclass(config) else set()
    )
    value_of = getattr(module, "setting", lambda name: getattr(config, name))
    differing = [
        (name, value, value_of(name))
        for name, value in settings.items()
        if name in known
        and name not in TRAINING_ONLY
        # A config may leave open what a file spells out.
        and _tuples(value) not in (_tuples(value_of(name)), _tuples(getattr(config, name)))
    ]
    if differing:
        theirs = ", ".join(f"{name}={value!r}" for name, value, _ in differing)
        ours = ", ".join(f"{name}={own!r}" for name, _, own in differing)
        raise ValueError(
            f"the weights {path} were made with {theirs} but the model has {ours}: pass {theirs} to create_model"
        )


def _read_settings(path: Path, module: Any, args: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return dict(module.official_settings(args))
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"the settings stored in {path} cannot be read: {error}") from error


def _args_of(contents: Any) -> dict[str, Any] | None:
    """The command line that a trainer stored beside the weights, with plain values."""
    if not isinstance(contents, dict):
        return None
    for name in ARGS:
        args = contents.get(name)
        if isinstance(args, argparse.Namespace):
            args = vars(args)
        if isinstance(args, dict) and args and not any(isinstance(value, Tensor) for value in args.values()):
            return {str(key): _plain(value) for key, value in args.items()}
    return None


def _plain(value: Any) -> Any:
    """A number of numpy as Python's own."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def _fitting(
    path: Path, module: nn.Module, state: dict[str, Tensor], expected: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """A table under our names: as it is, without common prefixes, or renamed by the system."""
    convert = getattr(module, "from_official", None)
    best, most, refusal = state, -1, None
    for candidate in _without_prefixes(state):
        forms = [candidate]
        if convert is not None and candidate.keys() != expected.keys():
            try:
                forms.append(convert(dict(candidate)))
            except ValueError as error:
                refusal = refusal or error
        for form in forms:
            # Of our own names, renaming loses some: then the file is ours, and its faults are reported by our names.
            common = len(form.keys() & expected.keys())
            if common > most:
                best, most = form, common
        if most == len(expected):
            break
    if refusal is not None and most < len(expected) - len(getattr(module, "statistics", ())):
        raise ValueError(f"the weights {path} do not fit: {refusal}") from refusal
    return dict(best)


def _without_prefixes(state: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The table, and what is left when the names of wrappers are taken off one after the other."""
    yield state
    if any("_orig_mod." in key for key in state):
        state = {key.replace("_orig_mod.", ""): value for key, value in state.items()}
        yield state
    # torch's averages of weights count them.
    if "n_averaged" in state:
        state = {key: value for key, value in state.items() if key != "n_averaged"}
    for _ in range(len(PREFIXES)):
        prefix = next((one for one in PREFIXES if state and all(key.startswith(one) for key in state)), None)
        if prefix is None:
            return
        state = {key.removeprefix(prefix): value for key, value in state.items()}
        yield state


def config_beside(entry: Entry, path: str | os.PathLike[str]) -> Any:
    """The config that lies beside weights: of our checkpoint, or of a published model where the system can read it.

    Where the system can tell its config from the shapes of weights (`config_of`), a file alone will do.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: it is damaged, of another system, or cannot be read by this one.
    """
    path, table = _split_entry(path, None)
    folder = path if path.is_dir() else path.parent
    if not path.exists():
        raise FileNotFoundError(f"the weights {path} do not exist")
    official_config = getattr(model_class(entry), "official_config", None)
    config_of = getattr(model_class(entry), "config_of", None)
    named = path.is_dir() or path.name in PUBLISHED
    if config_of is not None and not (named and (folder / CONFIG).is_file()):
        file = _published_file(path) if path.is_dir() else path
        if file is None:
            raise FileNotFoundError(f"the folder {path} holds no weights")
        state = _table(file, _read_contents(file), table, getattr(model_class(entry), "official_entry", None))
        refusal: ValueError | None = None
        for candidate in _without_prefixes(state):
            try:
                return config_of(candidate)
            except ValueError as error:
                refusal = refusal or error
        raise ValueError(f"the weights {file} do not fit: {refusal}") from refusal
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
            f"expected one module of the system {entry.system.name!r} in {folder / CONFIG} but it has {len(fitting)} "
            f"among its {len(modules)}{_listed(modules)}"
        )
    with torch.device("meta"):
        module: Any = build(fitting[0])
    return module.config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"the file {path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"the file {path} is damaged: it holds no table")
    return content


def _refuse_run_folder(folder: Path) -> None:
    """Raise ValueError, with the name of the newest checkpoint, where a folder is that of a run."""
    steps = sorted(path for path in folder.glob("step-*") if (path / CONFIG).is_file())
    if steps:
        raise ValueError(
            f"{folder} is the folder of a run, not a checkpoint: give one in it, such as {steps[-1]}"
        )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        _refuse_run_folder(folder)
        raise FileNotFoundError(f"{folder} is no checkpoint: {path} does not exist")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and HUB_KEYS & content.keys() and "modules" not in content:
            raise _FromHub
        if not isinstance(content["modules"], dict):
            raise TypeError("'modules' is no table")
    except _FromHub:
        raise ValueError(
            f"{path} is that of a model hub, not of a checkpoint of arcore: load the weights with "
            f"create_model(NAME, weights={str(folder)!r})"
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"the checkpoint file {path} is damaged: {error}") from error
    return dict(content)


class _FromHub(Exception):
    """A config.json of published weights."""


def _saved_system(path: Path) -> str | None:
    """The system of a file of weights in a checkpoint of ours, None where nothing says it."""
    try:
        modules = json.loads((path.parent / CONFIG).read_text(encoding="utf-8"))["modules"]
        return str(modules[path.stem]["system"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def _system_of(module: nn.Module) -> str | None:
    try:
        return str(describe(module)["system"])
    except TypeError:
        return None


def _listed(modules: Iterable[Any]) -> str:
    """The systems of a checkpoint's modules, for a message."""
    names = sorted({str(m["system"]) for m in modules if isinstance(m, dict) and "system" in m})
    return f", of {', '.join(names)}" if names else ""


def _file_for(module: nn.Module, folder: Path) -> Path:
    wanted = describe(module)["system"]
    modules = _read_config(folder)["modules"]
    fitting = [
        name for name, entry in modules.items() if isinstance(entry, dict) and entry.get("system") == wanted
    ]
    if len(fitting) != 1:
        raise ValueError(
            f"expected one module of the system {wanted!r} in the checkpoint {folder} but it has {len(fitting)} "
            f"among its {len(modules)}{_listed(modules.values())}; give the path of its .safetensors file"
        )
    return folder / f"{fitting[0]}.safetensors"


def _read_contents(path: Path) -> Any:
    """What a file holds: a table of tensors, or what a trainer stored, on the CPU."""
    if not path.is_file():
        raise FileNotFoundError(f"the weights {path} do not exist")
    if path.name.endswith(INDEX):
        table = _read_json(path).get("weight_map")
        if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
            raise ValueError(f"the file {path} is damaged: it has no table 'weight_map'")
        state: dict[str, Any] = {}
        for name in sorted(set(table.values())):
            # Nothing but files of this folder: an index must not point elsewhere.
            state |= _read_contents(path.parent / Path(name).name)
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
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise ValueError(
                    f"the weights {path} are a TorchScript archive, which holds code: save its state_dict() and "
                    "give that"
                )
        with warnings.catch_warnings(), torch.serialization.safe_globals(_plain_values()):
            # Hints about the format of a file that will be refused, or is fine.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"the weights {path} are damaged or hold more than tensors and plain values, which is not read because "
            f"it could run code: {_unsafe(error)}"
        ) from error
    except (OSError, EOFError, RuntimeError, KeyError, zipfile.BadZipFile) as error:
        raise _damaged(path, error) from error
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise _damaged(path, error) from error


def _plain_values() -> list[Any]:
    """Classes of what trainers store beside weights: command lines, paths and numbers. None of them runs code."""
    values: list[Any] = [
        argparse.Namespace,
        types.SimpleNamespace,
        collections.defaultdict,
        datetime.timedelta,
    ]
    for module in ("pathlib", "pathlib._local"):
        values += [(PurePosixPath, f"{module}.{name}") for name in ("PosixPath", "PurePosixPath")] + [
            (PureWindowsPath, f"{module}.{name}") for name in ("WindowsPath", "PureWindowsPath")
        ]
    with contextlib.suppress(ImportError):
        numpy = importlib.import_module("numpy")
        multiarray = importlib.import_module("numpy._core.multiarray")
        for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            values += [
                (multiarray.scalar, f"{module}.scalar"),
                (multiarray._reconstruct, f"{module}._reconstruct"),
            ]
        values += [numpy.dtype, numpy.ndarray, (codecs.encode, "_codecs.encode")]
        values += [type(numpy.dtype(code)) for code in "?bBhHiIlLqQefdFDUS"]
    return values


def _table(path: Path, contents: Any, entry: str | None, official_entry: str | None) -> dict[str, Tensor]:
    """The tensors by name that are wanted from a file."""
    if entry is not None:
        found = _at(contents, entry)
        if found is None and isinstance(contents, dict):
            # In a flat table an entry is what the names begin with.
            dotted = f"{entry}."
            found = {
                key.removeprefix(dotted): v for key, v in contents.items() if str(key).startswith(dotted)
            }
        if not _is_table(found):
            names = [str(name) for name in _entries(contents)]
            has = f"it has {', '.join(names)}" if names else "it has no entries"
            raise ValueError(f"the weights {path} have no entry {entry!r}: {has}")
        return dict(found)
    if official_entry is not None and _is_table(found := _at(contents, official_entry)):
        return dict(found)
    for _ in range(4):
        if _is_table(contents):
            return dict(contents)
        if not isinstance(contents, dict):
            break
        contents = next((contents[name] for name in WRAPPERS if isinstance(contents.get(name), dict)), None)
    raise ValueError(f"the weights {path} are no table of tensors by name")


def _at(contents: Any, entry: str) -> Any:
    for name in entry.split("."):
        contents = contents.get(name) if isinstance(contents, dict) else None
    return contents


def _is_table(contents: Any) -> bool:
    return (
        isinstance(contents, dict)
        and bool(contents)
        and all(isinstance(v, Tensor) for v in contents.values())
    )


def _entries(contents: Any, before: str = "") -> list[str]:
    """Names of the tables of tensors in a file."""
    if not isinstance(contents, dict):
        return []
    names = []
    for name, value in contents.items():
        if _is_table(value):
            names.append(f"{before}{name}")
        elif isinstance(value, dict):
            names += _entries(value, f"{before}{name}.")
    return names


def _unsafe(error: BaseException) -> str:
    """What stood in the way, without torch's advice to switch the protection off."""
    found = re.search(
        r"(?:Unsupported global: GLOBAL|Unsupported class|Unsupported operand) ([\w.]+)", str(error)
    )
    if found is not None:
        return f"it holds {found[1]}"
    line = _first_line(error)
    return "it is no file of torch.save" if "weights_only" in line or "Weights only" in line else line


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
    reason = _first_line(error)
    if "weights_only" in str(error):
        reason = "it is in a format of old versions of torch that only reading code along could open"
    return ValueError(
        f"the weights {path} are damaged or truncated: {reason}; fetch them, or save them, anew"
    )
