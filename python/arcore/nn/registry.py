"""The list of systems: what each is called, where it comes from, and which presets it has.

A system is a class whose constructor takes one frozen dataclass. It stands here, below `models` and `tokenizers`, so
that both can enter themselves; `arcore.models` looks names up.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

Class = TypeVar("Class", bound=type[nn.Module])
ConfigFunction = TypeVar("ConfigFunction", bound=Callable[[], Any])


@dataclass(frozen=True)
class Check:
    """The test of a paper's central claim.

    Attributes:
        test: pytest node id.
        claim: what it shows, one sentence.
    """

    test: str
    claim: str


@dataclass(frozen=True)
class Preset:
    """A named configuration.

    Attributes:
        name: e.g. `"var_tiny"`.
        system: name of the system.
        config: function that returns the system's config.
        summary: first line of that function's docstring.
        tokenizer: preset of the tokenizer that the model was made for, or None.
    """

    name: str
    system: str
    config: Callable[[], Any]
    summary: str
    tokenizer: str | None


@dataclass(frozen=True)
class System:
    """A published system.

    Attributes:
        name: lower case, the first part of its presets' names.
        title: as the paper writes it.
        paper: e.g. `"arXiv:2404.02905"`.
        family: what kind of system, e.g. `"next-scale"`.
        ops: names of the ops in `arcore.ops` that it runs on.
        summary: one sentence.
        check: the test of the paper's claim.
        model: the class; called with a config.
        aliases: other first parts of its presets' names, where those are published under another name.
        presets: by name, in the order of the file.
    """

    name: str
    title: str
    paper: str
    family: str
    ops: tuple[str, ...]
    summary: str
    check: Check
    model: type[nn.Module]
    aliases: tuple[str, ...] = ()
    presets: dict[str, Preset] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """The source file."""
        return Path(inspect.getfile(self.model))

    @property
    def line(self) -> int:
        """Line of the class in its file."""
        return inspect.getsourcelines(self.model)[1]


SYSTEMS: dict[str, System] = {}


def register(
    name: str,
    *,
    title: str,
    paper: str,
    family: str,
    ops: tuple[str, ...],
    summary: str,
    check: Check,
    aliases: tuple[str, ...] = (),
) -> Callable[[Class], Class]:
    """Class decorator that enters a system; the arguments are the fields of `System`."""

    def enter(model: Class) -> Class:
        if name in SYSTEMS:
            raise ValueError(f"the system {name!r} is registered twice")
        SYSTEMS[name] = System(name, title, paper, family, ops, summary, check, model, aliases)
        return model

    return enter


def preset(system: str, *, tokenizer: str | None = None) -> Callable[[ConfigFunction], ConfigFunction]:
    """Function decorator that enters a preset under the function's name, which starts with the system's or an alias."""

    def enter(function: ConfigFunction) -> ConfigFunction:
        name = function.__name__
        if not name.startswith(tuple(f"{first}_" for first in (system, *SYSTEMS[system].aliases))):
            raise ValueError(f"the preset {name!r} of the system {system!r} must be named {system}_...")
        summary = (inspect.getdoc(function) or "").partition("\n")[0]
        SYSTEMS[system].presets[name] = Preset(name, system, function, summary, tokenizer)
        return function

    return enter
