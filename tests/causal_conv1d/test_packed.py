"""Sequences packed into one row, each with its own states, equal separate calls bit for bit."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

from arcore.ops import causal_conv1d, reference_causal_conv1d
from tests.isa import ISAS, run_under

LENGTHS = [5, 0, 1, 300, 2, 64]


def packed(f, x, weight, bias, states, bounds, reverse, grads=None):
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias, states) if t is not None]
    given = iter(leaves)
    x, weight, bias, states = (None if t is None else next(given) for t in (x, weight, bias, states))
    out, final = f(x, weight, bias, None, states, True, None, "silu", cu_seqlens=bounds, reverse=reverse)
    if grads is None:
        return [out.detach(), final.detach()]
    return [out.detach(), final.detach(), *torch.autograd.grad([out, final], leaves, grads)]


def make(dim=21, width=4, lengths=LENGTHS, seed=0, initial=True):
    g = torch.Generator().manual_seed(seed)
    total, count = sum(lengths), len(lengths)
    x, out = (torch.randn(1, dim, total, generator=g) for _ in range(2))
    weight, bias = torch.randn(dim, width, generator=g), torch.randn(dim, generator=g)
    states, final = (torch.randn(count, dim, width - 1, generator=g) for _ in range(2))
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    return (x, weight, bias, states if initial else None, bounds), (out, final)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("layout", ["time last", "channel last"])
@pytest.mark.parametrize("dim", [21, 48])
def test_equals_separate_calls(reverse, initial, layout, dim):
    (x, weight, bias, states, bounds), grads = make(dim, initial=initial)
    if layout == "channel last":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    ours = packed(causal_conv1d, x, weight, bias, states, bounds.int(), reverse, grads)
    at = bounds.tolist()
    outs, finals, dxs, dws, dstates = [], [], [], [], []
    for i, (a, b) in enumerate(itertools.pairwise(at)):
        own = None if states is None else states[i : i + 1]
        alone = packed(
            causal_conv1d,
            x[..., a:b],
            weight,
            bias,
            own,
            None,
            reverse,
            (grads[0][..., a:b], grads[1][i : i + 1]),
        )
        outs.append(alone[0])
        finals.append(alone[1])
        dxs.append(alone[2])
        dws.append(alone[3])
        dstates.append(alone[-1])
    assert torch.equal(ours[0], torch.cat(outs, 2))
    assert torch.equal(ours[1], torch.cat(finals))
    assert torch.equal(ours[2], torch.cat(dxs, 2))
    torch.testing.assert_close(ours[3], torch.stack(dws).sum(0), rtol=1e-5, atol=1e-5)
    if initial:
        assert torch.equal(ours[-1], torch.cat(dstates))


@pytest.mark.parametrize("width", [1, 2, 6])
def test_against_the_reference(width):
    arguments, grads = make(width=width)
    exact = packed(
        reference_causal_conv1d,
        *(t.double() if t.is_floating_point() else t for t in arguments),
        False,
        [g.double() for g in grads],
    )
    for ours, expected in zip(packed(causal_conv1d, *arguments, False, grads), exact, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)


def test_no_sequences():
    (x, weight, bias, _, _), _ = make(lengths=[])
    out, final = packed(causal_conv1d, x, weight, bias, None, torch.zeros(1, dtype=torch.int32), False)
    assert out.shape == (1, 21, 0)
    assert final.shape == (0, 21, 3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cu_seqlens": torch.tensor([0.0, 9.0])}, ValueError, "expected cu_seqlens int32 or int64 of shape"),
        (
            {"cu_seqlens": torch.tensor([0, 5])},
            RuntimeError,
            "to run from 0 to the length 9 but it runs from 0 to 5",
        ),
        (
            {"cu_seqlens": torch.tensor([0, 7, 3, 9])},
            RuntimeError,
            "not to decrease but entry 2 is 3 after 7",
        ),
        (
            {"seq_idx": torch.zeros(1, 9, dtype=torch.int32)},
            ValueError,
            "expected cu_seqlens or seq_idx but got both",
        ),
        ({"x": torch.zeros(2, 4, 9)}, ValueError, "expected batch 1 with cu_seqlens"),
        ({"initial_states": torch.zeros(1, 4, 3)}, ValueError, "(num_sequences=2, dim=4, width - 1 = 3)"),
    ],
    ids=str,
)
def test_wrong_arguments(change, error, message):
    good = {"x": torch.zeros(1, 4, 9), "weight": torch.zeros(4, 4), "cu_seqlens": torch.tensor([0, 4, 9])}
    with pytest.raises(error, match=re.escape(message)):
        causal_conv1d(**{**good, **change})


def test_opcheck_compile_and_dynamic_numbers_of_sequences():
    (x, weight, bias, states, bounds), _ = make(5)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    torch.library.opcheck(
        torch.ops.arcore.causal_conv1d.default, (*leaves, None, states, True, False, bounds)
    )

    def run(x, bounds):
        return causal_conv1d(x, weight, bias, activation="silu", cu_seqlens=bounds, return_final_states=True)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in ([3, 4], [5], [1, 2, 60]):
        (x, *_, bounds), _ = make(5, lengths=lengths)
        x.requires_grad_()
        for ours, expected in zip(compiled(x, bounds), run(x, bounds), strict=True):
            assert torch.equal(ours, expected)
        compiled(x, bounds)[0].sum().backward()


SCRIPT = """
import torch
from tests.causal_conv1d import test_packed
print(torch.ops.arcore.cpu_isa())
test_packed.test_equals_separate_calls(False, True, "channel last", 48)
test_packed.test_against_the_reference(4)
"""


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    run_under(isa, SCRIPT)
