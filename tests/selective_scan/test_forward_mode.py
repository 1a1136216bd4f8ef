"""Tangents of the scan: against the reference's in float64, under torch.func's transforms, and what is refused."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch

from arcore.ops import _selective_scan_tangent, reference_selective_scan, selective_scan
from tests.isa import ISAS, run_under
from tests.selective_scan.cases import FLOATS, call, make_case


def moved(case, f, names, seed=1):
    """Output, last state and their tangents along tangents of the named arguments."""
    generator = torch.Generator().manual_seed(seed)
    given = case.floats()
    along = {n: torch.randn(t.shape, generator=generator).to(t.dtype) for n, t in given.items() if n in names}

    def run(*tensors):
        return call(f, replace(case, **dict(zip(along, tensors, strict=True))))

    primals = tuple(given[n] for n in along)
    (out, last), (out_t, last_t) = torch.func.jvp(run, primals, tuple(along.values()))
    return {"out": out, "last_state": last, "out_t": out_t, "last_state_t": last_t}


def check(case, names=FLOATS):
    ours = moved(case, selective_scan, names)
    exact = moved(case.to(torch.float64), reference_selective_scan, names)
    eager = moved(case, reference_selective_scan, names)
    rounding = {torch.float32: 0.0, torch.bfloat16: 2.0**-8}
    for name, value in ours.items():
        assert value.dtype == eager[name].dtype
        if value.numel() == 0:
            continue
        scale = exact[name].abs().max().item()
        error = (value.double() - exact[name]).abs().max().item()
        lost = (eager[name].double() - exact[name]).abs().max().item()
        assert error <= max(1e-5 * scale, 2 * lost) + rounding[value.dtype] * scale, name


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 200])
def test_lengths(length):
    check(make_case(2, 21, length, 5, initial=True))


@pytest.mark.parametrize(
    ("b", "c"), [("constant", "varying"), ("varying", "constant"), ("2", "constant"), ("4", "2")]
)
def test_kinds_of_matrices(b, c):
    check(make_case(2, 20, 70, 6, b=b, c=c, initial=True))


@pytest.mark.parametrize("name", FLOATS)
def test_one_argument_at_a_time(name):
    check(make_case(2, 12, 70, 4, initial=True), (name,))


def test_options():
    check(make_case(2, 12, 70, 4, softplus=False, bias=False, gate=False, skip=False, reverse=True))
    check(make_case(lengths=[5, 0, 70], initial=True))
    ids = torch.tensor([[-1, 0, 0, -1, 1, 1], [2, 2, 2, 2, -1, -1]], dtype=torch.int32)
    check(make_case(2, 12, 6, 4, ids=ids, initial=True))
    check(make_case(2, 20, 70, 16, dtype=torch.bfloat16))


GPU_CASES = (
    lambda: make_case(2, 21, 0, 5, initial=True),
    lambda: make_case(2, 21, 65, 5, initial=True),
    lambda: make_case(2, 20, 70, 6, b="constant", c="4", initial=True),
    lambda: make_case(2, 20, 70, 6, b="2", c="constant", skip=False),
    lambda: make_case(2, 12, 70, 4, softplus=False, bias=False, gate=False, skip=False, reverse=True),
    lambda: make_case(lengths=[5, 0, 70], initial=True),
    lambda: make_case(lengths=[0, 5, 70, 1, 0], initial=True, reverse=True, c="constant"),
    lambda: make_case(3, 12, 6, 4, ids=IDS, initial=True),
    lambda: make_case(3, 12, 6, 4, ids=IDS, reverse=True),
    lambda: make_case(2, 20, 70, 16, dtype=torch.bfloat16),
)
IDS = torch.tensor([[-1, 0, 0, -1, 1, 1], [2, 2, 2, 2, -1, -1], [-1] * 6], dtype=torch.int32)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The op's tangents by what CUDA runs, some channels at a time."""
    monkeypatch.setattr(_selective_scan_tangent, "STATES", 2500)
    override = torch.library.Library("arcore", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        rule = _selective_scan_tangent.tiled_tangent
        override.impl("selective_scan_tangent", rule, "CPU", allow_override=True)
    yield
    override._destroy()


@pytest.mark.parametrize("i", range(len(GPU_CASES)))
def test_the_way_of_a_gpu(as_on_a_gpu, i):
    check(GPU_CASES[i]())


@pytest.mark.parametrize("name", FLOATS)
def test_one_argument_at_a_time_as_on_a_gpu(as_on_a_gpu, name):
    check(make_case(2, 12, 70, 4, initial=True), (name,))


def test_padding_is_not_read_as_on_a_gpu(as_on_a_gpu):
    case = make_case(3, 12, 6, 4, ids=IDS, initial=True)
    clean = moved(case, selective_scan, FLOATS)

    def spoiled(name, t):
        if name not in ("u", "delta", "z", "B", "C"):
            return t
        return t.masked_fill((IDS < 0)[:, None], torch.nan)

    for name, value in moved(case.map(spoiled), selective_scan, FLOATS).items():
        assert torch.equal(value, clean[name]), name


def test_is_the_slope_of_the_op_itself():
    case = make_case(1, 8, 70, 4)
    way = torch.randn_like(case.u)
    f = lambda u: selective_scan(u, case.delta, case.A, case.B, case.C, delta_softplus=True)  # noqa: E731
    slope = (f(case.u + 1e-2 * way) - f(case.u - 1e-2 * way)) / 2e-2
    torch.testing.assert_close(torch.func.jvp(f, (case.u,), (way,))[1], slope, rtol=1e-3, atol=1e-3)


def test_jacobians_agree():
    case = make_case(1, 3, 5, 4)
    f = lambda u: selective_scan(u, case.delta, case.A, case.B, case.C, delta_softplus=True)  # noqa: E731
    forward, backward = torch.func.jacfwd(f)(case.u), torch.func.jacrev(f)(case.u)
    torch.testing.assert_close(forward, backward, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")
def test_linearize():
    case = make_case(1, 3, 5, 4)
    f = lambda u: selective_scan(u, case.delta, case.A, case.B, case.C, delta_softplus=True)  # noqa: E731
    way = torch.randn_like(case.u)
    out, linear = torch.func.linearize(f, case.u)
    assert torch.equal(out, f(case.u))
    torch.testing.assert_close(linear(way), torch.func.jvp(f, (case.u,), (way,))[1])


def test_the_output_keeps_its_gradient_and_the_tangent_says_it_has_none():
    case = make_case(1, 4, 20, 4)
    u = case.u.requires_grad_()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(u, torch.randn_like(u))
        out = selective_scan(dual, case.delta, case.A, case.B, case.C)
        value, tangent = torch.autograd.forward_ad.unpack_dual(out)
        torch.autograd.grad(value.sum(), u)
        with pytest.raises(RuntimeError, match="no second derivative; use reference_selective_scan"):
            torch.autograd.grad(tangent.sum(), u)


SCRIPT = """
import torch
from tests.selective_scan.cases import make_case
from tests.selective_scan.test_forward_mode import check
print(torch.ops.arcore.cpu_isa())
check(make_case(2, 37, 131, 19, b="1", c="constant", initial=True))
"""


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    run_under(isa, SCRIPT)
