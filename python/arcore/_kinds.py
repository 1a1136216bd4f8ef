"""A decorator that refuses arguments of another kind than a function's annotations say, in arcore's words."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import importlib
import inspect
import math
import operator
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from types import UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    ParamSpec,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    overload,
)

import torch
from torch import Tensor, nn

from arcore import _failures

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
Made = TypeVar("Made")
# What `argument_kinds` says of numpy's arrays, whose annotations hold too little to be looked at.
ARRAY, OPTIONAL_ARRAY = "array", "array or None"
# Items of a list whose kinds are looked at: a list of all tokens of a text would take as long as the work itself.
_LOOKED_AT = 16


class Bounds(NamedTuple):
    """What numbers of an annotation may be: `Annotated[int, Bounds(least=1)]`.

    Attributes:
        least: the smallest.
        most: the largest.
        above: what it is larger than.
        finite: whether infinity is none.
    """

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    finite: bool = False

    def hold(self, value: float) -> bool:
        """Whether a number is within."""
        return (
            self.least <= value <= self.most
            and (value > self.above or self.above == -math.inf)
            and (not self.finite or math.isfinite(value))
        )

    def ends(self) -> tuple[float, float]:
        """The smallest and the largest number within."""
        large = sys.float_info.max if self.finite else math.inf
        above = -math.inf if self.above == -math.inf else math.nextafter(self.above, math.inf)
        return max(self.least, above, -large), min(self.most, large)

    def words(self) -> str:
        """The bounds, for a message."""
        if self.above > -math.inf and self.most < math.inf:
            return f"above {self.above:g} and at most {self.most:g}"
        if self.least > -math.inf and self.most < math.inf:
            return f"from {self.least:g} to {self.most:g}"
        if self.above > -math.inf:
            return f"{'finite and ' if self.finite else ''}above {self.above:g}"
        if self.least > -math.inf:
            return f"{'finite and ' if self.finite else ''}at least {self.least:g}"
        return "finite" if self.finite else f"at most {self.most:g}"


class Axes(NamedTuple):
    """The axes and the kind of numbers of a tensor: `Annotated[Tensor, Axes("B N C")]`.

    Attributes:
        names: of the axes, with blanks between; one `...` stands for any.
        floating: whether they are floating-point numbers.
        whole: whether they are int64.
    """

    names: str
    floating: bool = False
    whole: bool = False

    def complaint(self, name: str, value: Tensor) -> str | None:
        """What is wrong with a tensor, for a message; None where it fits."""
        axes = self.names.split()
        least = len(axes) - axes.count("...")
        if value.dim() < least or (value.dim() > least and "..." not in axes):
            return f"expected {name} of shape [{', '.join(axes)}] but got {tuple(value.shape)}"
        if self.floating and not value.is_floating_point():
            return f"expected {name} of a floating dtype but got {dtype_name(value.dtype)}"
        if self.whole and value.dtype != torch.int64:
            return f"expected {name} of dtype int64 but got {dtype_name(value.dtype)}"
        return None


# Numbers of things; sizes of which there is at least one; shares of a whole; lengths and strengths.
Count = Annotated[int, Bounds(least=0)]
Size = Annotated[int, Bounds(least=1)]
Share = Annotated[float, Bounds(least=0, most=1)]
Positive = Annotated[float, Bounds(above=0, finite=True)]
# Values of a network: channels last, tokens of rows, pictures.
Features = Annotated[Tensor, Axes("... C", floating=True)]
Tokens = Annotated[Tensor, Axes("B N C", floating=True)]
Planes = Annotated[Tensor, Axes("B C H W", floating=True)]


@overload
def check_kinds(function: type[Made]) -> type[Made]: ...


@overload
def check_kinds(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]: ...


def check_kinds(function: Any) -> Any:
    """Check the kinds of a function's arguments before it runs: a tensor where a tensor is meant, and so on.

    Looks at annotations of tensors, numbers (never NaN), texts, paths, choices (`Literal`), sequences, tables, arrays
    (`ArrayLike`), functions and classes, each of them or None where the annotation says so, and at the `Bounds` of
    annotated numbers. Other sizes and values are the function's own to check. Inside `torch.compile` nothing is.

    Args:
        function: a function or a method; or a class, whose `__init__` is meant, and of a module `forward` too as
            `explain_kinds` has it.
    """
    if not isinstance(function, type):
        return _checked(function)
    function.__init__ = _checked(function.__init__, settings=dataclasses.is_dataclass(function))  # type: ignore[misc]
    forward = vars(function).get("forward")
    if issubclass(function, nn.Module) and forward is not None and not hasattr(forward, "__wrapped__"):
        function.forward = explain_kinds(forward)
    return function


def explain_kinds(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Say which argument does not fit, where a call fails: by kind, axes and dtype, by layer, by docstring.

    For what is called so often that `check_kinds` would be felt: nothing is looked at in a call that succeeds.

    Args:
        function: a function or a method.
    """

    @functools.wraps(function)
    def explained(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        try:
            return function(*args, **kwargs)
        except _failures.TOLD as error:
            told = _told(function, args, kwargs, error)
            if told is None:
                raise
            raise told from _failures.told_of(told)[0]

    explained.kinds_after = True  # type: ignore[attr-defined]
    return explained


def _told(
    function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], error: Exception
) -> Exception | None:
    """What to raise in place of the error of a failed call; None where it says enough, or nobody knows better."""
    try:
        return _explanation(function, args, kwargs, error)
    except Exception:  # Looking at the arguments must not hide the error.
        return None


