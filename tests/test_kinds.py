"""`arcore._kinds`: what the guard of arguments looks at, and what it lets through."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal, Protocol, TypeVar

import pytest
import torch
from torch import Tensor, nn

from arcore._kinds import Axes, Bounds, Positive, Size, argument_kinds, check_kinds, explain_kinds

Module = TypeVar("Module", bound=nn.Module)


class Judge(Protocol):
    """Nobody can be asked whether it is one."""

    def judge(self) -> float: ...


@check_kinds
def ask(judge: Judge, times: int = 1) -> int:
    return times


def test_a_protocol_that_cannot_be_asked_for_takes_anything_every_time():
    assert [ask(object()), ask(object(), 2), ask("x", times=3)] == [1, 2, 3]
    with pytest.raises(TypeError, match=r"arcore\.ask: expected times to be a whole number but got 'x'"):
        ask(object(), "x")


def test_what_was_right_once_does_not_hide_what_is_wrong_later():
    @check_kinds
    def f(number: float, count: int, module: Module, mode: Literal["a", "b"] = "a") -> None: ...

    f(1.0, 1, nn.Linear(1, 1))
    f(torch.tensor(1.0), torch.tensor(1), nn.Identity(), "b")
    for wrong, says in (
        ((math.nan, 1, nn.Identity()), "number to be a number but got nan"),
        ((1.0, True, nn.Identity()), "count to be a whole number"),
        ((1.0, torch.tensor([1, 2]), nn.Identity()), "count to be a whole number"),
        ((1.0, 1, "x"), "module to be a Module"),
        ((1.0, 1, nn.Identity(), "c"), "mode to be one of 'a', 'b' but got 'c'"),
    ):
        with pytest.raises((TypeError, ValueError), match=says):
            f(*wrong)


def test_bounds_axes_and_items():
    @check_kinds
    def f(
        size: Size = 1,
        rate: Positive = 1.0,
        share: Annotated[float, Bounds(least=0, most=1)] = 0.5,
        x: Annotated[Tensor, Axes("B ... C", floating=True)] | None = None,
        names: tuple[str, ...] = (),
        pair: tuple[int, float] = (1, 2.0),
    ) -> None: ...

    f(2, math.pi, 1.0, torch.ones(2, 3), ("a",), (1, 2))
    f(x=torch.ones(2, 3, 4, 5))
    for given, says in (
        ({"size": 0}, "size to be at least 1 but got 0"),
        ({"rate": math.inf}, "rate to be finite and above 0 but got inf"),
        ({"share": 1.5}, "share to be from 0 to 1 but got 1.5"),
        ({"x": torch.ones(2)}, r"x of shape \[B, ..., C\] but got \(2,\)"),
        ({"x": torch.ones(2, 3).long()}, "x of a floating dtype but got int64"),
        ({"names": ("a", 3)}, r"names\[1\] to be a text but got 3"),
        ({"pair": (1,)}, "pair as 2 values but got"),
        ({"pair": ("x", 2.0)}, r"pair\[0\] to be a whole number but got 'x'"),
    ):
        with pytest.raises((TypeError, ValueError), match=says):
            f(**given)


def test_the_ends_of_bounds_are_the_last_numbers_within():
    for bounds in (
        Bounds(),
        Bounds(least=1),
        Bounds(above=0, finite=True),
        Bounds(least=0, most=1),
        Bounds(finite=True),
    ):
        low, high = bounds.ends()
        assert bounds.hold(low)
        assert bounds.hold(high)
        assert low == -math.inf or not bounds.hold(math.nextafter(low, -math.inf))
        assert high == math.inf or not bounds.hold(math.nextafter(high, math.inf))


def test_numbers_of_a_name_have_its_bounds_unless_an_annotation_says_others():
    @check_kinds
    def f(temperature: float = 1.0, top_p: float | None = None, depth: int = 1, steps: int = 1) -> None: ...

    @check_kinds
    def g(steps: Annotated[int, Bounds(least=-1)] = 1) -> None: ...

    f(0.0, 1.0, 0, 0)
    g(-1)
    for given, says in (
        ({"temperature": -0.1}, "temperature to be at least 0 but got -0.1"),
        ({"top_p": 1.5}, "top_p to be from 0 to 1 but got 1.5"),
        ({"top_p": math.nan}, "top_p to be a number but got nan"),
        ({"depth": -1}, "depth to be at least 0 but got -1"),
        ({"steps": -1}, "steps to be at least 0 but got -1"),
        ({"step": 1}, "there is no argument 'step'; did you mean 'steps'?"),
    ):
        with pytest.raises((TypeError, ValueError), match=re.escape(says)):
            f(**given)


def test_what_an_argument_lacks_is_said_of_that_argument():
    @check_kinds
    def f(model: Any, other: Tensor | None = None) -> Any:
        return model.config

    for wrong, says in ((None, "but None has none"), (nn.Linear(1, 1), "but a Linear has none")):
        with pytest.raises(TypeError, match=f"f: expected model to have 'config', {says}"):
            f(wrong)
        with pytest.raises(TypeError, match="expected model to have"):
            f(wrong, None)


def test_a_users_own_function_keeps_its_errors():
    @check_kinds
    def f(judge: Callable[[Tensor], float], x: Tensor) -> float:
        return judge(x)

    space: dict[str, Any] = {"__name__": "somebody"}
    exec("def judge(x):\n    return {}['a']", space)
    with pytest.raises(KeyError, match="a"):
        f(space["judge"], torch.ones(2))


def test_words_behind_a_name_with_a_star_are_not_taken_for_others():
    @check_kinds
    def f(*shape: int, device: str | None = None) -> tuple[int, ...]:
        return shape

    assert f(1, 2, 3, device="cpu") == (1, 2, 3)


def test_explained_after_the_fact():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)

        @explain_kinds
        def forward(self, x: Annotated[Tensor, Axes("... C", floating=True)], scale: float = 1.0) -> Tensor:
            if scale < 0:
                raise ValueError("own words")
            return self.linear(x) * scale

    module = Twice()
    assert module(torch.ones(2)).shape == (2,)
    for given, says in (
        (([1, 2],), "x to be a tensor but got"),
        ((torch.tensor(1.0),), r"x of shape \[..., C\] but got \(\)"),
        ((torch.ones(2).double(),), "x of the weights' dtype float32 but got float64"),
        ((torch.ones(2), -1), "own words"),
        ((torch.ones(3, 3),), r"x with 2 values in its last axis but got \(3, 3\)"),
    ):
        with pytest.raises((TypeError, ValueError), match=says):
            module(*given)


def test_kinds_of_arguments_are_told_without_their_bounds():
    def f(size: Size, rate: Positive | None = None) -> None: ...

    assert argument_kinds(check_kinds(f)) == {"size": int, "rate": float | None}
