"""Systems that are neither trained nor sampled: what `arcore run NAME` calls.

    @dataclass(frozen=True, kw_only=True)
    class Options: ...

    def run(options: Options) -> Report: ...

stand in the system's file. The options' fields become the options of the command, their docstring its help.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from arcore.catalog.discovery import catalog
from arcore.catalog.lookup import find, load


@dataclass(frozen=True)
class Report:
    """What a run found.

    Attributes:
        text: for people.
        values: for programs, JSON-ready.
        draw: draws on a `matplotlib.figure.Figure`, or None.
        size: width and height of that figure in inches.
    """

    text: str
    values: Mapping[str, Any] = field(default_factory=dict)
    draw: Callable[[Any], None] | None = None
    size: tuple[float, float] = (6.0, 4.0)


@dataclass(frozen=True)
class Runnable:
    """A system that can be run.

    Attributes:
        name: of the system.
        options: frozen dataclass.
        run: takes an object of that class.
    """

    name: str
    options: type
    run: Callable[[Any], Report]


def check_bounds(
    options: Any,
    *,
    least: Mapping[str, float] | None = None,
    above: Mapping[str, float] | None = None,
    endless: Collection[str] = (),
) -> None:
    """Raise ValueError, in the words of the command line, where an option is out of its range, NaN or inf.

    Args:
        options: the dataclass.
        least: by the name of a field, the smallest value that it may have.
        above: by the name of a field, what its value must exceed.
        endless: fields that may be inf.
    """
    for bounds, fits, word in ((least, operator.ge, "at least"), (above, operator.gt, "above")):
        for name, bound in (bounds or {}).items():
            value = getattr(options, name)
            if value is not None and value == math.inf and name not in endless:
                raise ValueError(f"--{name.replace('_', '-')} must be a finite number but got {value}")
            if value is not None and not fits(value, bound):
                raise ValueError(f"--{name.replace('_', '-')} must be {word} {bound} but got {value}")


def runnable(name: str) -> Runnable:
    """The function of a system that `arcore run` calls, and its options.

    Raises:
        ValueError: unknown name, or a system that has no such function.
        TypeError: its function does not take one frozen dataclass.
    """
    entry = find(name).entry
    system = entry.system
    if "run" not in entry.functions:
        others = ", ".join(found for found, other in catalog().items() if "run" in other.functions)
        use = (
            f"`arcore train {next(iter(entry.presets))}` trains it"
            if entry.presets
            else f"`arcore zoo {name}` says more"
        )
        raise ValueError(
            f"{system.name} is not for `arcore run`: {use}; what can be run: {others or 'nothing'}"
        )
    place = entry.functions["run"]
    function = load(place, "run")
    parameters = list(inspect.signature(function).parameters)
    options = get_type_hints(function).get(parameters[0]) if len(parameters) == 1 else None
    if not (
        isinstance(options, type)
        and dataclasses.is_dataclass(options)
        and options.__dataclass_params__.frozen  # type: ignore[attr-defined]
    ):
        raise TypeError(
            f"{place.path}:{place.line}: expected `def run(options: Options) -> Report`, Options frozen"
        )
    return Runnable(system.name, options, function)