def _explanation(
    function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], error: Exception
) -> Exception | None:
    root, certain = _failures.told_of(error)
    ours = _failures.raised_in(error)
    if root is error and ours and ours != __name__:
        return None
    names = _positional(function)
    kinds = _customary(_kinds(function), settings=False)
    if _failures.is_of_call(error) and (unknown := _unknown(function, names, kwargs)):
        return TypeError(f"{_where(function)}: {unknown}")
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    try:
        for name, value in given.items():
            if name in kinds:
                _check(function, name, value, kinds[name])
                _check_axes(function, name, value, kinds[name])
        _check_weights(function, names, given)
    except (TypeError, ValueError) as complaint:
        return _failures.Failure(str(complaint), type(complaint), True).error(root)
    if (root is error and ours) or _failures.is_of_call(error) or _failures.is_foreign(error, function):
        return None
    without_self = {name: value for name, value in given.items() if name not in ("self", "cls")}
    failure = _failures.explained(function, _where(function), without_self, root)
    return None if failure is None or (certain and not failure.certain) else failure.error(root)


def _unknown(function: Any, names: tuple[str, ...], given: Iterable[str]) -> str | None:
    """What to say of an argument that the function does not have."""
    parameters = inspect.signature(function).parameters
    if any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        return None
    known = [name for name in parameters if name not in ("self", "cls")]
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            return f"there is no argument {name!r}; " + (
                f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
            )
    return None


def check_record(function: Any) -> Any:
    """`check_kinds` for the constructor of a dataclass of results, whose numbers may be anything, NaN too.

    Args:
        function: its `__init__`.
    """
    return _checked(function, settings=True, results=True)


