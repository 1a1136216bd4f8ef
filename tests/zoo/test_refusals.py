"""Wrong arguments for whatever the zoo, the recipes and the integrations offer: our errors, which name the argument.

Nothing here lists systems or functions. Public functions, constructors and methods are found in the modules, and what
is wrong for an argument follows from its annotation. Right calls, from which values are made that do not fit, are taken
down while the protocols drive each network (tests/zoo/protocol_*.py).
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import math
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FunctionType, ModuleType, UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin

import pytest
import torch
from torch import Tensor, nn

import arcore
from arcore._kinds import argument_kinds, check_kinds
from arcore.catalog.claims import shaken
from tests.kinds import is_ours, wrong_values

from .conftest import protocol

# What needs packages that take long to import is guarded by the same line in its package.
HEAVY = ("arcore.integrations.",)


class Public(NamedTuple):
    """Something public that takes arguments."""

    name: str
    function: Callable[..., Any]
    owner: type | None

    @property
    def code(self) -> Any:
        return inspect.unwrap(self.function).__code__


def modules(*packages: str) -> Iterator[ModuleType]:
    for package in packages:
        module = importlib.import_module(package)
        yield module
        for found in pkgutil.walk_packages(module.__path__, f"{package}."):
            if not found.name.startswith(HEAVY):
                yield importlib.import_module(found.name)


def members(owner: type) -> Iterator[tuple[str, FunctionType]]:
    for name, value in vars(owner).items():
        inner = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        if isinstance(inner, FunctionType) and (not name.startswith("_") or name in ("__init__", "__call__")):
            yield name, inner


@functools.cache
def public() -> tuple[Public, ...]:
    """Every public function, constructor and method that takes arguments."""
    pytest.importorskip("pytorch_lightning")
    found = []
    for module in modules("arcore.zoo", "arcore.recipes"):
        for name, value in vars(module).items():
            if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
                continue
            where = f"{module.__name__}.{name}"
            if isinstance(value, FunctionType):
                found.append(Public(where, value, None))
            elif isinstance(value, type) and not is_abstract(value):
                found += [Public(f"{where}.{method}", inner, value) for method, inner in members(value)]
    return tuple(one for one in found if {*inspect.signature(one.function).parameters} - {"self", "cls"})


def is_abstract(owner: type) -> bool:
    """Whether it has no instances of its own, or none that are made by its constructor."""
    return getattr(owner, "_is_protocol", False) or issubclass(owner, BaseException)


def test_whatever_is_public_is_guarded():
    bare = [
        one.name
        for one in public()
        if not hasattr(one.function, "kinds_before") and not hasattr(one.function, "kinds_after")
    ]
    assert bare == []
    assert len(public()) > 1500
    assert hasattr(importlib.import_module("arcore.integrations.mamba_ssm").selective_scan_fn, "kinds_before")


def refusal(function: Callable[..., Any], given: Mapping[str, Any]) -> Exception | None:
    """What a call raises of which some arguments are given; None where it is accepted."""
    try:
        function(**given)
    except Exception as error:
        return error
    return None


def is_nan(value: object) -> bool:
    """Results may hold it; whether a dataclass holds settings or results, its name tells."""
    return isinstance(value, float) and math.isnan(value)


def may_be(wrong: object, kind: Any) -> bool:
    """Whether a value that no argument of most kinds takes fits this one, or nobody can tell."""
    parts = (get_args(kind) if get_origin(kind) in (Union, UnionType) else None) or (kind,)
    return any(
        part is Any
        or getattr(part, "_is_protocol", False)
        or (part is float and isinstance(wrong, int) and not isinstance(wrong, bool))
        or (isinstance(part, type) and issubclass(part, nn.Module) and isinstance(wrong, part))
        for part in parts
    )


def test_wrong_kinds_are_refused_before_anything_else():
    """One argument is given, the others are missing: it is refused for its kind, and by name."""
    faults, tried = [], 0
    for one in public():
        for argument, kind in argument_kinds(one.function).items():
            default = inspect.signature(one.function).parameters[argument].default
            for wrong in wrong_values(kind):
                if wrong is default or may_be(wrong, kind) or (is_settings(one) and is_nan(wrong)):
                    continue
                tried += 1
                error = refusal(one.function, {argument: wrong})
                if (
                    not isinstance(error, TypeError | ValueError)
                    or not is_ours(error)
                    or argument not in str(error)
                ):
                    faults.append(f"{one.name} {argument}={wrong!r}: {error!r}")
    assert faults[:20] == []
    assert tried > 20_000


NUMBERS = {
    "temperature": (-1.0, math.nan),
    "top_k": (0, -1, 2.5),
    "top_p": (1.5, -0.1, math.nan),
    "min_p": (1.5,),
    "cfg": (math.inf, math.nan),
    "cfg_scale": (math.inf, math.nan),
    "strength": (math.nan,),
    "steps": (-1, 2.5),
    "iterations": (-1,),
    "horizon": (-3,),
    "max_new_tokens": (-1,),
    "batch": (-1,),
    "layer": (-3,),
    "lr": (-0.1, math.inf),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_out_of_range_are_refused_whoever_takes_them(name: str):
    faults, takers = [], 0
    for one in public():
        kind = argument_kinds(one.function).get(name)
        of = {int, float} & {kind, *getattr(kind, "__args__", ())}
        if not of or is_settings(one):
            continue
        takers += 1
        for wrong in NUMBERS[name]:
            error = refusal(one.function, {name: wrong})
            if not isinstance(error, TypeError | ValueError) or not is_ours(error) or name not in str(error):
                faults.append(f"{one.name} {name}={wrong!r}: {error!r}")
    assert faults == []
    assert takers


def is_settings(one: Public) -> bool:
    """A dataclass says first what it has to say itself, which needs all its fields."""
    return (
        one.owner is not None
        and one.name.endswith(".__init__")
        and hasattr(one.owner, "__dataclass_fields__")
    )


def numbers_of(config: Any) -> Iterator[tuple[str, Any]]:
    for name, value in vars(config).items():
        if isinstance(value, bool):
            yield name, 2.5
        elif isinstance(value, int):
            yield from ((name, wrong) for wrong in (-3, 2.5, "nope", math.nan))
        elif isinstance(value, float):
            yield from ((name, wrong) for wrong in (math.nan, "nope"))


def test_settings_refuse_what_they_cannot_mean(preset: str):
    """Negative sizes, fractions of things, NaN; and a name that is nearly right is answered by the right one."""
    config = arcore.catalog.get_config(preset)
    faults = []
    for name, wrong in numbers_of(config):
        error = refusal(arcore.create_model, {"name": preset, name: wrong})
        if not isinstance(error, TypeError | ValueError) or not is_ours(error):
            faults.append(f"{name}={wrong!r}: {error!r}")
    assert faults == []
    name = max(vars(config), key=len)
    with pytest.raises((TypeError, ValueError), match=f"did you mean .*{name}"):
        type(config)(**{name[:-1]: 1})


Arguments = dict[str, Any]


def kept(value: Any) -> Any:
    """A copy of an argument, so that no call changes another's; networks are shared."""
    if isinstance(value, nn.Module) or (
        isinstance(value, list | tuple) and any(isinstance(item, nn.Module) for item in value)
    ):
        return value
    try:
        return copy.deepcopy(value)
    except RuntimeError:  # a tensor in the middle of a graph
        return value


