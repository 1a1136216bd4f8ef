"""Arguments that no caller should pass: devices, aliases, derivatives, other kinds. Refused, not guessed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from arcore import masks, ops
from arcore.masks import TreeMask

DIM, HEADS, KV_HEADS, SIZE, HIDDEN, ROOM = 32, 2, 1, 16, 48, 8


def layer(**change: Any) -> Tensor:
    given: dict[str, Any] = {
        "x": torch.randn(2, DIM),
        "norm1": torch.ones(DIM),
        "qkv": torch.randn((HEADS + 2 * KV_HEADS) * SIZE, DIM),
        "out": torch.randn(DIM, HEADS * SIZE),
        "norm2": torch.ones(DIM),
        "gate_up": torch.randn(2 * HIDDEN, DIM),
        "down": torch.randn(DIM, HIDDEN),
        "keys": torch.randn(2, KV_HEADS, ROOM, SIZE),
        "values": torch.randn(2, KV_HEADS, ROOM, SIZE),
        "cos": torch.ones(1, SIZE),
        "sin": torch.zeros(1, SIZE),
        "lengths": torch.tensor([3, 5]),
        "num_heads": HEADS,
    }
    given |= change
    return ops.decoder_step(given.pop("x"), **given)


FLOATS = ("x", "norm1", "qkv", "out", "norm2", "gate_up", "down", "keys", "values", "cos", "sin")
EVEN, CHAIN, TARGET = torch.ones(1, 3, 4) / 4, torch.ones(1, 2).long(), torch.zeros(1).long()
SHAPES = {
    "x": (2, DIM),
    "norm1": (DIM,),
    "keys": (2, KV_HEADS, ROOM, SIZE),
    "cos": (1, SIZE),
    "qkv": (64, DIM),
}


@pytest.mark.parametrize("name", [*FLOATS[1:], "lengths", "qkv_bias", "down_bias", "seen"])
def test_decoder_step_on_two_devices(name: str):
    with pytest.raises(ValueError, match=f"expected {name} on the device of x, cpu, but got meta"):
        layer(**{name: torch.zeros(2, device="meta")})


@pytest.mark.parametrize("name", [*FLOATS, "lengths"])
def test_decoder_step_without_tensors(name: str):
    with pytest.raises(TypeError, match=f"expected {name} to be a tensor but got list"):
        layer(**{name: [1.0]})


@pytest.mark.parametrize("name", [*SHAPES])
def test_decoder_step_has_no_derivative_and_says_so(name: str):
    shape = SHAPES[name]
    with pytest.raises(RuntimeError, match="no gradient"):
        layer(**{name: torch.randn(shape, requires_grad=True)})
    with pytest.raises(NotImplementedError, match="forward-mode tangents"), forward_ad.dual_level():
        layer(**{name: forward_ad.make_dual(torch.randn(shape), torch.ones(shape))})
    for transform in (
        lambda f: torch.func.grad(lambda t: f(t).sum())(torch.randn(shape)),
        lambda f: torch.func.jvp(f, (torch.randn(shape),), (torch.ones(shape),)),
        lambda f: torch.vmap(f, randomness="different")(torch.randn(3, *shape)),
    ):
        with pytest.raises(RuntimeError, match=r"expected no transform of torch\.func"):
            transform(lambda t: layer(**{name: t}))
    with pytest.raises(RuntimeError, match="no gradient"):
        layer(qkv_bias=torch.zeros(64, requires_grad=True))


def test_decoder_step_writes_into_memory_that_nobody_else_reads():
    keys, down = torch.randn(2, KV_HEADS, ROOM, SIZE), torch.randn(DIM, HIDDEN)
    for change in (
        {"keys": keys, "values": keys},
        {"keys": keys[:1].expand(2, -1, -1, -1)},
        {"keys": keys, "x": keys.view(-1)[: 2 * DIM].view(2, DIM)},
        {"down": down, "x": down.view(-1)[: 2 * DIM].view(2, DIM)},
        {"keys": keys, "cos": keys[0, 0, :1]},
    ):
        with pytest.raises(ValueError, match="memory"):
            layer(**change)
    # Keys and values interleaved head by head share a buffer, but no element.
    both = torch.randn(2, KV_HEADS, 2, ROOM, SIZE)
    apart = {"keys": both[:, :, 0].clone(), "values": both[:, :, 1].clone()}
    torch.manual_seed(1)
    expected = layer(**apart)
    torch.manual_seed(1)
    assert torch.equal(layer(keys=both[:, :, 0], values=both[:, :, 1]), expected)
    assert torch.equal(both[:, :, 0], apart["keys"])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"window": 0}, ValueError, "window to be at least 1, or None"),
        ({"window": -3}, ValueError, "window to be at least 1"),
        ({"window": 2.0}, TypeError, "window to be an integer"),
        ({"window": True}, TypeError, "window to be an integer"),
        ({"window": 2**70}, ValueError, "window to fit into int64"),
        ({"num_heads": 2.0}, TypeError, "num_heads to be an integer"),
        ({"drafts": 1.0}, TypeError, "drafts to be an integer"),
        ({"eps": math.nan}, ValueError, "eps to be finite and at least 0"),
        ({"eps": -1e-5}, ValueError, "eps to be finite and at least 0"),
        ({"eps": "small"}, TypeError, "eps to be a number"),
        # The sum of length and drafts must not be trusted.
        ({"lengths": torch.tensor([3, 2**63 - 1])}, ValueError, "lengths from 0 to 7"),
        ({"lengths": torch.tensor([-(2**63), 3])}, ValueError, "lengths from 0 to 7"),
    ],
)
def test_decoder_step_numbers(change: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        layer(**change)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: ops.filter_probs(x, top_k=3),
        lambda x: ops.filter_probs([x, x.detach()], weights=[1.0, 2.0]),
        lambda x: ops.logits_from_probs(x.softmax(-1)),
        lambda x: ops.sample(x, seed=torch.arange(3), return_prob=True).prob,
        lambda x: ops.sample(x, seed=torch.arange(3), return_logprob="raw").logprob,
        lambda x: ops.sample(x, seed=torch.arange(3), return_entropy=True).entropy,
    ],
)
def test_no_silent_zero_of_what_has_no_derivative(call: Any):
    x = torch.randn(3, 7)
    match = "asks for a derivative and these results have none"
    for transform in (
        lambda: torch.func.grad(lambda t: call(t).sum())(x),
        lambda: torch.func.jacrev(call)(x),
        lambda: torch.func.jacfwd(call)(x),
        lambda: torch.func.jvp(call, (x,), (x,)),
        lambda: torch.func.grad(lambda t: torch.func.grad(lambda u: (u * call(t).sum()).sum())(t).sum())(x),
    ):
        with pytest.raises(NotImplementedError, match=match):
            transform()
    with pytest.raises(NotImplementedError, match=match), forward_ad.dual_level():
        call(forward_ad.make_dual(x, x))
    # What is not differentiated by may stand inside.
    constant = call(x)
    assert torch.equal(torch.func.grad(lambda t: t.sum() * call(x).sum())(x), constant.sum().expand(3, 7))
    assert torch.equal(
        torch.func.grad(lambda t: t.sum() * call(t.detach()).sum())(x), constant.sum().expand(3, 7)
    )


def test_tokens_may_be_drawn_inside_of_a_derivative():
    x = torch.randn(3, 7)

    def chosen(logits: Tensor) -> Tensor:
        tokens = ops.sample(logits, seed=torch.arange(3))
        return logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).sum()

    assert torch.func.grad(chosen)(x).abs().sum() > 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.verify_tree(EVEN, CHAIN, None, seed=0, offset=0), TypeError, "expected parents"),
        (
            lambda: ops.sample(torch.zeros(1, 4), generator=5),
            TypeError,
            "generator to be a torch.Generator but got int",
        ),
        (lambda: ops.codebook_neighbours(torch.full((4, 2), math.nan), 2), ValueError, "finite numbers"),
        (
            lambda: ops.codebook_neighbours(torch.zeros(4, 2).long(), 2),
            TypeError,
            "floating-point dtype but got int64",
        ),
        (lambda: ops.codebook_neighbours([[1.0]], 0), TypeError, "codebook to be a tensor but got list"),
        (lambda: ops.alibi_bias(torch.ones(4), -1), ValueError, "nk to be at least 0 but got -1"),
        (lambda: ops.alibi_bias(torch.ones(4), 2.5), TypeError, "nk to be an integer"),
        (lambda: ops.alibi_bias(torch.ones(4).long(), 5), TypeError, "floating-point dtype but got int64"),
        (lambda: ops.alibi_bias([1.0], 5), TypeError, "slopes to be a tensor"),
        (lambda: ops.token_cross_entropy([[1.0]], TARGET), TypeError, "logits to be a tensor but got list"),
        (lambda: ops.token_logprobs([[1.0]], TARGET), TypeError, "logits to be a tensor but got list"),
        (
            lambda: ops.token_logprobs(torch.zeros(1, 4), TARGET, softcap=True),
            TypeError,
            "softcap to be a number",
        ),
        (
            lambda: ops.token_logprobs(torch.zeros(1, 4), TARGET, temperature=True),
            TypeError,
            "temperature to be a number",
        ),
    ],
)
def test_other_kinds_of_arguments(call: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("scale", [1e40, -1e39, math.inf, math.nan, "x"])
def test_a_scale_beyond_float32(scale: Any):
    q = torch.randn(1, 1, 3, 4)
    with pytest.raises((ValueError, TypeError), match="expected scale"):
        ops.block_sparse_attention(q, q, q, masks.causal(3), scale=scale)
    tree = TreeMask.from_parents(torch.tensor([-1, 0, 1]), 0)
    with pytest.raises((ValueError, TypeError), match="expected scale"):
        ops.block_sparse_attention(q, q, q, tree, scale=scale)