class _Guard:
    """What is known of a function's arguments; filled at the first call, when the names in annotations are there."""

    __slots__ = ("function", "ids", "kinds", "names", "numbers", "quick", "results", "settings")

    def __init__(self, function: Any, *, settings: bool, results: bool) -> None:
        self.function, self.settings, self.results = function, settings, results
        self.names = _positional(function)
        self.kinds: dict[str, Any] = {}
        self.quick: dict[str, set[type]] = {}
        self.numbers: dict[str, dict[type, tuple[float, float]]] = {}
        self.ids: frozenset[str] = frozenset()

    def fill(self) -> None:
        kinds = _kinds(self.function)
        self.kinds = kinds if self.results else _customary(kinds, settings=self.settings)
        self.numbers = {name: _ranges(kind) for name, kind in self.kinds.items()}
        self.ids = _failures.ids_of(self.function)
        quick = {name: _quick(kind) for name, kind in self.kinds.items()}
        for name in self.ids:
            quick.setdefault(name, set()).difference_update((Tensor, nn.Parameter))
        self.quick = {**quick, "self": set()}

    def look(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ValueError | None:
        """Refuse a wrong kind. What settings say themselves about values of the right kind comes first: such an error
        is returned."""
        if not self.quick:
            self.fill()
        kinds, quick, late = self.kinds, self.quick, None
        for name, value in (*zip(self.names, args, strict=False), *kwargs.items()):
            if name not in kinds or type(value) in quick[name]:
                continue
            numbers = self.numbers[name]
            if self.results and type(value) is float and float in numbers:
                continue
            ends = numbers.get(type(value))
            if ends is not None and ends[0] <= value <= ends[1]:  # NaN is in no range
                continue
            try:
                self.look_at(name, value)
            except ValueError as error:
                if not self.settings:
                    raise
                late = late or error
        return late

    def look_at(self, name: str, value: object) -> None:
        _check(self.function, name, value, self.kinds[name])
        _check_axes(self.function, name, value, self.kinds[name])
        if name in self.ids:
            _check_ids(self.function, name, value)
        elif _is_settled_by_class(self.kinds[name], value):
            self.quick[name].add(type(value))


# By function. In the closure of the guard, torch.compile would meet what it cannot trace.
_GUARDS: dict[Any, _Guard] = {}


def _checked(function: Any, *, settings: bool = False, results: bool = False) -> Any:
    _GUARDS[function] = _Guard(function, settings=settings, results=results)

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        late = _GUARDS[function].look(args, kwargs)
        try:
            result = function(*args, **kwargs)
        except _failures.TOLD as error:
            told = _told(function, args, kwargs, error)
            if told is None:
                raise
            raise told from _failures.told_of(told)[0]
        if late is not None:
            raise late
        return result

    checked.kinds_before = True  # type: ignore[attr-defined]
    return checked


def _positional(function: Any) -> tuple[str, ...]:
    """Names of the arguments that may come without their names."""
    parameters = inspect.signature(function).parameters.values()
    return tuple(
        one.name for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)
    )


@functools.cache
def _defaults(function: Any) -> Mapping[str, tuple[Any, ...]]:
    parameters = inspect.signature(function).parameters.values()
    return {one.name: (one.default,) for one in parameters if one.default is not one.empty}


def _quick(kind: Any) -> set[type]:
    """Types whose values are right without a look at them."""
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    known = {
        int: (int,),
        Tensor: (Tensor, nn.Parameter),
        float: (int,),
        bool: (bool,),
        str: (str,),
        type(None): (type(None),),
    }
    return {one for part in parts for one in known.get(part, ())}


def _ranges(kind: Any) -> dict[type, tuple[float, float]]:
    """The smallest and the largest numbers that are right without a further look, by type."""
    found: dict[type, tuple[float, float]] = {}
    for part in get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,):
        plain, *more = get_args(part) if get_origin(part) is Annotated else (part,)
        bounds = [one for one in more if isinstance(one, Bounds)]
        if plain in (int, float) and len(bounds) == len(more) <= 1:
            for of in (int,) if plain is int else (float, int):
                found[of] = (bounds[0] if bounds else Bounds()).ends()
    return found


def _is_settled_by_class(kind: Any, value: object) -> bool:
    """Whether all values of its class are as right as this one; asking whether one has a protocol takes long."""
    if kind is float or get_origin(kind) is not None or not isinstance(kind, type) or _is_open(kind):
        return False
    return isinstance(value, kind) and not hasattr(value, "_orig_mod")


# What whole numbers of these names are in settings: of parts of which there is at least one.
_PARTS = re.compile(
    r"dim|embed_dim|d_model|d_state|d_conv|head_?dim|hidden_dim|width|depth|num_layers|n_layer|num_heads|num_kv_heads|heads"
    r"|vocab_size|((in|out|z|code)_)?channels|units|expand|num_steps|norm_groups|num_codes"
)
# What numbers of a name are everywhere, where an annotation says no bounds of its own. Names are the field's.
_CUSTOMS: tuple[tuple[str, type, Bounds], ...] = (
    (
        r"patch_size|image_size|batch_size|beam|kernel_size|block_size|top_k",
        int,
        Bounds(least=1),
    ),
    (
        rf"{_PARTS.pattern}|num_.*|.*_(dim|heads|layers|tokens|steps|channels|length|kv_heads|bits|groups)|neighbours"
        r"|.*_conv|d_intermediate|batch|counts?|steps|updates|iterations|rounds|epochs|layers?|length|longest|shortest|max_.*"
        r"|copies|context|label|window|grid|scales|frames|horizon|row|pairs|rows|columns|side|size|factor|keep|every|rollouts"
        r"|simulations|prefix|queries|keys",
        int,
        Bounds(least=0),
    ),
    (
        r"(.*_)?(dropout|drop|share)|drop_path|held_out|discount|top_p|min_p|smoothing",
        float,
        Bounds(least=0, most=1),
    ),
    (r"temperature|max_grad_norm|clip(_low|_high|_norm)?|value_clip|tolerance", float, Bounds(least=0)),
    (r"lr|.*_lr|(.*_)?eps|noise|jitter|gate_init|price", float, Bounds(least=0, finite=True)),
    (
        r"rope_\w+|prefix_theta|attn_rotary_base|mlp_ratio|snr_clip|scaling",
        float,
        Bounds(above=0, finite=True),
    ),
    (
        r"cfg|cfg_scale|guidance|strength|.*_weight|beta|gamma0?|zeta|tau|sharpness",
        float,
        Bounds(finite=True),
    ),
)


