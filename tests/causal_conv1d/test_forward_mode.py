"""Tangents of the convolution against the reference's in float64, and under torch.func's transforms."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from arcore.ops import causal_conv1d, causal_conv1d_update, reference_causal_conv1d
from tests.causal_conv1d.cases import FLOATS, call, make_case


def moved(case, f, names):
    generator = torch.Generator().manual_seed(1)
    given = case.floats()
    along = {n: torch.randn(t.shape, generator=generator).to(t.dtype) for n, t in given.items() if n in names}

    def run(*tensors):
        return call(f, replace(case, **dict(zip(along, tensors, strict=True))))

    results = torch.func.jvp(run, tuple(given[n] for n in along), tuple(along.values()))
    return [t for pair in results for t in pair]


def check(case, names=FLOATS):
    exact = moved(case.to(torch.float64), reference_causal_conv1d, names)
    for ours, expected in zip(moved(case, causal_conv1d, names), exact, strict=True):
        scale = 1e-30 + (expected.abs().max().item() if expected.numel() else 0.0)
        bound = {torch.float32: 1e-6, torch.bfloat16: 2.0**-7}[ours.dtype] * scale
        torch.testing.assert_close(ours.double(), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("width", [1, 4, 6])
def test_shapes(activation, width):
    for length in (0, 1, 2, 70):
        check(make_case(2, 21, length, width, activation=activation, initial=True))


@pytest.mark.parametrize("name", FLOATS)
def test_one_argument_at_a_time(name):
    check(make_case(2, 12, 30, initial=True), (name,))


def test_options():
    ids = torch.tensor([[-1, 0, 0, -1, 1, 1], [2, 2, 2, 2, -1, -1]], dtype=torch.int32)
    check(make_case(2, 12, 6, ids=ids, initial=True))
    check(make_case(2, 12, 30, reverse=True, bias=False))
    check(make_case(2, 12, 30).to(torch.bfloat16))


def test_jacobians_and_reverse_over_forward():
    case = make_case(1, 3, 6)

    def f(x):
        return causal_conv1d(x, case.weight, case.bias, activation="silu")

    def same(x):
        return reference_causal_conv1d(x, case.weight, case.bias, activation="silu")

    forward, backward = torch.func.jacfwd(f)(case.x), torch.func.jacrev(f)(case.x)
    torch.testing.assert_close(forward, backward, rtol=1e-5, atol=1e-6)
    way = torch.randn_like(case.x)

    def energy(g):
        return lambda x: torch.func.jvp(g, (x,), (way,))[1].square().sum()

    torch.testing.assert_close(torch.func.grad(energy(f))(case.x), torch.func.grad(energy(same))(case.x))


def test_grad_under_vmap():
    case = make_case(3, 5, 20)

    def loss(x):
        return causal_conv1d(x[None], case.weight, case.bias, activation="silu").square().sum()

    def alone(x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(loss(x), x)[0]

    together = torch.vmap(torch.func.grad(loss))(case.x)
    torch.testing.assert_close(together, torch.stack([alone(x) for x in case.x]))


def test_the_step_refuses_tangents():
    x, weight = torch.randn(2, 5), torch.randn(5, 4)
    with pytest.raises(
        NotImplementedError, match=r"without forward-mode tangents .* reference_causal_conv1d_update"
    ):
        torch.func.jvp(lambda x: causal_conv1d_update(x, torch.zeros(2, 5, 3), weight), (x,), (x,))
