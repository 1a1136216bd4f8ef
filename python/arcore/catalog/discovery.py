"""Finds the systems of the zoo by reading their files, without importing them.

`python/arcore/zoo/<topic>/<system>.py`, or a folder `<system>/` whose `__init__.py` declares it, is a system. Files and
folders whose names start with `_` are not: they hold what the systems of a topic share.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from arcore.catalog.system import System

PACKAGE = "arcore.zoo"
ZOO = Path(__file__).resolve().parent.parent / "zoo"
# What a system says whose recipe stands in its own file or folder.
OWN = "own"


class CatalogError(ValueError):
    """A system is declared wrongly; each line names file and line."""


@dataclass(frozen=True)
class Place:
    """Where something stands.

    Attributes:
        module: as `importlib` takes it.
        path: source file.
        line: from 1.
        summary: first line of the docstring, or "".
    """

    module: str
    path: Path
    line: int
    summary: str = ""


@dataclass(frozen=True)
class Entry:
    """A system and where its parts stand.

    Attributes:
        system: what it says about itself.
        place: of the literal `SYSTEM`.
        doc: docstring of the file.
        presets: by name, in the order of the file.
        classes: public classes by name.
        functions: public functions by name.
    """

    system: System
    place: Place
    doc: str
    presets: Mapping[str, Place]
    classes: Mapping[str, Place]
    functions: Mapping[str, Place]

    @property
    def source(self) -> Place:
        """Of the model's class, or of the literal where there is none."""
        return self.classes[self.system.model] if self.system.model else self.place


@dataclass
class _Found:
    system: System | None = None
    place: Place | None = None
    doc: str = ""
    presets: dict[str, Place] = field(default_factory=dict)
    classes: dict[str, Place] = field(default_factory=dict)
    functions: dict[str, Place] = field(default_factory=dict)


@cache
def catalog() -> Mapping[str, Entry]:
    """All systems of the zoo by name, sorted.

    Raises:
        CatalogError: a file declares its system wrongly.
    """
    entries, problems = read(ZOO)
    if problems:
        raise CatalogError("the zoo has systems that are declared wrongly: " + "; ".join(problems))
    return entries


def read(zoo: Path) -> tuple[dict[str, Entry], list[str]]:
    """The systems below a folder and what is wrong with their declarations, each as `file:line: what`."""
    entries: dict[str, Entry] = {}
    problems: list[str] = []
    taken: dict[str, str] = {}
    for topic in sorted(path for path in zoo.iterdir() if path.is_dir() and path.name[0] not in "._"):
        for place in sorted(topic.iterdir()):
            if place.name in ("__pycache__", "__init__.py") or (place.is_file() and place.suffix != ".py"):
                continue
            files = sorted(place.rglob("*.py")) if place.is_dir() else [place]
            found = _Found()
            for file in files:
                problems += _read_file(file, zoo, found, place)
            if place.name.startswith("_"):
                problems += [
                    f"{at.path}:{at.line}: the preset {name} stands in a file that is no system"
                    for name, at in found.presets.items()
                ]
                if found.place:
                    problems.append(
                        f"{found.place.path}:{found.place.line}: a SYSTEM stands in a file whose name starts with _"
                    )
                continue
            if found.system is None or found.place is None:
                if found.place is None:
                    first = place / "__init__.py" if place.is_dir() else place
                    problems.append(
                        f"{first}:1: there is no `SYSTEM = System(...)`; a file that is no system needs a name that "
                        "starts with _"
                    )
                continue
            entry = Entry(found.system, found.place, found.doc, found.presets, found.classes, found.functions)
            problems += _check_entry(entry, topic.name, taken)
            entries[entry.system.name] = entry
    for entry in entries.values():
        for name in entry.system.builds_on:
            if name not in entries:
                problems.append(f"{_at(entry.place)}: builds_on names {name!r}, which is no system")
    return dict(sorted(entries.items())), problems


def without_claim(entries: Mapping[str, Entry]) -> list[str]:
    """Which systems do not say how their claim is checked; they can be used, but `make lint` fails."""
    return [
        f"{_at(entry.place)}: there is no `def claim(*, quick: bool) -> Claim`, which checks the paper's claim"
        for entry in entries.values()
        if "claim" not in entry.functions
    ]


