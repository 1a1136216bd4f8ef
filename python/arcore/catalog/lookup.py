"""Looks systems and presets up by name, and makes models."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from arcore.catalog.discovery import Entry, Place, catalog
from arcore.catalog.system import KINDS, PresetFacts
from arcore.nn.checks import check_number, check_text, check_whole
from arcore.nn.kinds import check_kinds

NAMES_SHOWN = 20


@dataclass(frozen=True)
class PresetInfo:
    """A named configuration.

    Attributes:
        name: what `create_model` takes.
        parameters: number of parameters.
        summary: one sentence.
        config: the configuration.
        tokenizer: preset of the tokenizer that the model was made for, or None.
    """

    name: str
    parameters: int
    summary: str
    config: Any
    tokenizer: str | None

    @property
    def size(self) -> str:
        """The number of parameters for people, e.g. `"1.2 M"`."""
        for unit, factor in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
            if self.parameters >= factor:
                value = self.parameters / factor
                return f"{value:.1f} {unit}" if value < 100 else f"{value:.0f} {unit}"
        return str(self.parameters)


@dataclass(frozen=True)
class ModelInfo:
    """What there is to know about a system.

    Attributes:
        name: e.g. `"var"`.
        title: as the paper writes it.
        paper: e.g. `"arXiv:2404.02905"`.
        paper_title: the paper's whole title, or None.
        url: address of the paper.
        topic: what it is about, e.g. `"next_scale"`.
        kind: one of `arcore.catalog.KINDS`, e.g. `"model"`.
        recipe: what trains and samples it, e.g. `"next_scale"`, or None.
        builds_on: names of systems that the paper builds on.
        ops: ops of `arcore.ops` that it runs on.
        summary: one sentence.
        claim: what the check of the paper's claim shows.
        checked_on: what that was checked on.
        reported: numbers of the paper and what they were measured on, or None.
        model: the class, called with a config; None where the system has no network.
        path: source file.
        line: line of the class, or of the declaration where there is no class.
        presets: in the order of the file.
    """

    name: str
    title: str
    paper: str
    paper_title: str | None
    url: str
    topic: str
    kind: str
    recipe: str | None
    builds_on: tuple[str, ...]
    ops: tuple[str, ...]
    summary: str
    claim: str
    checked_on: str
    reported: str | None
    model: type[nn.Module] | None
    path: Path
    line: int
    presets: tuple[PresetInfo, ...]


class Found(NamedTuple):
    """A system, and the preset where its name was given."""

    entry: Entry
    preset: str | None


def create_model(
    name: str, *, weights: str | os.PathLike[str] | None = None, stored: bool = False, **overrides: Any
) -> nn.Module:
    """Make a model or tokenizer of the zoo.

    Args:
        name: a preset, e.g. `"var_tiny"`; `list_models()` has them all. With weights that have a config.json beside
            them also a system, e.g. `"mamba"`: then the config is read from there.
        weights: file or folder to load, see `arcore.models.load_weights`; `"file.pt#ema"` takes the entry `ema` of a
            file that holds several tables; `"hub"` fetches what the preset's authors have published. None leaves
            random weights.
        stored: keep the 8- and 4-bit blocks of a GGUF file as they are stored, for inference; see `load_weights`.
        **overrides: fields of the preset's config to change, e.g. `num_classes=5`.

    Returns:
        The module, on the CPU, in training mode.

    Raises:
        TypeError: `name` is no text, or `weights` no path.
        ValueError: unknown name (the message suggests close ones), unknown or unfit override, unfit weights.
        FileNotFoundError: `weights` does not exist.
        OSError: weights on the hub cannot be fetched; the message names the files.
        ImportError: a package that the weights need is missing.
    """
    if weights is not None and not isinstance(weights, str | os.PathLike):
        raise TypeError(f"expected weights to be the path of a file or folder but got {_kind(weights)}")
    if stored and weights is None:
        raise ValueError("expected weights, a GGUF file, together with stored=True but got none")
    if weights == "hub":
        from arcore.catalog.hub import fetch

        weights = fetch(name)
    entry, preset = find(name)
    if preset is None and weights is not None and entry.system.model is not None:
        from arcore.catalog.checkpoints import config_beside

        config = _replace(name, config_beside(entry, weights), overrides)
    else:
        config = get_config(name, **overrides)
    model: Any = model_class(entry)
    if weights is None:
        module: nn.Module = model(config)
        return module
    from arcore.catalog.checkpoints import load_weights

    # Random initial weights of a large model take long and would be thrown away.
    with torch.device("meta"):
        module = model(config)
    load_weights(module, weights, stored=stored)
    return module


def get_config(name: str, **overrides: Any) -> Any:
    """The config of a preset, with some fields replaced.

    Raises:
        TypeError: `name` is no text.
        ValueError: unknown preset, unknown field (the message suggests close ones), or a value that the config refuses.
    """
    entry, preset = find(name)
    if preset is None:
        if not entry.presets:
            raise ValueError(
                f"{name!r} has no presets: it is {KINDS[entry.system.kind]}; `arcore zoo {name}` tells what it does"
            )
        raise ValueError(
            f"{name!r} is a system, not a preset: choose one of {', '.join(sorted(entry.presets))}"
        )
    return _replace(name, load(entry.presets[preset], preset)(), overrides)


def _replace(name: str, config: Any, overrides: dict[str, Any]) -> Any:
    known = {field.name for field in dataclasses.fields(config)}
    for field in overrides:
        if field not in known:
            raise ValueError(f"{name} has no setting {field!r}{hint(field, known, f'zoo {name}')}")
    try:
        kinds = get_type_hints(type(config)) if overrides else {}
    except NameError:  # a kind that is imported for type checkers alone
        kinds = {}
    for field, value in overrides.items():
        _check_setting(field, value, kinds.get(field))
    return dataclasses.replace(config, **overrides)


def _check_setting(name: str, value: Any, kind: Any) -> None:
    """Refuse a number, a text or a flag that is none; what a config makes of other kinds is its own.

    Raises:
        TypeError: it is of another kind.
    """
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if len(parts) - (type(None) in parts) != 1 or (value is None and type(None) in parts):
        return
    wanted = next(part for part in parts if part is not type(None))
    if wanted is int:
        check_whole(name, value, -sys.maxsize)
    elif wanted is float:
        check_number(name, value)
    elif wanted is bool and not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False but got {value!r}")
    elif wanted is str:
        check_text(name, value)


def list_models(
    pattern: str = "*", *, topic: str | None = None, kind: str | None = None, recipe: str | None = None
) -> list[str]:
    """Names of presets, sorted.

    Args:
        pattern: with shell wildcards, e.g. `"*_tiny"`.
        topic: only of systems of this topic, e.g. `"next_scale"` or `"tokenizers"`.
        kind: only of systems of this kind, e.g. `"model"`.
        recipe: only of systems that this recipe trains, e.g. `"language"`.

    Raises:
        TypeError: an argument is no text.
        ValueError: no system has that topic or recipe, or there is no such kind.
    """
    if not isinstance(pattern, str):
        raise TypeError(f"expected pattern to be a text such as '*_tiny' but got {_kind(pattern)}")
    names = [
        preset
        for name in list_systems(topic=topic, kind=kind, recipe=recipe)
        for preset in catalog()[name].presets
    ]
    return sorted(fnmatch.filter(names, pattern))


def list_systems(
    *, topic: str | None = None, kind: str | None = None, recipe: str | None = None
) -> list[str]:
    """Names of systems, sorted; arguments and errors are those of `list_models`."""
    wanted = {"topic": topic, "kind": kind, "recipe": recipe}
    every = catalog()
    for field, value in wanted.items():
        known = {getattr(entry.system, field) for entry in every.values()} - {None}
        if field == "kind":
            known |= set(KINDS)
        if value is not None and not isinstance(value, str):
            raise TypeError(f"expected {field} to be a text but got {_kind(value)}")
        if value is not None and value not in known:
            raise ValueError(f"there is no {field} {value!r}{hint(value, known)}")
    return [
        name
        for name, entry in every.items()
        if all(value in (None, getattr(entry.system, field)) for field, value in wanted.items())
    ]


def model_info(name: str) -> ModelInfo:
    """What there is to know about a system.

    Args:
        name: of a system (`"var"`) or of one of its presets.

    Raises:
        TypeError: `name` is no text.
        ValueError: unknown name (the message suggests close ones).
    """
    return _system_info(find(name).entry.system.name)


@cache
def _system_info(name: str) -> ModelInfo:
    entry = catalog()[name]
    system, source = entry.system, entry.source
    facts: dict[str, Any] = {
        field.name: getattr(system, field.name, None) for field in dataclasses.fields(ModelInfo)
    }
    facts["model"] = model_class(entry) if system.model else None
    facts["path"], facts["line"] = source.path, source.line
    facts["presets"] = tuple(_preset_info(entry, preset) for preset in entry.presets)
    return ModelInfo(**facts)


def find(name: str) -> Found:
    """The system of that name, or of the preset of that name.

    Raises:
        TypeError: `name` is no text.
        ValueError: unknown name; the message suggests close ones among systems, presets, titles and arXiv ids.
    """
    if not isinstance(name, str):
        raise TypeError(f"expected the name of a preset or system, such as 'var_tiny', but got {_kind(name)}")
    every = catalog()
    if name in every:
        return Found(every[name], None)
    for entry in every.values():
        if name in entry.presets:
            return Found(entry, name)
    known = {name for entry in every.values() for name in (entry.system.name, *entry.presets)}
    titles = {entry.system.title: entry.system.name for entry in every.values()}
    papers = {entry.system.paper.removeprefix("arXiv:"): entry.system.name for entry in every.values()}
    for others in (titles, papers):
        close = difflib.get_close_matches(name.removeprefix("arXiv:"), others, n=1, cutoff=0.85)
        if close and not difflib.get_close_matches(name, known, n=1, cutoff=0.8):
            raise ValueError(f"there is no model {name!r}; {close[0]} is the system {others[close[0]]!r}")
    raise ValueError(f"there is no model {name!r}{hint(name, known)}")


@check_kinds
def search(words: str = "") -> list[Entry]:
    """Systems by name, preset, title, arXiv number, topic, kind, or words about them.

    Args:
        words: an exact name, title or number comes first, then a paper's title or a part of it, misprints allowed; else
            every word must occur somewhere in what the system says about itself. Case does not matter. Nothing finds
            all.

    Returns:
        Sorted by name, at least one.

    Raises:
        ValueError: nothing fits; the message suggests close names, titles and numbers.
    """
    every = list(catalog().values())
    wanted = " ".join(words.split()).casefold()
    if not wanted:
        return every
    # As addresses and references write it: 2404.02905v2, arxiv.org/pdf/2404.02905.pdf.
    number = re.sub(r"(?<=\d)(v\d+)?(\.pdf)?$", "", wanted.removeprefix("arxiv:").rpartition("/")[2])
    # A DOI keeps its slash; addresses of doi.org end with one.
    doi = wanted.removeprefix("https://").removeprefix("doi.org/").removeprefix("doi:")
    exact: list[Callable[[Entry], bool]] = [
        lambda entry: wanted == entry.system.name or wanted in entry.presets,
        lambda entry: wanted == entry.system.title.casefold(),
        lambda entry: entry.system.paper.rpartition(":")[2].casefold() in (number, doi),
        lambda entry: wanted in (entry.system.topic, entry.system.kind),
    ]
    for fits in exact:
        if found := [entry for entry in every if fits(entry)]:
            return found
    if found := _by_paper_title(wanted, every):
        return found
    found = [entry for entry in every if all(word in _about(entry) for word in wanted.split())]
    if found:
        return found
    known = {text: text for entry in every for text in (entry.system.name, *entry.presets)}
    for entry in every:
        known[entry.system.title.casefold()] = entry.system.title
        known[entry.system.paper.removeprefix("arXiv:").casefold()] = entry.system.paper
        known |= {text: text for text in (entry.system.topic, entry.system.kind)}
    close = [known[text] for text in difflib.get_close_matches(number, known, n=3, cutoff=0.6)]
    if not close:
        # A method that some system's text names: the words that occur nowhere, and those that are like them.
        texts = [_about(entry) for entry in every]
        spoken = {word for text in texts for word in re.findall(r"[a-z][\w+-]{2,}", text)}
        strange = [word for word in wanted.split() if not any(word in text for text in texts)]
        close = [
            near for word in strange for near in difflib.get_close_matches(word, spoken, n=2, cutoff=0.75)
        ]
    end = f"; did you mean {' or '.join(dict.fromkeys(close))}?" if close else "; `arcore zoo` lists all"
    raise ValueError(f"nothing in the zoo fits {words!r}{end}")


def _by_paper_title(wanted: str, every: list[Entry]) -> list[Entry]:
    """Those whose paper's title holds these words in a row, or is nearly them; fewer than four words are no title."""
    words = re.findall(r"\w+", wanted)
    if len(words) < 4:
        return []
    text = " ".join(words)
    titles = {
        entry.system.name: " ".join(re.findall(r"\w+", (entry.system.paper_title or "").casefold()))
        for entry in every
    }
    if not any(text in title for title in titles.values()):
        near = difflib.get_close_matches(text, titles.values(), n=1, cutoff=0.85)
        text = near[0] if near else "\0"
    return [entry for entry in every if text in titles[entry.system.name]]


