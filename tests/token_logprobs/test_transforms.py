"""torch.func and forward mode: derivatives that are those of the reference, or a refusal; never zero."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import forward_ad

from arcore.ops import (
    linear_logprobs,
    reference_linear_logprobs,
    reference_token_logprobs,
    token_logprobs,
)

# torch's own, when forward mode is used for the first time, and of its linearize.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning"),
]

torch.manual_seed(0)
X, DX = torch.randn(3, 4, 70), torch.randn(3, 4, 70)
TARGET = torch.randint(70, (3, 4))
TARGET[1, 2] = -100
T, DT = torch.rand(3, 4) + 0.5, torch.randn(3, 4)
MASK = torch.rand(4, 70) < 0.8
HIDDEN, WEIGHT, BIAS = torch.randn(3, 4, 8), torch.randn(70, 8), torch.randn(70)
DTYPES = [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)]


def of_logits(op, **options):
    def call(x, t):
        out = op(x, TARGET, temperature=t, return_entropy=True, **options)
        return tuple(o.nan_to_num(neginf=0.0) for o in out)

    return call


def of_linear(op, **options):
    def call(hidden, weight, bias, t):
        return tuple(op(hidden, weight, TARGET, bias=bias, temperature=t, return_entropy=True, **options))

    return call


def jvp(call, primals, tangents):
    return torch.func.jvp(call, primals, tangents)[1]


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"mask": MASK}], ids=["plain", "softcap", "mask"])
def test_tangents_are_those_of_the_reference(dtype, tolerance, options):
    x, dx = X.to(dtype), DX.to(dtype)
    got = jvp(of_logits(token_logprobs, **options), (x, T), (dx, DT))
    exact = jvp(
        of_logits(reference_token_logprobs, **options),
        (x.double(), T.double()),
        (dx.double(), DT.double()),
    )
    for a, b in zip(got, exact, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("tile", [None, (5, 32)])
def test_tangents_through_the_linear_layer(tile):
    primals = (HIDDEN, WEIGHT, BIAS, T)
    tangents = tuple(torch.randn_like(p) for p in primals)
    got = jvp(of_linear(linear_logprobs, tile=tile, softcap=5.0), primals, tangents)
    exact = jvp(
        of_linear(reference_linear_logprobs, softcap=5.0),
        tuple(p.double() for p in primals),
        tuple(t.double() for t in tangents),
    )
    for a, b in zip(got, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-4)
    # One argument at a time, the others without a tangent.
    for i in range(4):
        only = tuple(t if j == i else torch.zeros_like(t) for j, t in enumerate(tangents))

        def one(x, i=i):
            return of_linear(linear_logprobs, tile=tile, softcap=5.0)(*primals[:i], x, *primals[i + 1 :])

        alone = jvp(one, primals[i : i + 1], tangents[i : i + 1])
        together = jvp(of_linear(linear_logprobs, tile=tile, softcap=5.0), primals, only)
        for a, b in zip(alone, together, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_columns_without_a_share_say_nothing():
    dx = DX.clone()
    dx[:, ~MASK] = math.nan
    dx[1, 2] = math.inf  # the row is ignored
    got = jvp(of_logits(token_logprobs, mask=MASK), (X, T), (dx, DT))
    assert all(o.isfinite().all() for o in got)


def test_dual_numbers():
    with forward_ad.dual_level():
        out = token_logprobs(forward_ad.make_dual(X, DX), TARGET)
        tangents = [forward_ad.unpack_dual(o).tangent for o in out[:2]]
    expected = jvp(of_logits(token_logprobs), (X, torch.ones(3, 4)), (DX, torch.zeros(3, 4)))
    for a, b in zip(tangents, expected, strict=False):
        torch.testing.assert_close(a, b)


def test_jacobians_and_linearize():
    def f(x):
        return token_logprobs(x, TARGET).logp

    forward, reverse = torch.func.jacfwd(f)(X), torch.func.jacrev(f)(X)
    torch.testing.assert_close(forward, reverse)
    exact = torch.func.jacrev(lambda x: reference_token_logprobs(x, TARGET).logp)(X.double())
    torch.testing.assert_close(forward.double(), exact, rtol=1e-5, atol=1e-6)
    _, push = torch.func.linearize(f, X)
    torch.testing.assert_close(push(DX), jvp(f, (X,), (DX,)))


def test_gradients_of_examples():
    def loss(x, target, t):
        out = token_logprobs(x, target, temperature=t, return_entropy=True)
        return (out.logp + out.logsumexp.square() + out.entropy).sum()

    def reference(x, target, t):
        out = reference_token_logprobs(x, target, temperature=t, return_entropy=True)
        return (out.logp + out.logsumexp.square() + out.entropy).sum()

    whole = torch.func.grad(loss, argnums=(0, 2))(X, TARGET, T)
    for rows in (torch.vmap(torch.func.grad(loss, argnums=(0, 2)))(X, TARGET, T), whole):
        x, t = X.clone().requires_grad_(), T.clone().requires_grad_()
        loss(x, TARGET, t).backward()
        assert torch.equal(rows[0], x.grad) and torch.equal(rows[1], t.grad)
    exact = torch.func.grad(reference)(X.double(), TARGET, T.double())
    torch.testing.assert_close(whole[0].double(), exact, rtol=1e-5, atol=1e-6)
    in_other_dims = torch.vmap(lambda x, target: token_logprobs(x, target).logp, in_dims=(2, 1))(
        X.movedim(1, 2), TARGET
    )
    assert torch.equal(in_other_dims, token_logprobs(X, TARGET).logp.t())


def test_gradients_of_examples_through_the_linear_layer():
    def loss(hidden, target, weight):
        return linear_logprobs(hidden, weight, target).logp.sum()

    per_example = torch.vmap(torch.func.grad(loss, argnums=(0, 2)), in_dims=(0, 0, None))(
        HIDDEN, TARGET, WEIGHT
    )
    for i in range(3):
        hidden, weight = HIDDEN[i].clone().requires_grad_(), WEIGHT.clone().requires_grad_()
        loss(hidden, TARGET[i], weight).backward()
        torch.testing.assert_close(per_example[0][i], hidden.grad)
        torch.testing.assert_close(per_example[1][i], weight.grad)


@pytest.mark.parametrize("op", ["token_logprobs", "linear_logprobs"])
def test_second_derivatives_are_refused(op):
    def f(x):
        if op == "token_logprobs":
            return token_logprobs(x, TARGET).logp.sum()
        return linear_logprobs(x, WEIGHT, TARGET).logp.sum()

    x = X if op == "token_logprobs" else HIDDEN
    gradient = torch.func.grad(f)
    for second in (
        lambda: torch.func.jacrev(gradient)(x),
        lambda: torch.func.jvp(gradient, (x,), (x,)),
        lambda: torch.func.grad(lambda y: torch.func.jvp(f, (y,), (y,))[1])(x),
        lambda: torch.func.jvp(lambda y: torch.func.jvp(f, (y,), (y,))[1], (x,), (x,)),
    ):
        with pytest.raises(RuntimeError, match=f"use reference_{op} where you need"):
            second()


def test_the_ops_below_have_the_same_tangents():
    with forward_ad.dual_level():
        x = forward_ad.make_dual(X, DX)
        raw = torch.ops.arcore.token_logprobs(x, TARGET, None, None, 1.0, 0.0, -100, False)
        public = token_logprobs(x, TARGET)
        for one, other in zip(raw[:2], public[:2], strict=True):
            tangent = forward_ad.unpack_dual(one).tangent
            assert tangent.count_nonzero()
            assert torch.equal(tangent, forward_ad.unpack_dual(other).tangent)
        flat = HIDDEN.view(12, 8)
        hidden = forward_ad.make_dual(flat, flat)
        raw = torch.ops.arcore.linear_logprobs(
            hidden, WEIGHT, None, TARGET.view(-1), None, None, 1.0, 0.0, -100, False, 4, 32
        )
        public = linear_logprobs(hidden, WEIGHT, TARGET.view(-1), tile=(4, 32))
        for one, other in zip(raw[:2], public[:2], strict=True):
            tangent = forward_ad.unpack_dual(one).tangent
            assert tangent.count_nonzero()
            assert torch.equal(tangent, forward_ad.unpack_dual(other).tangent)


def test_pieces_write_as_torch_does():
    """Versions are counted, leaves, overlapping rows and aliases refused."""
    tile, target = torch.randn(4, 64), torch.zeros(4, dtype=torch.int64)
    state = torch.zeros(4, 4, dtype=torch.float64)

    def update(tile, state, target=target):
        torch.ops.arcore.token_logprobs_update_(tile, target, None, None, 1.0, 0.0, -100, 0, 64, True, state)

    def backward(tile, grad=None):
        grad = torch.ones(4) if grad is None else grad
        torch.ops.arcore.token_logprobs_tile_backward_(
            grad, None, None, tile, target, None, None, state, 1.0, 0.0, -100, 0, 64, False
        )

    update(tile, state)
    backward(tile)
    assert (state._version, tile._version) == (1, 1)
    loss = (torch.randn(4, 4, dtype=torch.float64, requires_grad=True) * state).sum()
    update(tile, state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with pytest.raises(
        RuntimeError, match="writes in place and has no derivative, but an argument requires grad"
    ):
        backward(tile.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="expected tile whose rows do not overlap"):
        backward(torch.randn(1, 64).expand(4, 64))
    with pytest.raises(RuntimeError, match="expected grad_logp apart from tile"):
        backward(tile, tile.view(-1)[10:14])
    shared = torch.zeros(16, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="expected target apart from state"):
        update(tile, shared.view(4, 4), shared.view(torch.int64)[:4])