@functools.cache
def _custom(name: str, *, settings: bool) -> Mapping[type, Bounds]:
    found: dict[type, Bounds] = {int: Bounds(least=1)} if settings and _PARTS.fullmatch(name) else {}
    for pattern, kind, bounds in _CUSTOMS:
        if kind not in found and re.fullmatch(pattern, name):
            found[kind] = bounds
    return found


def _customary(kinds: Mapping[str, Any], *, settings: bool) -> dict[str, Any]:
    """Annotations with the bounds that numbers of a name have everywhere."""
    return {name: _bounded(kind, _custom(name, settings=settings)) for name, kind in kinds.items()}


def _bounded(kind: Any, bounds: Mapping[type, Bounds]) -> Any:
    if kind in (int, float):
        return Annotated[kind, bounds[kind]] if kind in bounds else kind
    if bounds and get_origin(kind) in (Union, UnionType):
        return Union[tuple(_bounded(part, bounds) for part in get_args(kind))]  # noqa: UP007
    return kind


def argument_kinds(function: Any) -> dict[str, Any]:
    """What the annotations of a function or method say, by argument; `ARRAY` for numpy's arrays.

    Args:
        function: with or without the decorator, bound or not.
    """
    kinds = _kinds(inspect.unwrap(getattr(function, "__func__", function)))
    return {name: _without_bounds(kind) for name, kind in kinds.items()}


def _without_bounds(kind: Any) -> Any:
    """An annotation without what is said of its values."""
    if get_origin(kind) is Annotated:
        return get_args(kind)[0]
    if get_origin(kind) in (Union, UnionType):
        return Union[tuple(_without_bounds(part) for part in get_args(kind))]  # noqa: UP007
    return kind


