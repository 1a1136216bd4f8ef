"""What a system of the zoo says about itself, and what marks its presets.

    SYSTEM = System(name="var", title="VAR", paper="arXiv:2404.02905", topic="next_scale", kind="model", ...)

    @preset
    def var_tiny() -> VARConfig: ...

`SYSTEM` is a literal: `arcore.catalog.discovery` reads it from the file without importing anything.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, overload

ConfigFunction = TypeVar("ConfigFunction", bound=Callable[[], Any])

# What a system is decides which contract it is held to (tests/zoo/contract_<kind>.py).
KINDS = {
    "model": "a network that is trained and used",
    "objective": "a loss",
    "decoder": "a way to draw from networks",
    "agent": "what acts in an environment",
    "estimator": "a statistical procedure on data",
    "theory": "a closed form that is checked and drawn",
}
# What the claim of a system was checked on, from the strongest to the weakest.
CHECKED_ON = (
    "published weights",
    "real data",
    "synthetic data",
    "closed form",
    "published layout, random weights",
    "random weights",
)


@dataclass(frozen=True, kw_only=True)
class System:
    """A published system, as its file declares it.

    Attributes:
        name: lower case; its presets' names start with it.
        title: as the paper writes it.
        paper: `"arXiv:2404.02905"`, `"doi:..."`, or the address of what has neither.
        paper_title: the paper's whole title, so that it is found by it.
        topic: the folder below `arcore/zoo/`.
        kind: one of `KINDS`.
        summary: one sentence.
        claim: what the check of the paper's central claim shows, one sentence.
        checked_on: one of `CHECKED_ON`.
        reported: numbers of the paper and what they were measured on, to stand beside those of the check; None where
            there are none that mean something here.
        model: name of the class in the same file or folder whose constructor takes a preset's config; None where the
            system has no network of its own.
        builds_on: names of the systems that the paper builds on.
        ops: names of the ops in `arcore.ops` that it runs on.
        recipe: module of `arcore.recipes` that trains and samples it, `"own"` where the system brings its own, or None.
        aliases: other first parts of its presets' names, where those are published under another name.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field has a value that it cannot have.
    """

    name: str
    title: str
    paper: str
    topic: str
    kind: str
    summary: str
    claim: str
    checked_on: str
    reported: str | None = None
    model: str | None = None
    builds_on: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()
    recipe: str | None = None
    aliases: tuple[str, ...] = ()
    paper_title: str | None = None

    def __post_init__(self) -> None:
        _check_texts(self, ("builds_on", "ops", "aliases"))
        for name in (self.name, self.topic, *self.aliases):
            if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
                raise ValueError(f"expected a name of lower-case letters, digits and _ but got {name!r}")
        for field_name, known in (("kind", tuple(KINDS)), ("checked_on", CHECKED_ON)):
            if getattr(self, field_name) not in known:
                raise ValueError(
                    f"expected {field_name} to be one of {', '.join(map(repr, known))} "
                    f"but got {getattr(self, field_name)!r}"
                )
        if self.paper.startswith("arXiv:") and not re.fullmatch(r"arXiv:\d{4}\.\d{4,5}", self.paper):
            raise ValueError(f"expected paper to be like 'arXiv:2404.02905' but got {self.paper!r}")
        for field_name in ("title", "paper", "summary", "claim"):
            if not getattr(self, field_name).strip():
                raise ValueError(f"expected {field_name} to say something but it is empty")

    @property
    def url(self) -> str:
        """Address of the paper."""
        kind, _, number = self.paper.partition(":")
        places = {"arXiv": "https://arxiv.org/abs/", "doi": "https://doi.org/"}
        return f"{places[kind]}{number}" if kind in places else self.paper


def _check_texts(declared: System | Published, lists: tuple[str, ...]) -> None:
    """Refuse fields that are no texts, without `check_kinds`: that imports torch, and this file is read without it."""
    for field in dataclasses.fields(declared):
        value = getattr(declared, field.name)
        if field.name in lists:
            if not isinstance(value, tuple) or not all(isinstance(item, str) for item in value):
                raise TypeError(f"expected {field.name} to be a tuple of names but got {value!r}")
        elif not isinstance(value, str) and (field.default is dataclasses.MISSING or value is not None):
            raise TypeError(f"expected {field.name} to be a text but got {value!r}")


# What a preset says whose authors have published no weights.
NOT_PUBLIC = "not public"


@dataclass(frozen=True)
class Published:
    """Where weights are on the model hub.

    Attributes:
        repository: `"owner/name"`.
        file: the weights.
        beside: other files that belong to them, such as config.json.
        tokenizer: repository of the tokenizer.json of a language model whose own repository has none.

    Raises:
        TypeError: a field has the wrong type.
    """

    repository: str
    file: str
    beside: tuple[str, ...] = ()
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        _check_texts(self, ("beside",))


@dataclass(frozen=True)
class PresetFacts:
    """What `@preset` says about a preset, besides its function.

    Attributes:
        tokenizer: preset of the tokenizer that the model was made for, or None.
        weights: where they are on the hub; `NOT_PUBLIC` where the authors keep them; None where they are elsewhere, or
            there are none.
    """

    tokenizer: str | None = None
    weights: Published | str | None = None


@overload
def preset(function: ConfigFunction, /) -> ConfigFunction: ...


@overload
def preset(
    *, tokenizer: str | None = None, weights: Published | str | None = None
) -> Callable[[ConfigFunction], ConfigFunction]: ...


def preset(
    function: Any = None, /, *, tokenizer: str | None = None, weights: Published | str | None = None
) -> Any:
    """Mark a function that returns a config as a preset of the file's `SYSTEM`.

    The function's name starts with the system's or with one of its aliases; the first line of its docstring is the
    preset's summary. Arguments are the fields of `PresetFacts`.
    """

    if isinstance(weights, str) and weights != NOT_PUBLIC:
        raise ValueError(f"expected weights to be a Published or {NOT_PUBLIC!r} but got {weights!r}")

    def mark(target: Any) -> Any:
        target.preset = PresetFacts(tokenizer, weights)
        return target

    return mark if function is None else mark(function)
