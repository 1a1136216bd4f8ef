"""gradcheck of the reference, opcheck, torch.compile, torch.export, autocast, second derivatives, errors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from arcore.ops import reference_ssd, ssd
from tests.ssd.cases import call, everything, make_case


def test_gradcheck_of_the_reference():
    case = make_case(1, 5, 2, 3, 2, 1, initial=True).to(torch.float64)
    names = list(case.floats())
    assert torch.autograd.gradcheck(
        lambda *t: call(reference_ssd, replace(case, **dict(zip(names, t, strict=True)))),
        [t.requires_grad_() for t in case.floats().values()],
    )


@pytest.mark.parametrize(
    "options",
    [
        {"length": 20, "heads": 2, "groups": 1},
        {"initial": True, "reverse": True, "skip": None, "gate": False, "bias": False},
        {"lengths": [3, 70], "initial": True},
        {"ids": torch.zeros(2, 70, dtype=torch.int32)},
    ],
    ids=str,
)
def test_opcheck(options):
    case = make_case(**options)
    floats = {name: t.requires_grad_() for name, t in case.floats().items()}
    names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")
    arguments = (*(floats.get(n) for n in names), case.cu_seqlens, case.seq_idx, True, 0.0, float("inf"))
    torch.library.opcheck(torch.ops.arcore.ssd.default, (*arguments, case.reverse))


def test_opcheck_of_the_backward():
    case = make_case(lengths=[3, 70], initial=True)
    names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")
    floats = case.floats()
    torch.library.opcheck(
        torch.ops.arcore.ssd_backward.default,
        (
            *(case.grad_out, case.grad_last_state, *(floats.get(n) for n in names)),
            *(case.cu_seqlens, case.seq_idx, True, 0.0, float("inf"), False),
        ),
    )


def test_packed_rows_train_when_compiled():
    case = make_case(lengths=[5, 70, 1])
    f = torch.compile(lambda *t: everything_of(case, *t), fullgraph=True, backend="aot_eager")
    leaves = [t.detach().requires_grad_() for t in (case.x, case.dt, case.A, case.B, case.C)]
    results = []
    for g in (f, lambda *t: everything_of(case, *t)):
        out, last = g(*leaves)
        results.append(torch.autograd.grad([out, last], leaves, [case.grad_out, case.grad_last_state]))
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


def everything_of(case, x, dt, A, B, C):
    return ssd(x, dt, A, B, C, case.D, case.z, return_last_state=True, cu_seqlens=case.cu_seqlens)


def test_forward_mode_is_refused():
    case = make_case()
    with pytest.raises(NotImplementedError, match="arcore::ssd has no forward-mode derivative"):
        torch.func.jvp(lambda x: call(ssd, replace(case, x=x))[0], (case.x,), (case.x,))


def test_function_transforms():
    case = make_case(3, 70, 2, 4, 4, 1)

    def loss(x, dt):
        return ssd(x[None], dt[None], case.A, case.B[:1], case.C[:1]).square().sum()

    def alone(x, dt):
        x, dt = x.detach().requires_grad_(), dt.detach().requires_grad_()
        return torch.autograd.grad(loss(x, dt), (x, dt))

    together = torch.vmap(torch.func.grad(loss, argnums=(0, 1)))(case.x, case.dt)
    expected = [torch.stack(t) for t in zip(*map(alone, case.x, case.dt), strict=True)]
    for ours, other in zip(together, expected, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-4)


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(8, 8 + 4 + 2 * 3)
        self.A_log = torch.nn.Parameter(torch.zeros(4))

    def forward(self, x, state=None):  # [B, L, 8]
        x, dt, bc = self.project(x).split([8, 4, 6], dim=-1)
        b, c = bc.unflatten(2, (2, 3)).split(1, dim=2)
        return ssd(
            x.unflatten(2, (4, 2)),
            dt,
            -self.A_log.exp(),
            b,
            c,
            None,
            None,
            None,
            True,
            True,
            initial_state=state,
        )


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_fullgraph(backend):
    torch.manual_seed(0)
    layer, x, state = Layer(), torch.randn(2, 70, 8), torch.randn(2, 4, 2, 3)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    results = []
    for f in (layer, compiled):
        layer.zero_grad()
        out, last = f(x, state)
        (out.square().sum() + last.sum()).backward()
        results.append((out, last, *(p.grad.clone() for p in layer.parameters())))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


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


def test_gradients_inside_autocast_are_in_float32():
    case = make_case(initial=True)
    expected = everything(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = everything(case)
    for name, value in inside.items():
        assert torch.equal(value, expected[name]), name


def test_second_derivative_is_that_of_the_reference():
    case = make_case(1, 70, 2, 3, 2, 1)
    seconds = []
    for f, dtype in ((ssd, torch.float32), (reference_ssd, torch.float64)):
        v = case.to(dtype)
        x, dt = v.x.requires_grad_(), v.dt.requires_grad_()
        out, _ = call(f, replace(v, x=x, dt=dt))
        first = torch.autograd.grad(out.square().sum(), (x, dt), create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in first), (x, dt)))
    for ours, expected in zip(*seconds, strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(ours.double(), expected, rtol=1e-3, atol=1e-4 * scale)


def test_gradients_are_the_same_every_time():
    case = make_case(initial=True)
    for (name, one), two in zip(everything(case).items(), everything(case).values(), strict=True):
        assert torch.equal(one, two), name


WRONG = {
    "x_dims": ({"x": torch.zeros(2, 5, 4)}, ValueError, r"expected x of shape \(batch, length, heads, dim\)"),
    "dt": ({"dt": torch.zeros(2, 5, 3)}, ValueError, r"expected dt of shape \(2, 5, 4\) but got \(2, 5, 3\)"),
    "A": ({"A": torch.zeros(4, 3)}, ValueError, r"expected A of shape \(4,\) but got \(4, 3\)"),
    "complex": (
        {"A": torch.zeros(4, dtype=torch.complex64)},
        TypeError,
        "expected a real A but got complex64",
    ),
    "B": (
        {"B": torch.zeros(2, 5, 3)},
        ValueError,
        r"expected B of shape \(batch=2, length=5, groups, d_state\) with d_state 1 to 256 but got \(2, 5, 3\)",
    ),
    "states": ({"B": torch.zeros(2, 5, 1, 300)}, ValueError, r"d_state 1 to 256 but got \(2, 5, 1, 300\)"),
    "groups": ({"B": torch.zeros(2, 5, 3, 3)}, ValueError, "groups that divide the 4 heads but got 3"),
    "C": ({"C": torch.zeros(2, 5, 1, 2)}, ValueError, r"expected C of shape \(2, 5, 1, 3\)"),
    "D": (
        {"D": torch.zeros(5)},
        ValueError,
        r"expected D of shape \(heads=4,\) or \(heads=4, dim=2\) but got \(5,\)",
    ),
    "z": ({"z": torch.zeros(2, 5, 8)}, ValueError, r"expected z of shape \(2, 5, 4, 2\)"),
    "bias": ({"dt_bias": torch.zeros(1)}, ValueError, r"expected dt_bias of shape \(4,\)"),
    "initial": (
        {"initial_state": torch.zeros(1, 4, 2, 3)},
        ValueError,
        r"initial_state of shape \(2, 4, 2, 3\)",
    ),
    "both": (
        {"cu_seqlens": torch.tensor([0, 5]), "seq_idx": torch.zeros(2, 5, dtype=torch.int32)},
        ValueError,
        "expected cu_seqlens or seq_idx but got both",
    ),
    "packed_batch": ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, "expected batch 1 with cu_seqlens"),
    "ids": ({"seq_idx": torch.zeros(2, 5)}, ValueError, "expected seq_idx int32 of shape .* but got float32"),
    "limit": (
        {"dt_limit": (0.5, 0.1)},
        ValueError,
        r"expected dt_limit as \(low, high\) .* but got \(0.5, 0.1\)",
    ),
    "no_tensor": ({"B": 3.0}, TypeError, "expected B to be a tensor but got float"),
    "device": (
        {"dt": torch.zeros(2, 5, 4, device="meta")},
        ValueError,
        "expected dt on the device of x, cpu, but got meta",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("f", [ssd, reference_ssd])
def test_wrong_arguments(wrong, f):
    change, error, message = WRONG[wrong]
    with pytest.raises(error, match=message):
        call(f, replace(make_case(2, 5, 4, 2, 3, 1), **change))


def test_float64_points_to_the_reference():
    with pytest.raises(TypeError, match=r"for float64 .* call reference_ssd"):
        call(ssd, make_case().to(torch.float64))


def test_the_op_itself_checks_too():
    case = make_case(2, 5, 4, 2, 3, 1)
    with pytest.raises(RuntimeError, match=r"arcore::ssd: expected dt of shape \(2, 5, 4\)"):
        torch.ops.arcore.ssd(
            *(case.x, case.dt[:, 1:], case.A, case.B, case.C),
            *(None, None, None, None, None, None, True, 0.0, 1.0, False),
        )
