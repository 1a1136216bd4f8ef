"""ssd on a GPU: the checks of gpu_cases.py there and on the CPU, and what its kernels leave to selective_scan's."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from arcore.ops import reference_ssd, ssd
from tests import device_checks
from tests.cuda_host.build import installed, unavailable
from tests.ssd import gpu_cases
from tests.ssd.cases import Case, by_selective_scan, call, check_against_reference, make_case

# The name of the module is also that of its function.
module = importlib.import_module("arcore.ops.ssd")


@pytest.mark.parametrize(("check", "device"), device_checks.parameters(gpu_cases.CHECKS))
def test_check(check: device_checks.Check, device: str) -> None:
    device_checks.run_check(check, device)


@pytest.mark.parametrize(
    "check", [c for c in gpu_cases.CHECKS if c not in gpu_cases.NOT_DISTURBED], ids=lambda c: c.__name__
)
def test_check_notices_wrong_results(check: device_checks.Check, monkeypatch: pytest.MonkeyPatch) -> None:
    device_checks.assert_notices(check, gpu_cases, gpu_cases.FUNCTIONS, monkeypatch)


CASES: list[Callable[[], Any]] = [
    lambda: make_case(initial=True),
    lambda: make_case(skip="head", gate=False, softplus=False, reverse=True),
    lambda: make_case(skip=None, bias=False, limit=(0.2, 0.7)),
    lambda: make_case(1, 40, 2, 9, 130, 1, initial=True),
    lambda: make_case(lengths=[5, 0, 40, 33], initial=True, reverse=True),
    lambda: make_case(2, 60, ids=torch.arange(-1, 5).repeat_interleave(10).expand(2, 60).int(), initial=True),
    lambda: make_case(length=50).to(torch.bfloat16),
    lambda: make_case(2, 0),
]


@pytest.mark.parametrize("kernels", ["cpu", "sm_80"])
@pytest.mark.parametrize("i", range(len(CASES)))
def test_by_selective_scan(i: int, kernels: str) -> None:
    """Against the reference, by selective_scan's CPU kernels and by its sm_80 kernels run on the CPU."""
    if kernels == "cpu":
        check_against_reference(CASES[i](), by_selective_scan)
        return
    if reason := unavailable():
        pytest.skip(reason)
    with installed("selective_scan"):
        check_against_reference(CASES[i](), by_selective_scan)


def test_forward_mode_by_selective_scan() -> None:
    """A GPU has it, because selective_scan has."""
    case = make_case(2, 40, 4, 8, 5, initial=True)
    way = torch.randn(case.x.shape, generator=torch.Generator().manual_seed(1))
    found = []
    for c, function in ((case, by_selective_scan), (case.to(torch.float64), reference_ssd)):

        def run(x: Tensor, c: Any = c, function: Any = function) -> Any:
            return call(function, replace(c, x=x))

        found.append(torch.func.jvp(run, (c.x,), (way.to(c.x.dtype),))[1])
    for ours, known in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), known, rtol=1e-4, atol=1e-4)


def _asks_for_others(case: Case) -> bool:
    answers: list[bool] = []

    def ask(
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Any,
        z: Any,
        bias: Any,
        *_: Any,
        **named: Any,
    ) -> Any:
        limits = (named["cu_seqlens"], named["seq_idx"], named["dt_limit"])
        v = module._check(x, dt, A, B, C, D, z, bias, named["initial_state"], *limits)
        answers.append(module._beyond_the_kernels(v))
        return x.sum()

    call(ask, case)
    return answers[0]


def test_what_the_kernels_of_a_gpu_leave_to_others() -> None:
    small, wide = make_case(state=128), make_case(state=129)
    tracked = [replace(c, x=c.x.clone().requires_grad_()) for c in (small, wide)]
    assert [_asks_for_others(c) for c in (small, wide, *tracked)] == [False, False, False, True]
    sixteen = wide.map(lambda n, t: t.bfloat16() if n in ("x", "B", "C") else t)
    assert not _asks_for_others(replace(sixteen, x=sixteen.x.requires_grad_()))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(small.dt, small.dt)
        assert _asks_for_others(replace(small, dt=dual)) and not _asks_for_others(small)
    answers: list[bool] = []

    def asked(x: Tensor, case: Case = small) -> Tensor:
        answers.append(_asks_for_others(replace(case, x=x)))
        return x.sum()

    torch.func.jvp(asked, (small.x,), (small.x,))
    torch.vmap(lambda x: torch.func.jvp(asked, (x,), (x,))[0])(small.x[None])
    torch.func.grad(asked)(small.x)
    assert answers == [True, True, False]


def test_tensors_that_claim_to_be_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Needs no GPU: fake tensors have a device but no memory; the op itself would ask for the device."""
    taken: list[Any] = []
    monkeypatch.setattr(module, "_by_selective_scan", lambda *v: (taken.append(v), ("out", "state"))[1])
    monkeypatch.setattr(module, "checked_call", lambda *v: ("own out", "own state"))
    cases = (
        (16, torch.float32, "own out"),
        (200, torch.bfloat16, "own out"),
        (200, torch.float32, "out"),
    )
    with FakeTensorMode():
        for state, dtype, expected in cases:
            case = make_case(state=state).map(
                lambda _, t, d=dtype: torch.empty(t.shape, dtype=d, device="cuda:0")
            )
            assert call(ssd, replace(case, x=case.x.requires_grad_()))[0] == expected
    assert taken[0][0].x.device.type == "cuda" and taken[0][1:3] == (True, (0.0, math.inf))


def test_other_devices_are_refused() -> None:
    case = make_case().map(lambda _, t: t.to("meta"))
    assert call(ssd, case)[0].device.type == "meta"
    with FakeTensorMode():
        case = make_case().map(lambda _, t: torch.empty(t.shape, dtype=t.dtype, device="xpu:0"))
        with pytest.raises(
            NotImplementedError, match=r"arcore\.ssd: expected tensors on a CPU or a CUDA GPU but got xpu:0"
        ):
            call(ssd, case)
