"""gradcheck of the reference, opcheck, torch.compile, torch.export, autocast, second derivatives."""

from __future__ import annotations

import pytest
import torch

from arcore.ops import causal_conv1d, reference_causal_conv1d
from tests.causal_conv1d.cases import make_case


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck_of_the_reference(reverse, packed):
    ids = torch.tensor([[0, 0, 1, 1, 1, -1], [3, 3, 3, 3, 3, 3]], dtype=torch.int32) if packed else None
    case = make_case(2, 3, 6, initial=True, ids=ids, reverse=reverse).to(torch.float64)
    leaves = [t.requires_grad_() for t in case.floats().values()]
    assert torch.autograd.gradcheck(
        lambda x, w, b, h: reference_causal_conv1d(x, w, b, ids, h, True, None, "silu", reverse=reverse),
        leaves,
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False, "initial": True, "reverse": True}, {"ids": torch.zeros(2, 70, dtype=torch.int32)}],
    ids=str,
)
def test_opcheck(options):
    case = make_case(2, 6, 70, **options)
    floats = {name: t.requires_grad_() for name, t in case.floats().items()}
    args = (
        *(floats.get(n) for n in ("x", "weight", "bias")),
        case.seq_idx,
        floats.get("initial_states"),
        True,
    )
    torch.library.opcheck(torch.ops.arcore.causal_conv1d.default, (*args, case.reverse))


@pytest.mark.parametrize("initial", [False, True])
def test_opcheck_of_the_backward(initial):
    case = make_case(2, 6, 70, initial=initial)
    args = (
        case.grad_out,
        case.grad_final,
        case.x,
        case.weight,
        case.bias,
        None,
        case.initial_states,
        True,
        False,
    )
    torch.library.opcheck(torch.ops.arcore.causal_conv1d_backward.default, args)


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(8, 16)
        self.weight = torch.nn.Parameter(torch.randn(16, 4))
        self.bias = torch.nn.Parameter(torch.zeros(16))

    def forward(self, x, state=None):  # [B, L, 8]
        inner = self.project(x).transpose(1, 2)
        return causal_conv1d(inner, self.weight, self.bias, None, state, True, None, "silu")


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph(backend):
    torch.manual_seed(0)
    layer, x, state = Layer(), torch.randn(2, 70, 8), torch.randn(2, 16, 3)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    results = []
    for f in (layer, compiled):
        layer.zero_grad()
        out, final = f(x, state)
        (out.square().sum() + final.sum()).backward()
        results.append((out, final, *(p.grad.clone() for p in layer.parameters())))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_compile_with_dynamic_length():
    compiled = torch.compile(Layer(), fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (5, 64, 130):
        out, final = compiled(torch.randn(2, length, 8, requires_grad=True))
        (out.sum() + final.sum()).backward()
        assert out.shape == (2, 16, length)


def test_export():
    layer, x = Layer().eval(), torch.randn(2, 20, 8)
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x)[0], layer(x)[0])


def test_autocast_takes_16_bit_inputs_with_float32_weights():
    layer, x = Layer(), torch.randn(2, 70, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = layer(x)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    torch.testing.assert_close(out.float(), layer(x)[0], rtol=0.1, atol=0.1)


def test_second_derivative_is_refused():
    case = make_case(1, 4, 10)
    x = case.x.requires_grad_()
    grad = torch.autograd.grad(causal_conv1d(x, case.weight).square().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no second derivative; use reference_causal_conv1d"):
        grad.sum().backward()