def calls_of(drive: Callable[[], object]) -> dict[Any, Arguments]:
    """The first call of each public function while something runs, by code object."""
    wanted = {one.code for one in public()}
    found: dict[Any, Arguments] = {}

    def look(frame: Any, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code in wanted and code not in found:
            names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
            sys.setprofile(None)
            found[code] = {name: kept(frame.f_locals[name]) for name in names}
            sys.setprofile(look)

    sys.setprofile(look)
    try:
        drive()
    finally:
        sys.setprofile(None)
    return found


def values_that_do_not_fit(value: Any) -> Iterator[tuple[str, Any]]:
    """Of the right kind, but of other sizes, dtypes and ranges."""
    if isinstance(value, Tensor):
        yield "one axis more", value.unsqueeze(0)
        yield "no axis", value.new_zeros(())
        if value.dim() and value.numel():
            yield "one more in the last axis", torch.cat([value, value[..., :1]], -1)
            yield "one row more", torch.cat([value, value[:1]], 0)
            yield "no row", value[:0]
        if value.is_floating_point():
            yield "whole numbers", value.long()
        elif value.dtype == torch.int64:
            yield "fractions", value.float()
            yield "far too large", value + 10**6
            yield "negative", value - 10**6
    elif isinstance(value, int) and not isinstance(value, bool):
        yield "negative", -3
    elif isinstance(value, float):
        yield "NaN", math.nan


def called(one: Public, given: Arguments) -> None:
    given = {name: value if name == "self" else kept(value) for name, value in given.items()}
    method = one.name.rpartition(".")[2]
    if one.owner is None:
        one.function(**given)
    elif method == "__init__":
        del given["self"]
        one.owner(**given)
    elif "self" in given:
        itself = given.pop("self")
        getattr(itself if isinstance(itself, nn.Module) else copy.deepcopy(itself), method)(**given)
    else:
        given.pop("cls", None)
        getattr(one.owner, method)(**given)


SEEN: set[Any] = set()


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_values_that_do_not_fit_are_accepted_or_refused_in_our_words(preset: str):
    """Each call that a network's protocol makes, again with each argument changed: no error but ours."""
    model = shaken(arcore.create_model(preset)).eval()
    adapter = protocol(preset)
    found = calls_of(lambda: (adapter.forward(model), adapter.loss(model)))
    faults = []
    for one in public():
        if one.code not in found or one.code in SEEN or one.name.endswith("__init__"):
            continue
        SEEN.add(one.code)
        right = found[one.code]
        for argument, value in right.items():
            for words, wrong in values_that_do_not_fit(value):
                torch.manual_seed(0)
                try:
                    called(one, {**right, argument: wrong})
                except Exception as error:
                    if not is_ours(error):
                        faults.append(f"{one.name} {argument}: {words}: {error!r}"[:200])
    assert faults == []


def test_a_guard_costs_little():
    """Less than a small product of matrices, which every function of a network makes several of."""

    def plain(x: Tensor, scale: float, count: int, name: str = "x", layer: int = 0) -> None: ...

    guarded = check_kinds(plain)
    x = torch.zeros(1)

    def took(function: Callable[..., None]) -> int:
        lines = 0

        def count(*_: object) -> Any:
            nonlocal lines
            lines += 1
            return count

        function(x, 1.0, 2, layer=3)
        sys.settrace(count)
        try:
            function(x, 1.0, 2, layer=3)
        finally:
            sys.settrace(None)
        return lines

    assert took(guarded) - took(plain) < 80


def test_a_module_that_is_imported_later_is_guarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A package outside of arcore, so that nothing is left in it."""
    from arcore import _guard

    (tmp_path / "rooms_of_test").mkdir()
    (tmp_path / "rooms_of_test" / "__init__.py").write_text(
        "from arcore._guard import guard_package\nguard_package(__name__)\n"
    )
    (tmp_path / "rooms_of_test" / "part.py").write_text(
        "from torch import Tensor, nn\n\n\n"
        "def double(x: Tensor, times: int = 2) -> Tensor:\n    return _double(x) * times\n\n\n"
        "def _double(x: Tensor) -> Tensor:\n    return x + x\n\n\n"
        "class Table(nn.Embedding):\n"
        "    @classmethod\n    def of(cls, size: int) -> 'Table':\n        return cls(size, 2)\n\n"
        "    def forward(self, codes: Tensor) -> Tensor:\n        return super().forward(codes)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(_guard, "_PACKAGES", set(_guard._PACKAGES))
    part = importlib.import_module("rooms_of_test.part")
    assert part.double(torch.ones(1)) == 4
    for call, says in (
        (lambda: part.double([1.0]), r"double: expected x to be a tensor but got \[1.0\] \(list\)"),
        (lambda: part.double(torch.ones(1), 2.5), "double: expected times to be a whole number but got 2.5"),
        (
            lambda: part.double(torch.ones(1), time=2),
            "double: there is no argument 'time'; did you mean 'times'?",
        ),
        (lambda: part.Table.of("x"), "Table.of: expected size to be a whole number"),
        (
            lambda: part.Table.of(3)(torch.tensor([1, 3])),
            "Table.forward: expected codes from 0 to 2 but got 3",
        ),
    ):
        with pytest.raises((TypeError, ValueError), match=says):
            call()
    assert not hasattr(part._double, "kinds_before")
