"""opcheck, torch.compile, torch.export, autocast, second derivatives, instruction sets."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from arcore.ops import selective_scan
from tests.isa import ISAS, run_under
from tests.selective_scan.cases import make_case


def arguments(case):
    return (
        *(case.u, case.delta, case.A, case.B, case.C, case.D, case.z, case.delta_bias, case.initial_state),
        *(case.cu_seqlens, case.seq_idx, case.delta_softplus, case.reverse),
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": torch.bfloat16, "initial": True, "reverse": True},
        {"b": "constant", "c": "2", "skip": False, "gate": False, "bias": False},
        {"lengths": [3, 70], "initial": True},
        {"ids": torch.zeros(2, 70, dtype=torch.int32)},
    ],
    ids=str,
)
def test_opcheck(options):
    case = make_case(2, 6, 70, 4, **options)
    leaves = [
        t.requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
        for t in arguments(case)
    ]
    torch.library.opcheck(torch.ops.arcore.selective_scan.default, (*leaves, True))


@pytest.mark.parametrize("initial", [False, True])
def test_opcheck_of_the_backward(initial):
    case = make_case(2, 6, 70, 4, initial=initial)
    with torch.no_grad():
        _, _, states = torch.ops.arcore.selective_scan(*arguments(case), True)
    torch.library.opcheck(
        torch.ops.arcore.selective_scan_backward.default,
        (case.grad_out, case.grad_last_state, *arguments(case)[:11], states, True, False),
    )


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(8, 8 + 8 + 4 + 4)
        self.A_log = torch.nn.Parameter(torch.zeros(8, 4))

    def forward(self, x, state=None):  # [B, L, 8]
        u, delta, b, c = self.project(x).transpose(1, 2).split([8, 8, 4, 4], dim=1)
        return selective_scan(
            u, delta, -self.A_log.exp(), b, c, None, u, None, True, True, initial_state=state
        )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph(backend):
    torch.manual_seed(0)
    layer, x, state = Layer(), torch.randn(2, 70, 8), torch.randn(2, 8, 4)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    results = []
    for f in (layer, compiled):
        layer.zero_grad()
        out, last = f(x, state)
        (out.square().sum() + last.sum()).backward()
        results.append((out, last, *(p.grad.clone() for p in layer.parameters())))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_compile_with_dynamic_length():
    compiled = torch.compile(Layer(), fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (5, 64, 130):
        out, last = compiled(torch.randn(2, length, 8, requires_grad=True))
        (out.sum() + last.sum()).backward()
        assert out.shape == (2, 8, length)


def test_export():
    layer, x = Layer().eval(), torch.randn(2, 20, 8)
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x)[0], layer(x)[0])


def test_autocast_keeps_the_state_in_float32():
    layer, x = Layer(), torch.randn(2, 70, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, last = layer(x)
    assert out.dtype == torch.bfloat16
    assert last.dtype == torch.float32
    out.float().sum().backward()
    torch.testing.assert_close(out.float(), layer(x)[0], rtol=0.1, atol=0.1)


def test_second_derivative_is_refused():
    case = make_case(1, 4, 10, 4)
    u = case.u.requires_grad_()
    grad = torch.autograd.grad(
        selective_scan(u, case.delta, case.A, case.B, case.C).square().sum(), u, create_graph=True
    )[0]
    with pytest.raises(RuntimeError, match="no second derivative; use reference_selective_scan"):
        grad.sum().backward()


def test_states_are_kept_for_a_backward_only_and_made_again_where_they_were_not():
    case = make_case(1, 4, 200, 4)
    assert torch.ops.arcore.selective_scan(*arguments(case), False)[2].numel() == 0
    u = case.u.requires_grad_()
    grads = []
    for save_states in (True, False):
        out = torch.ops.arcore.selective_scan(u, *arguments(case)[1:], save_states)[0]
        grads.append(torch.autograd.grad(out, u, case.grad_out)[0])
    assert torch.equal(*grads)


@pytest.mark.parametrize(
    "spoil",
    [
        torch.Tensor.bfloat16,
        torch.Tensor.double,
        lambda s: s.transpose(2, 3).contiguous().transpose(2, 3),
        lambda s: s[:, :1, :1, :1].expand(s.shape),
    ],
    ids=["bfloat16", "float64", "transposed", "expanded"],
)
def test_the_raw_backward_takes_states_as_the_forward_made_them(spoil):
    case = make_case(1, 4, 200, 4)
    _, _, states = torch.ops.arcore.selective_scan(*arguments(case), True)
    with pytest.raises(
        RuntimeError, match="expected states as the forward returned them, float32 and contig"
    ):
        torch.ops.arcore.selective_scan_backward(
            case.grad_out, None, *arguments(case)[:11], spoil(states), True, False
        )


@pytest.mark.parametrize("name", ["delta", "C", "D", "initial_state"])
def test_devices_are_checked_where_no_kernel_runs(name):
    case = make_case(2, 4, 10, 4, initial=True)
    mixed = replace(case, **{name: getattr(case, name).to("meta")})
    with pytest.raises(ValueError, match=f"expected {name} on the device of u, cpu, but got meta"):
        torch.ops.arcore.selective_scan(*arguments(mixed), False)


@pytest.mark.parametrize("function", [torch.func.grad, lambda f: torch.vmap(torch.func.grad(f))])
def test_function_transforms(function):
    case = make_case(3, 6, 70, 4)
    rows = function is not torch.func.grad

    def loss(u):
        u = u[None] if rows else u
        b, c = (t[:1] if rows else t for t in (case.B, case.C))
        return selective_scan(u, u.abs(), case.A, b, c, case.D).square().sum()

    def expected(u):
        u = u.detach().requires_grad_()
        return torch.autograd.grad(loss(u), u)[0]

    u = case.u
    want = torch.stack([expected(row) for row in u]) if rows else expected(u)
    torch.testing.assert_close(function(loss)(u), want)


def test_gradient_through_vmap():
    u = torch.randn(3, 1, 8, 70, requires_grad=True)
    A, B = -torch.rand(8, 4), torch.randn(1, 4, 70)
    together = torch.vmap(lambda x: selective_scan(x, x.abs(), A, B, B))(u)
    alone = torch.stack([selective_scan(x, x.abs(), A, B, B) for x in u])
    for out in (together, alone):
        out.square().sum().backward()
    first, u.grad = u.grad / 2, None
    alone = torch.stack([selective_scan(x, x.abs(), A, B, B) for x in u])
    alone.square().sum().backward()
    torch.testing.assert_close(first, u.grad)


SCRIPT = """
import torch
from tests.selective_scan.cases import check_against_reference, make_case
print(torch.ops.arcore.cpu_isa())
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    check_against_reference(make_case(2, 37, 131, 19, b="1", c="constant", initial=True, dtype=dtype))
    check_against_reference(make_case(1, 33, 70, 16, reverse=True, dtype=dtype))
"""


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    run_under(isa, SCRIPT)