def _about(entry: Entry) -> str:
    system = entry.system
    parts = [system.name, system.title, system.paper, system.topic, system.kind]
    parts += [text for text in (system.recipe, system.paper_title) if text]
    return " ".join((*parts, system.summary, system.claim, entry.doc, *entry.presets)).casefold()


def load(place: Place, name: str) -> Any:
    """What stands at a place, imported."""
    return getattr(importlib.import_module(place.module), name)


def model_class(entry: Entry) -> type[nn.Module]:
    """The class of a system's network, imported.

    Raises:
        ValueError: the system has none.
    """
    name = entry.system.model
    if name is None:
        raise ValueError(
            f"{entry.system.name!r} has no network: it is {KINDS[entry.system.kind]}; "
            f"`arcore zoo {entry.system.name}` tells what it does"
        )
    found: type[nn.Module] = load(entry.classes[name], name)
    return found


def class_named(name: str, module: str, *, topic: str | None = None) -> Any:
    """A public class of a system's file, imported.

    Raises:
        AttributeError: no system has it, or several have.
    """
    if name.startswith("_"):
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    places = [place for system, place in _classes(topic).get(name, {}).items() if system]
    if len(places) == 1:
        return load(places[0], name)
    if places:
        modules = " or ".join(place.module for place in places)
        raise AttributeError(f"several systems have a class {name!r}: import it from {modules}")
    raise AttributeError(f"module {module!r} has no attribute {name!r}{hint(name, class_names(topic=topic))}")