@functools.cache
def _kinds(function: Any) -> dict[str, Any]:
    """See `argument_kinds`."""
    written = dict(function.__annotations__)
    written.pop("return", None)
    try:
        hints = get_type_hints(function, include_extras=True)
    except NameError:
        known = function.__globals__ | _for_type_checkers(function.__module__)
        hints = {name: _evaluated(text, known) for name, text in written.items()}
    numpy_names = ("ArrayLike", "NDArray", "Vector", "Array")
    arrays = {
        name: OPTIONAL_ARRAY if "None" in str(text) else ARRAY
        for name, text in written.items()
        if str(text).startswith(numpy_names)
    }
    variadic = {
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    kinds = {**{name: kind for name, kind in hints.items() if name in written and kind is not Any}, **arrays}
    return {name: kind for name, kind in kinds.items() if name not in variadic}


@functools.cache
def _for_type_checkers(module: str) -> dict[str, Any]:
    """What a module imports of arcore for type checkers only; when its functions are called, that can be imported."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    guarded = [
        node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    return {
        alias.asname or alias.name: getattr(importlib.import_module(home), alias.name)
        for node in guarded
        for line in node.body
        if isinstance(line, ast.ImportFrom) and (home := line.module or "").startswith("arcore.")
        for alias in line.names
    }


def _evaluated(text: Any, known: dict[str, Any]) -> Any:
    try:
        return eval(text, known) if isinstance(text, str) else text
    except NameError:
        return Any


def _check(function: Any, name: str, value: object, kind: Any) -> None:
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    where = f"{_where(function)}: "
    fitting = next((part for part in parts if _fits(_without_bounds(part), value)), None)
    if fitting is not None:
        if isinstance(value, float) and math.isnan(value):
            raise ValueError(f"{where}expected {name} to be a number but got nan")
        for bounds in get_args(fitting)[1:] if get_origin(fitting) is Annotated else ():
            if isinstance(bounds, Bounds) and _is_known(value) and not bounds.hold(value):  # type: ignore[arg-type]
                raise ValueError(f"{where}expected {name} to be {bounds.words()} but got {value}")
        _check_items(where, name, value, _without_bounds(fitting))
        return
    # What stands for an argument that was left out needs no kind; nor does the sentinel of a dataclass's factory.
    if any(value is default for default in _defaults(function).get(name, ())):
        return
    parts = tuple(_without_bounds(part) for part in parts)
    for part in parts:
        if get_origin(part) is Literal:
            try:
                check_choice(name, value, get_args(part))
            except ValueError as error:
                raise ValueError(f"{where}{error}") from None
    wanted = " or ".join(dict.fromkeys(_words(part) for part in parts if part is not type(None)))
    none = " or None" if type(None) in parts else ""
    raise TypeError(f"{where}expected {name} to be {wanted}{none} but got {came(value)}")


def _is_known(value: object) -> bool:
    """Whether a number can be looked at: not one on another device, which would be waited for, nor one of `vmap`."""
    return not isinstance(value, Tensor) or (
        value.is_cpu and not torch._C._functorch.is_functorch_wrapped_tensor(value)
    )


def _check_items(where: str, name: str, value: object, kind: Any) -> None:
    """The first items of a list or tuple, and how many a tuple of a fixed length has."""
    of = get_args(kind)
    if not isinstance(value, list | tuple) or not of or get_origin(kind) in (Literal, Union, UnionType):
        return
    if get_origin(kind) is tuple and of[-1] is not Ellipsis:
        if len(value) != len(of):
            raise ValueError(f"{where}expected {name} as {len(of)} values but got {came(value)}")
        wanted = list(zip(of, value, strict=True))
    else:
        wanted = [(of[0], item) for item in value[:_LOOKED_AT]]
    for place, (item_kind, item) in enumerate(wanted):
        parts = get_args(item_kind) if get_origin(item_kind) in (Union, UnionType) else (item_kind,)
        if not any(_fits(_without_bounds(part), item) for part in parts):
            words = " or ".join(_words(_without_bounds(part)) for part in parts)
            raise TypeError(f"{where}expected {name}[{place}] to be {words} but got {came(item)}")


def _check_axes(function: Any, name: str, value: object, kind: Any) -> None:
    if not isinstance(value, Tensor):
        return
    for part in get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,):
        for axes in get_args(part)[1:] if get_origin(part) is Annotated else ():
            complaint = axes.complaint(name, value) if isinstance(axes, Axes) else None
            if complaint is not None:
                raise ValueError(f"{_where(function)}: {complaint}")


def _check_ids(function: Any, name: str, value: object) -> None:
    """Fractions where the docstring speaks of int64: they would be cut off silently."""
    if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
        raise TypeError(
            f"{_where(function)}: expected {name} of dtype int64 but got {dtype_name(value.dtype)}"
        )


def _check_weights(function: Any, names: tuple[str, ...], given: Mapping[str, Any]) -> None:
    """A method of a module whose weights have another dtype than what it is given."""
    module = given.get(names[0]) if names else None
    weights = next(module.parameters(), None) if isinstance(module, nn.Module) else None
    if weights is None or not weights.is_floating_point():
        return
    for name, value in given.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != weights.dtype:
            raise TypeError(
                f"{_where(function)}: expected {name} of the weights' dtype {dtype_name(weights.dtype)} but got "
                f"{dtype_name(value.dtype)}"
            )


def _where(function: Any) -> str:
    room = "masks." if function.__module__.startswith("arcore.masks") else ""
    return f"arcore.{room}{function.__qualname__.removesuffix('.__init__')}"


def _fits(kind: Any, value: object) -> bool:
    if isinstance(kind, TypeVar):
        kind = kind.__bound__ or Any
    if kind is Any:
        return True
    if kind is None or kind is type(None):
        return value is None
    if kind in (ARRAY, OPTIONAL_ARRAY):
        return _is_array(value) or (value is None and kind == OPTIONAL_ARRAY)
    origin = get_origin(kind) or kind
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in get_args(kind))
    if kind is int:
        return _is_whole(value)
    if kind is float:
        return _is_number(value)
    if kind is bool or kind is str:
        return isinstance(value, kind)
    if not isinstance(origin, type):
        return True
    if issubclass(origin, os.PathLike):
        return isinstance(value, str | os.PathLike)
    if origin.__module__ == "collections.abc" and origin.__name__ == "Callable":
        return callable(value)
    if issubclass(origin, Mapping):
        return isinstance(value, Mapping)
    if origin.__module__ == "collections.abc" or origin in (list, tuple):
        # What is iterated over; a text would be taken letter by letter.
        return not isinstance(value, str | bytes | Mapping) and hasattr(value, "__iter__")
    # What torch.compile makes of a module stands for it.
    value = getattr(value, "_orig_mod", value)
    return value is not None if _is_open(origin) else isinstance(value, origin)


def _is_open(kind: type) -> bool:
    """Whether it is a protocol of which nobody can be asked whether it is one."""
    return bool(getattr(kind, "_is_protocol", False)) and not getattr(kind, "_is_runtime_protocol", False)


def _is_whole(value: object) -> bool:
    try:
        check_whole("", value, -(2**63))
    except (TypeError, ValueError):
        return False
    return True


def _is_number(value: object) -> bool:
    """Infinity and NaN are numbers; what they mean is the function's to say."""
    if isinstance(value, bool | str | bytes) or not hasattr(value, "__float__"):
        return False
    size = value.numel() if isinstance(value, Tensor) else getattr(value, "size", 1)
    return bool(size == 1)


def _is_array(value: object) -> bool:
    import numpy as np

    if value is None or isinstance(value, str | bytes | Mapping):
        return False
    try:
        return np.asarray(value).dtype.kind in "biufc"
    except (TypeError, ValueError, RuntimeError):
        return False


def _words(kind: Any) -> str:
    origin = get_origin(kind) or kind
    known: dict[Any, str] = {
        Tensor: "a tensor",
        int: "a whole number",
        float: "a number",
        bool: "True or False",
        str: "a text",
        ARRAY: "an array of numbers",
        OPTIONAL_ARRAY: "an array of numbers or None",
    }
    if isinstance(kind, TypeVar):
        return _words(kind.__bound__)
    if kind is None or kind is type(None):
        return "None"
    if kind in known:
        return known[kind]
    if origin is Literal:
        return "one of " + ", ".join(map(repr, get_args(kind)))
    if not isinstance(origin, type):
        return f"a {kind}"
    if issubclass(origin, os.PathLike):
        return "a path"
    if issubclass(origin, Mapping):
        return "a table of names and values"
    if origin.__module__ == "collections.abc" and origin.__name__ == "Callable":
        return "a function"
    if origin.__module__ == "collections.abc" or origin in (list, tuple):
        return "a sequence"
    article = "an" if origin.__name__[0] in "AEIO" else "a"
    return f"{article} {origin.__name__}"


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def came(value: object) -> str:
    """A value and its kind, for a message."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {dtype_name(value.dtype)}"
    shown = repr(value)
    return f"{shown if len(shown) <= 40 else shown[:40] + '...'} ({type(value).__name__})"


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """Raise ValueError unless `value` is one of `choices`; the message suggests a close one."""
    known = list(choices)
    if not any(type(value) is type(one) and value == one for one in known):
        close = difflib.get_close_matches(str(value), [str(one) for one in known], n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"expected {name} to be one of {', '.join(map(repr, known))} but got {value!r}{hint}"
        )


def check_whole(name: str, value: object, least: int, unit: str = "") -> int:
    """`value` as an int.

    Args:
        name: of the argument.
        value: what came.
        least: the smallest that is allowed.
        unit: of the number, for the message.

    Raises:
        TypeError: it is no whole number; True and False are none.
        ValueError: it is below `least`.
    """
    one = unit.removesuffix("s")
    many = f" {one}s" if unit else ""
    unit = "" if not unit else f" {one}" if least == 1 else many
    number: int | None = None
    if not isinstance(value, bool) and hasattr(value, "__index__"):
        try:
            number = operator.index(value)
        except TypeError:  # a tensor of another kind
            number = None
    if number is None:
        raise TypeError(f"{name} must be a whole number{' of' + many if many else ''} but got {value!r}")
    if number < least:
        raise ValueError(f"{name} must be at least {least}{unit} but got {number}")
    return number
