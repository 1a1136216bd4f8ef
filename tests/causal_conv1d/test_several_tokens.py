"""Several tokens in one call, counts of accepted ones, snapshots, padding, and what a write in place must not do."""

from __future__ import annotations

import pytest
import torch

from arcore.ops import causal_conv1d_update, reference_causal_conv1d_update


def step_by_step(x, state, weight, bias, places, counts):
    """As many calls as tokens, for the tokens that count, and the state before and after each."""
    out, states = torch.zeros_like(x), [state.clone()]
    for t in range(x.shape[2]):
        rows = torch.where(t < counts, torch.arange(x.shape[0]), -1)
        at = None if places is None else places + t
        out[..., t] = causal_conv1d_update(x[..., t], state, weight, bias, "silu", at, rows)
        states.append(state.clone())
    return out, torch.stack(states, 1)


@pytest.mark.parametrize("width", [1, 2, 4, 10])
@pytest.mark.parametrize("spare", [0, 3])
@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_one_call_per_token(width, spare, ring, dtype):
    torch.manual_seed(0)
    x, state = torch.randn(3, 37, 5).to(dtype), torch.randn(3, 37, width - 1 + spare).to(dtype)
    weight, bias = torch.randn(37, width), torch.randn(37)
    places = torch.tensor([0, 4, 9]) if ring else None
    counts = torch.tensor([5, 0, 3])
    ours, snapshots = state.clone(), torch.empty(3, 6, *state.shape[1:], dtype=dtype)
    out = causal_conv1d_update(x, ours, weight, bias, "silu", places, num_steps=counts, snapshots=snapshots)
    expected_state = state.clone()
    expected, states = step_by_step(x, expected_state, weight, bias, places, counts)
    assert torch.equal(out, expected)
    assert torch.equal(ours, expected_state)
    assert torch.equal(snapshots, states)
    theirs, other = state.clone(), torch.empty_like(snapshots)
    reference = reference_causal_conv1d_update(
        x, theirs, weight, bias, "silu", places, num_steps=counts, snapshots=other
    )
    torch.testing.assert_close(out, reference, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-5)
    assert torch.equal(other, snapshots)
    assert torch.equal(theirs, ours)
    whole, plain = state.clone(), state.clone()
    everything = causal_conv1d_update(x, whole, weight, bias, "silu", places)
    assert torch.equal(everything, step_by_step(x, plain, weight, bias, places, torch.full((3,), 5))[0])


@pytest.mark.parametrize("pad", [-1, 4, -7])
def test_padding_by_number_and_by_sign(pad):
    x, state, weight = torch.randn(3, 8), torch.randn(6, 8, 3), torch.randn(8, 4)
    for rows in (torch.tensor([pad, 2, -3]), torch.tensor([pad, 2, -3], dtype=torch.int32)):
        for f in (causal_conv1d_update, reference_causal_conv1d_update):
            after = state.clone()
            out = f(x, after, weight, None, None, None, rows, pad)
            assert torch.equal(out[[0, 2]], torch.zeros(2, 8))
            changed = (after != state).flatten(1).any(1)
            assert changed.tolist() == [False, False, True, False, False, False]


def test_wrong_counts_and_snapshots():
    x, state, weight = torch.randn(2, 8, 3), torch.randn(2, 8, 3), torch.randn(8, 4)
    with pytest.raises(RuntimeError, match="expected num_steps from 0 to the 3 steps of x but got 4"):
        causal_conv1d_update(x, state, weight, num_steps=torch.tensor([0, 4]))
    with pytest.raises(
        ValueError, match=r"expected snapshots float32 of shape .* = \(2, 4, 8, 3\) but got float32"
    ):
        causal_conv1d_update(x, state, weight, snapshots=torch.zeros(2, 3, 8, 3))
    with pytest.raises(ValueError, match="expected num_steps int32 or int64 of shape"):
        causal_conv1d_update(x, state, weight, num_steps=torch.tensor([0.0, 4.0]))


def test_a_write_is_seen_by_autograd():
    x, weight = torch.randn(1, 8), torch.randn(8, 4)
    state, p = torch.randn(1, 8, 4), torch.randn(1, 8, 4, requires_grad=True)
    loss = (p * state).sum()
    version = state._version
    causal_conv1d_update(x, state, weight)
    assert state._version == version + 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        inside = torch.zeros(1, 8, 4)
        causal_conv1d_update(x, inside, weight)


@pytest.mark.parametrize("name", ["x", "conv_state", "weight", "bias"])
def test_a_gradient_is_refused(name):
    given = {
        "x": torch.randn(1, 8),
        "conv_state": torch.zeros(1, 8, 4),
        "weight": torch.randn(8, 4),
        "bias": torch.zeros(8),
    }
    given[name].requires_grad_()
    with pytest.raises(
        RuntimeError, match=r"arcore.causal_conv1d_update: expected tensors without gradients"
    ):
        causal_conv1d_update(**given)
    assert torch.equal(given["conv_state"], torch.zeros(1, 8, 4))
    with torch.no_grad():
        causal_conv1d_update(**given)


def test_memory_that_is_shared_is_refused():
    x, weight = torch.randn(3, 8), torch.randn(8, 4)
    expanded = torch.randn(1, 8, 4).expand(3, 8, 4)
    windows = torch.randn(3, 11).unfold(1, 4, 1)
    for state in (expanded, windows):
        with pytest.raises(RuntimeError, match="expected conv_state whose elements have memory of their own"):
            causal_conv1d_update(x, state, weight)
    state = torch.randn(3, 8, 4)
    with pytest.raises(RuntimeError, match="expected x apart from conv_state, which is written in place"):
        causal_conv1d_update(state[:, :, :3], state, weight)
    with pytest.raises(RuntimeError, match="expected weight apart from conv_state"):
        causal_conv1d_update(x, state, state[0])
    # Parts of one buffer that do not meet are fine, also where one lies in the gaps of the other.
    buffer = torch.randn(3, 8, 5)
    alone, copy = buffer[..., :4].clone(), buffer[..., 4].clone()
    assert torch.equal(
        causal_conv1d_update(buffer[..., 4], buffer[..., :4], weight),
        causal_conv1d_update(copy, alone, weight),
    )


def test_opcheck():
    x, state, weight = torch.randn(2, 8, 3), torch.randn(2, 8, 3), torch.randn(8, 4)
    counts, snapshots = torch.tensor([3, 1]), torch.zeros(2, 4, 8, 3)
    torch.library.opcheck(
        torch.ops.arcore.causal_conv1d_update_steps.default,
        (x, state, weight, None, None, None, True, -1, counts, snapshots),
    )