def _read_file(path: Path, zoo: Path, found: _Found, system: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except SyntaxError as error:
        yield f"{path}:{error.lineno or 1}: {error.msg}"
        return
    except (OSError, ValueError) as error:
        # Not UTF-8, or with null bytes.
        yield f"{path}:1: the file cannot be read as Python: {error}"
        return
    parts = path.relative_to(zoo).with_suffix("").parts
    module = ".".join((PACKAGE, *(parts[:-1] if parts[-1] == "__init__" else parts)))
    declares = path.name == "__init__.py" or not system.is_dir()
    if declares and path.parent in (system, system.parent):
        found.doc = ast.get_docstring(tree) or ""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            place = Place(module, path, node.lineno, (ast.get_docstring(node) or "").partition("\n")[0])
            if isinstance(node, ast.ClassDef):
                if not node.name.startswith("_"):
                    found.classes.setdefault(node.name, place)
            elif any(_is_preset(decorator) for decorator in node.decorator_list):
                if node.name in found.presets:
                    yield f"{_at(place)}: the preset {node.name} is there twice"
                found.presets[node.name] = place
            elif not node.name.startswith("_"):
                found.functions.setdefault(node.name, place)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == "SYSTEM" for target in targets):
                place = Place(module, path, node.lineno)
                if found.place is not None:
                    yield f"{_at(place)}: there is a second SYSTEM, after that of {_at(found.place)}"
                    continue
                found.place = place
                if not declares:
                    yield f"{_at(place)}: the SYSTEM of a folder stands in its __init__.py"
                try:
                    found.system = _literal(node.value)
                except (TypeError, ValueError) as error:
                    yield f"{_at(place)}: {error}"


def _is_preset(decorator: ast.expr) -> bool:
    name = decorator.func if isinstance(decorator, ast.Call) else decorator
    return isinstance(name, ast.Name) and name.id == "preset"


def _literal(node: ast.expr | None) -> System:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.func.id != "System":
        raise ValueError("expected SYSTEM to be `System(name=..., ...)`")
    if node.args or any(keyword.arg is None for keyword in node.keywords):
        raise ValueError("expected every field of SYSTEM by name")
    values: dict[str, Any] = {}
    for keyword in node.keywords:
        try:
            values[str(keyword.arg)] = ast.literal_eval(keyword.value)
        except ValueError:
            raise ValueError(
                f"expected {keyword.arg} to be a literal but got `{ast.unparse(keyword.value)}`: SYSTEM is read "
                "without running the file"
            ) from None
    try:
        return System(**values)
    except TypeError as error:
        raise TypeError(str(error).replace("System.__init__()", "SYSTEM")) from None


def _check_entry(entry: Entry, topic: str, taken: dict[str, str]) -> Iterator[str]:
    system, at = entry.system, _at(entry.place)
    if system.topic != topic:
        yield f"{at}: the topic {system.topic!r} is not the folder's, {topic!r}"
    names = {system.name: at, **{name: _at(place) for name, place in entry.presets.items()}}
    for name, where in names.items():
        if name in taken:
            yield f"{where}: the name {name!r} is taken by {taken[name]}"
        taken.setdefault(name, where)
    firsts = (system.name, *system.aliases)
    for name, place in entry.presets.items():
        if not name.startswith(tuple(f"{first}_" for first in firsts)):
            yield f"{_at(place)}: the preset {name!r} must be named {' or '.join(f'{f}_...' for f in firsts)}"
        if not place.summary:
            yield f"{_at(place)}: the preset {name!r} has no docstring to say what it is"
    if system.model is not None:
        if system.model not in entry.classes:
            yield f"{at}: there is no class {system.model}, which SYSTEM names as the model"
        if not entry.presets:
            yield f"{at}: the system has a model but no preset"
    elif system.kind == "model":
        yield f"{at}: a system of kind 'model' names its class with model="
    elif entry.presets:
        yield f"{at}: the system has presets but names no class with model="
    package = ZOO.parent
    if system.recipe not in (None, OWN) and not (package / "recipes" / f"{system.recipe}.py").is_file():
        known = [path.stem for path in (package / "recipes").glob("[a-z]*.py")]
        close = difflib.get_close_matches(str(system.recipe), [*known, OWN], n=1)
        hint = (
            f"; did you mean {close[0]!r}?"
            if close
            else f"; there are {', '.join(sorted(known))} and {OWN!r}"
        )
        yield f"{at}: recipe names {system.recipe!r}, which is none of arcore.recipes{hint}"
    for op in system.ops:
        if not (package / "ops" / f"{op}.py").is_file():
            yield f"{at}: ops names {op!r}, which is no op of arcore.ops"


def _at(place: Place) -> str:
    return f"{place.path}:{place.line}"
