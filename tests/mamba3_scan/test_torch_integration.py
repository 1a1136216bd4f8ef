"""mamba3_scan inside PyTorch: opcheck, compile, export, transforms, second derivatives, autocast, errors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from arcore.ops import Mamba3State, mamba3_scan, mamba3_update, reference_mamba3_scan
from tests.mamba3_scan.cases import FLOATS, STATES, call, everything, make_case

SMALL: dict[str, Any] = {"heads": 2, "groups": 1, "dim": 4, "states": 6, "angles": 2}


def test_gradcheck_of_the_reference():
    case = make_case(1, 4, 2, 2, 4, 1, 2, 1, initial=True).to(torch.float64)
    names = list(case.floats())
    assert torch.autograd.gradcheck(
        lambda *t: call(reference_mamba3_scan, replace(case, **dict(zip(names, t, strict=True)))),
        [t.requires_grad_() for t in case.floats().values()],
    )


def op_arguments(case: Any) -> tuple[Any, ...]:
    """Arguments of the op itself."""
    names = ("x", "log_decay", "dt", "weight", "B", "C", "turn", "B_bias", "C_bias", "D", "z", "h0", "angle0")
    floats = case.floats()
    given = [floats[n].requires_grad_() if n in floats else None for n in names]
    return (*given, case.cu_seqlens, case.seq_idx, case.halves, case.reverse)


OPTIONS = [
    {"length": 20},
    {"initial": True, "reverse": True, "skip": False, "gate": False, "bias": False, "rank": 2},
    {"lengths": [3, 70], "initial": True, "halves": True},
    {"ids": torch.zeros(2, 70, dtype=torch.int32)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_opcheck(options):
    torch.library.opcheck(torch.ops.arcore.mamba3_scan.default, op_arguments(make_case(**SMALL | options)))


def test_opcheck_of_the_backward_and_of_the_update():
    case = make_case(**SMALL, lengths=[3, 70], initial=True)
    arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in op_arguments(case)]
    torch.library.opcheck(
        torch.ops.arcore.mamba3_scan_backward.default,
        (case.grad_out, case.grad_h, case.grad_angle, *arguments),
    )
    case = make_case(**SMALL, initial=True)
    x, log_decay, dt, weight, *rest = (a[:, 0] if i < 7 else a for i, a in enumerate(op_arguments(case)[:10]))
    state = (case.h0, case.angle0, case.B0, case.x0)
    torch.library.opcheck(
        torch.ops.arcore.mamba3_update.default,
        (*tuple(t.detach() for t in (*state, x, log_decay, dt, weight, *rest)), False),
    )


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(8, 3 * 2 + 2 * 2 * 6 + 2 * 2 * 4 + 2 * 2)
        self.bias = torch.nn.Parameter(torch.ones(2, 2, 6))

    def forward(self, x, state=None, cu_seqlens=None):  # [B, L, 8]
        a, bc, u, turn = self.project(x).split([6, 24, 16, 4], dim=-1)
        dt, log, weight = a.float().sigmoid().chunk(3, -1)
        b, c = bc.unflatten(2, (2, 2, 1, 6)).unbind(2)
        return mamba3_scan(
            u.unflatten(2, (2, 2, 4)), dt, -log, weight, b, c, turn.float().unflatten(2, (2, 2)),
            self.bias, self.bias, return_last_state=True, initial_state=state, cu_seqlens=cu_seqlens,
        )  # fmt: skip


def a_state(rows: int) -> Mamba3State:
    return Mamba3State(torch.randn(rows, 2, 4, 6), torch.rand(rows, 2, 2), torch.randn(rows, 2, 2, 6),
                       torch.randn(rows, 2, 2, 4))  # fmt: skip


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("packed", [False, True])
def test_compile_fullgraph_with_changing_lengths(backend, packed):
    torch.manual_seed(0)
    layer = Layer()
    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=True)
    for length in (70, 33):
        x, bounds = torch.randn(1 if packed else 2, length, 8), torch.tensor([0, 3, length])
        results = []
        for f in (layer, compiled):
            layer.zero_grad()
            out, last = f(x, STATE, bounds if packed else None)
            (out.square().sum() + last.state.sum() + last.angle.sum() + last.B.sum()).backward()
            results.append((out, *last, *(p.grad.clone() for p in layer.parameters())))
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


STATE = a_state(2)


def test_export():
    layer, x = Layer().eval(), torch.randn(2, 20, 8)
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x)[0], layer(x)[0])


def test_autocast_keeps_state_and_angles_in_float32():
    layer, x = Layer(), torch.randn(2, 70, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, last = layer(x)
    assert out.dtype == last.x.dtype == torch.bfloat16
    assert last.state.dtype == last.angle.dtype == last.B.dtype == torch.float32
    out.float().sum().backward()
    torch.testing.assert_close(out.float(), layer(x)[0], rtol=0.1, atol=0.3)


def test_gradients_inside_autocast_are_in_float32():
    case = make_case(**SMALL, initial=True)
    expected = everything(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = everything(case)
    for name in expected:
        if name not in ("B0", "x0", "h0", "dt"):  # the product outside of the op is the caller's precision
            torch.testing.assert_close(inside[name], expected[name], rtol=1e-2, atol=5e-2)


def test_forward_mode_is_refused():
    case = make_case(**SMALL)
    with pytest.raises(NotImplementedError, match="arcore::mamba3_scan has no forward-mode derivative"):
        torch.func.jvp(lambda x: call(mamba3_scan, replace(case, x=x))[0], (case.x,), (case.x,))


def test_function_transforms():
    case = make_case(3, 20, 2, 4, 6, 1, angles=2)
    rest = [getattr(case, name) for name in FLOATS]

    def loss(x, turn):
        given = [t if t is None or (t.dim() < 4 and t.shape[0] != 3) else t[:1] for t in rest]
        given[0], given[6] = x[None], turn[None]
        return mamba3_scan(*given).square().sum()

    def alone(x, turn):
        x, turn = x.detach().requires_grad_(), turn.detach().requires_grad_()
        return torch.autograd.grad(loss(x, turn), (x, turn))

    together = torch.vmap(torch.func.grad(loss, argnums=(0, 1)))(case.x, case.turn)
    expected = [torch.stack(t) for t in zip(*map(alone, case.x, case.turn), strict=True)]
    for ours, other in zip(together, expected, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rank", [1, 2])
def test_second_derivative_is_that_of_the_reference(rank):
    case = make_case(1, 12, 2, 3, 4, 1, rank, 2, initial=True)
    seconds = []
    for f, dtype in ((mamba3_scan, torch.float32), (reference_mamba3_scan, torch.float64)):
        v = case.to(dtype)
        leaves = [getattr(v, n).requires_grad_() for n in ("x", "dt", "log_decay", "turn", "B", "angle0")]
        out, *_ = call(f, v)
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    for ours, expected in zip(*seconds, strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(ours.double(), expected, rtol=1e-3, atol=1e-4 * scale)


def test_gradients_are_the_same_every_time_and_through_one_result():
    case = make_case(initial=True, rank=2)
    for (name, one), two in zip(everything(case).items(), everything(case).values(), strict=True):
        assert torch.equal(one, two), name
    turn = case.turn.clone().requires_grad_()
    out, state, angle, *_ = call(mamba3_scan, replace(case, turn=turn))
    ones = torch.autograd.grad(angle.sum(), turn, retain_graph=True)[0]
    assert torch.equal(ones, torch.ones_like(turn))  # every turn is in the last angle, once
    both = torch.autograd.grad(out.sum() + state.sum(), turn, retain_graph=True)[0]
    parts = [torch.autograd.grad(t.sum(), turn, retain_graph=True)[0] for t in (out, state)]
    torch.testing.assert_close(both, sum(parts), rtol=1e-4, atol=1e-3)


def update(**changes: Any) -> torch.Tensor:
    case = make_case(2, 5, 4, 2, 6, 1, angles=2, initial=True)
    values = {name: getattr(case, name) for name in FLOATS[:10]}
    values = {n: t[:, 0] if n not in ("B_bias", "C_bias", "D") else t for n, t in values.items()}
    state = Mamba3State(*(getattr(case, n) for n in STATES))
    return mamba3_update(changes.pop("state", state), **values | changes)


def test_the_update_refuses_gradients_and_counts_what_it_writes():
    with pytest.raises(RuntimeError, match=r"mamba3_update: expected tensors without gradients"):
        update(x=torch.zeros(2, 4, 1, 2, requires_grad=True))
    case = make_case(2, 5, 4, 2, 6, 1, angles=2, initial=True)
    state = Mamba3State(*(getattr(case, n) for n in STATES))
    versions = [t._version for t in state]
    update(state=state)
    assert [t._version for t in state] == [v + 1 for v in versions]


WRONG = {
    "x_dims": ({"x": torch.zeros(2, 5, 4, 2)}, ValueError, r"x of shape \(batch, length, heads, rank, dim\)"),
    "dt": ({"dt": torch.zeros(2, 5, 3)}, ValueError, r"expected dt of shape \(2, 5, 4\) but got \(2, 5, 3\)"),
    "weight": ({"weight": torch.zeros(2, 5)}, ValueError, r"expected weight of shape \(2, 5, 4\)"),
    "B": (
        {"B": torch.zeros(2, 5, 1, 6)},
        ValueError,
        r"expected B of shape \(batch=2, length=5, rank=1, groups, d_state\) with an even d_state of 2 to 256 but got",
    ),
    "odd": ({"B": torch.zeros(2, 5, 1, 1, 7)}, ValueError, r"even d_state .* but got \(2, 5, 1, 1, 7\)"),
    "rank": ({"x": torch.zeros(2, 5, 4, 17, 2)}, ValueError, "1 to 16 inputs per head but got 17"),
    "groups": ({"B": torch.zeros(2, 5, 1, 3, 6)}, ValueError, "groups that divide the 4 heads but got 3"),
    "C": ({"C": torch.zeros(2, 5, 1, 1, 8)}, ValueError, r"expected C of shape \(2, 5, 1, 1, 6\)"),
    "turn": (
        {"turn": torch.zeros(2, 5, 4, 4)},
        ValueError,
        r"turn of shape \(batch=2, length=5, heads=4, angles\) with at most 3 angles but got \(2, 5, 4, 4\)",
    ),
    "bias": (
        {"B_bias": torch.zeros(4, 6)},
        ValueError,
        r"expected B_bias of shape \(4, 1, 6\) but got \(4, 6\)",
    ),
    "D": ({"D": torch.zeros(5)}, ValueError, r"expected D of shape \(4,\) but got \(5,\)"),
    "z": ({"z": torch.zeros(2, 5, 8)}, ValueError, r"expected z of shape \(2, 5, 4, 1, 2\)"),
    "state": ({"h0": torch.zeros(1, 4, 2, 6)}, ValueError, r"initial_state.state of shape \(2, 4, 2, 6\)"),
    "angle": ({"angle0": torch.zeros(2, 4, 1)}, ValueError, r"initial_state.angle of shape \(2, 4, 2\)"),
    "both": (
        {"cu_seqlens": torch.tensor([0, 5]), "seq_idx": torch.zeros(2, 5, dtype=torch.int32)},
        ValueError,
        "expected cu_seqlens or seq_idx but got both",
    ),
    "packed_batch": ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, "expected batch 1 with cu_seqlens"),
    "ids": ({"seq_idx": torch.zeros(2, 5)}, ValueError, "expected seq_idx int32 of shape .* but got float32"),
    "no_tensor": ({"B": 3.0}, TypeError, "expected B to be a tensor but got float"),
    "no_optional": ({"z": 3.0}, TypeError, "expected z to be a tensor or None but got float"),
    "device": (
        {"dt": torch.zeros(2, 5, 4, device="meta")},
        ValueError,
        "expected dt on the device of x, cpu, but got meta",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("f", [mamba3_scan, reference_mamba3_scan])
def test_wrong_arguments(wrong, f):
    change, error, message = WRONG[wrong]
    with pytest.raises(error, match=message):
        call(f, replace(make_case(2, 5, 4, 2, 6, 1, angles=2, initial=True), **change))


def test_wrong_states_and_steps():
    case = make_case(2, 5, 4, 2, 6, 1, angles=2, initial=True)
    with pytest.raises(TypeError, match="expected a Mamba3State of four tensors as state but got Tensor"):
        mamba3_scan(*(getattr(case, name) for name in FLOATS), initial_state=case.h0)
    with pytest.raises(TypeError, match=r"mamba3_update: expected a Mamba3State of four tensors"):
        update(state=None)
    with pytest.raises(ValueError, match=r"mamba3_update: expected x of shape \(batch, heads, rank, dim\)"):
        update(x=case.x)
    with pytest.raises(ValueError, match=r"mamba3_update: expected dt of shape \(2, 4\) but got \(2, 5, 4\)"):
        update(dt=case.dt)
    with pytest.raises(TypeError, match="for float64 call reference_mamba3_scan with one step"):
        update(x=case.x[:, 0].double())
    turned = Mamba3State(case.h0.transpose(2, 3).contiguous().transpose(2, 3), case.angle0, case.B0, case.x0)
    with pytest.raises(ValueError, match="expected state with its last dimension contiguous"):
        update(state=turned)


def test_float64_points_to_the_reference():
    with pytest.raises(TypeError, match=r"for float64 .* call reference_mamba3_scan"):
        call(mamba3_scan, make_case(**SMALL).to(torch.float64))


def test_the_op_itself_checks_too():
    case = make_case(2, 5, 4, 2, 6, 1, angles=2)
    with pytest.raises(RuntimeError, match=r"arcore::mamba3_scan: expected log_decay of shape \(2, 5, 4\)"):
        torch.ops.arcore.mamba3_scan(
            *(case.x, case.dt[:, 1:], case.dt, case.dt, case.B, case.C, case.turn),
            *(None,) * 8,
            False,
            False,
        )
