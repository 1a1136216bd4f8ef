"""The claims of the zoo: what a system's file offers so that anybody can ask it to prove its paper.

    def claim(*, quick: bool) -> Claim:
        error = ...
        return Claim((at_most("difference between one pass and steps", error, 1e-5),))

`quick=True` ends in seconds; the full check may take minutes. `run_claim` runs it under fixed conditions.
"""

from __future__ import annotations

import contextvars
import math
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from arcore.catalog.discovery import ZOO
from arcore.catalog.lookup import find, load
from arcore.nn.kinds import check_kinds

Module = TypeVar("Module", bound=nn.Module)
# Called with what is being done, how far it is, and how far it goes.
Listener = Callable[[str, int, int], None]
_LISTENER: contextvars.ContextVar[Listener | None] = contextvars.ContextVar("listener", default=None)


@dataclass(frozen=True)
class Row:
    """One measured value beside what the paper's claim requires of it.

    Attributes:
        what: what was measured.
        measured: the value.
        required: for people, e.g. `"<= 1e-05"`.
        holds: whether it is so.
    """

    what: str
    measured: float
    required: str
    holds: bool


@dataclass(frozen=True)
class Claim:
    """What the check of a claim found.

    Attributes:
        rows: at least one.
        draw: draws on a `matplotlib.figure.Figure` what people would rather look at, or None.
        size: width and height of that figure in inches.

    Raises:
        TypeError: a row is none.
        ValueError: there is no row.
    """

    rows: tuple[Row, ...]
    draw: Callable[[Any], None] | None = None
    size: tuple[float, float] = (6.0, 4.0)

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError(
                "expected a claim to have rows but there is none: it would hold whatever happens"
            )
        for row in self.rows:
            if not isinstance(row, Row):
                raise TypeError(f"expected the rows of a claim to be of `Row` but got {row!r}")

    @property
    def holds(self) -> bool:
        """Whether every row holds."""
        return all(row.holds for row in self.rows)


@dataclass(frozen=True)
class Outcome:
    """What became of a system's claim.

    Attributes:
        system: name.
        quick: whether only the quick check ran.
        claim: what was found, or None where the check did not end.
        error: what stopped it, with file and line, or None.
        seconds: wall time.
    """

    system: str
    quick: bool
    claim: Claim | None
    error: str | None
    seconds: float

    @property
    def holds(self) -> bool:
        """Whether the claim was checked and holds."""
        return self.error is None and self.claim is not None and self.claim.holds


def at_most(what: str, measured: Any, limit: float) -> Row:
    """A row that holds when the value is no more than the limit; NaN is not."""
    value = _number(measured)
    return Row(what, value, f"<= {limit:g}", value <= limit)


def at_least(what: str, measured: Any, limit: float) -> Row:
    """A row that holds when the value is no less than the limit; NaN is not."""
    value = _number(measured)
    return Row(what, value, f">= {limit:g}", value >= limit)


def equals(what: str, measured: Any, wanted: float, *, tolerance: float = 0.0) -> Row:
    """A row that holds when the value is the wanted one, up to `tolerance`."""
    required = f"= {wanted:g}" if tolerance == 0 else f"{wanted:g} +- {tolerance:g}"
    value = _number(measured)
    return Row(what, value, required, abs(value - wanted) <= tolerance)


def _number(measured: Any) -> float:
    return float(measured.detach() if isinstance(measured, torch.Tensor) else measured)


def steps(count: int, what: str) -> Iterator[int]:
    """`range(count)` that tells `arcore check` how far it is."""
    listener = _LISTENER.get()
    for step in range(count):
        if listener is not None:
            listener(what, step, count)
        yield step


@check_kinds
def shaken(module: Module, seed: int = 1, scale: float = 0.1) -> Module:
    """Move the weights away from initialisation, where gates and logits are almost zero and hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return module


def run_claim(name: str, *, quick: bool = False, listener: Listener | None = None) -> Outcome:
    """Check the claim of a system: on one thread, from seed 0, leaving the process's own state as it was.

    Args:
        name: of a system or preset.
        quick: the check that ends in seconds.
        listener: told how far it is.

    Raises:
        ValueError: unknown name.
    """
    entry = find(name).entry
    if "claim" not in entry.functions:
        return Outcome(entry.system.name, quick, None, f"there is no claim() in {entry.place.path.name}", 0.0)
    start = time.perf_counter()
    found, error = None, None
    with _fixed_conditions(), _told(listener):
        try:
            found = load(entry.functions["claim"], "claim")(quick=quick)
            if not isinstance(found, Claim):
                found, error = None, f"expected claim() to return a Claim but got {found!r}"
        except Exception as fault:
            error = described(fault)
    return Outcome(entry.system.name, quick, found, error, time.perf_counter() - start)


def described(fault: BaseException) -> str:
    """An exception on one line, with the file and line that raised it, and the line of the system that led there."""
    frames = traceback.extract_tb(fault.__traceback__)
    of_system = [frame for frame in frames if ZOO in Path(frame.filename).parents]
    places = [f"{_below_zoo(frame.filename)}:{frame.lineno}" for frame in (*of_system[-1:], frames[-1])]
    said = " ".join(str(fault).split())
    return f"{type(fault).__name__}: {said} ({', in '.join(dict.fromkeys(places))})"


def _below_zoo(path: str) -> str:
    """`zoo/next_scale/var.py` of a system's file, the name alone of another one."""
    return Path(path).relative_to(ZOO.parent).as_posix() if ZOO in Path(path).parents else Path(path).name


@contextmanager
def _fixed_conditions() -> Iterator[None]:
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


@contextmanager
def _told(listener: Listener | None) -> Iterator[None]:
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


def shown(value: float) -> str:
    """A measured value for people."""
    if math.isfinite(value) and value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.3g}"