def class_names(*, topic: str | None = None) -> list[str]:
    """Names of the public classes of all systems, sorted."""
    return sorted(_classes(topic))


@cache
def _classes(topic: str | None) -> dict[str, dict[str, Place]]:
    found: dict[str, dict[str, Place]] = {}
    for entry in catalog().values():
        if topic in (None, entry.system.topic):
            for name, place in entry.classes.items():
                found.setdefault(name, {})[entry.system.name] = place
    return found


class _NotFilled(TorchFunctionMode):
    """Leaves out what fills weights: there are no values on the meta device, and pretending takes most of the time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init" or func in _FILLS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


_FILLS = frozenset({torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.zero_, torch.Tensor.fill_})


def _preset_info(entry: Entry, name: str) -> PresetInfo:
    place = entry.presets[name]
    function = load(place, name)
    facts: PresetFacts = function.preset
    config = function()
    model: Any = model_class(entry)
    with torch.device("meta"), _NotFilled():
        module = model(config)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return PresetInfo(name, parameters, place.summary, config, facts.tokenizer)


def hint(name: str, known: Iterable[str], listed: str = "zoo") -> str:
    """The end of a message about an unknown name: close ones, or which there are, or the command that lists them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    if len(names) <= NAMES_SHOWN:
        return f"; choose one of {', '.join(names)}"
    return f"; `arcore {listed}` lists what there is"


def _kind(value: object) -> str:
    return "None" if value is None else f"the {type(value).__name__} {value!r}"
