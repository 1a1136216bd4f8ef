"""The conditions that conftest.py promises to the other tests."""

from __future__ import annotations

import hypothesis
import matplotlib
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

ALLOCATIONS = {
    "empty": lambda: torch.empty(3, 5),
    "empty_like": lambda: torch.empty_like(torch.zeros(3, 5)),
    "new_empty": lambda: torch.zeros(2).new_empty(3, 5),
    "empty_strided": lambda: torch.empty_strided((3, 5), (5, 1)),
    "resize_": lambda: torch.empty(0).resize_(3, 5),
    # The way of an op library that allocates through torch's stable ABI.
    "dispatcher": lambda: torch.ops.aten.empty.memory_format([3, 5]),
    "bfloat16": lambda: torch.empty(3, 5, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_uninitialised_memory_is_nan(name: str) -> None:
    x: Tensor = ALLOCATIONS[name]()
    assert x.shape == (3, 5)
    assert x.isnan().all()


def test_uninitialised_integers_are_out_of_range() -> None:
    assert (torch.empty(4, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()


@pytest.mark.plain_empty
def test_marker_turns_the_fill_off() -> None:
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("_", range(2))
def test_each_test_starts_from_the_same_state(_: int) -> None:
    assert torch.rand(1).item() == pytest.approx(0.4962566, abs=1e-6)
    assert torch.get_default_dtype() == torch.float32
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(torch.get_num_threads() + 1)


def test_no_display_is_needed() -> None:
    assert matplotlib.get_backend().lower() == "agg"


@hypothesis.given(st.integers(0, 3))
def test_property_tests_run_under_the_same_conditions(n: int) -> None:
    assert torch.empty(n + 1).isnan().all()


def test_fill_does_not_reach_compiled_results() -> None:
    def double(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        out.copy_(x * 2)
        return out

    x = torch.arange(4.0)
    assert torch.equal(torch.compile(double, fullgraph=True, backend="aot_eager")(x), x * 2)


@pytest.mark.thinned
@pytest.mark.parametrize("name", ["a", "b", "c", "d"])
@pytest.mark.parametrize(("i", "j"), [(1, 5), (2, 5)])
@pytest.mark.parametrize("flag", [False, True])
def test_a_combination(request: pytest.FixtureRequest, name: str, i: int, j: int, flag: bool) -> None:
    """Those that are not slow hold each value, and two of two values meet in each way."""
    tests = [t for t in request.session.items if getattr(t, "originalname", "") == "test_a_combination"]
    quick = [t.callspec.params for t in tests if t.get_closest_marker("slow") is None]
    assert {p["name"] for p in quick} == {"a", "b", "c", "d"}
    assert {(p["i"], p["flag"]) for p in quick} == {(1, False), (2, True), (1, True), (2, False)}
    assert len(quick) == 4
    assert len(tests) == 16
