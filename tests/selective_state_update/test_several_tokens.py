"""Several tokens in one call, counts of accepted ones, snapshots, padding, and what a write in place must not do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from arcore.ops import reference_selective_state_update, selective_scan, selective_state_update
from tests.selective_state_update.cases import make_step

TOKENS = ("x", "dt", "z", "B", "C")


def several(steps, **options):
    """A call with several tokens, and the calls with one token each."""
    singles = [make_step(seed=t, **options) for t in range(steps)]
    first = singles[0]
    singles = [replace(first, **{n: getattr(s, n) for n in TOKENS}) for s in singles]
    together = {
        n: torch.stack([getattr(s, n) for s in singles], 1) for n in TOKENS if getattr(first, n) is not None
    }
    return replace(first, **together), singles


def run(step, f=selective_state_update, **more):
    state = step.state.clone()
    out = f(
        state, step.x, step.dt, step.A, step.B, step.C, step.D, step.z, step.dt_bias, step.dt_softplus, **more
    )
    return out, state


@pytest.mark.parametrize(
    "options", [{}, {"heads": 6, "groups": 2}, {"heads": 4, "tied": True}, {"gate": False}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_one_call_per_token(options, dtype):
    together, singles = several(4, **options)
    together = together.map(lambda _, t: t.to(dtype))
    counts = torch.tensor([4, 0, 2])
    snapshots = torch.empty(3, 5, *together.state.shape[1:], dtype=dtype)
    out, after = run(together, num_steps=counts, snapshots=snapshots)
    state = together.state.clone()
    assert torch.equal(snapshots[:, 0], state)
    for t, single in enumerate(singles):
        single = single.map(lambda _, t: t.to(dtype))
        rows = torch.where(t < counts, torch.arange(3), -1)
        y = selective_state_update(
            *(state, single.x, single.dt, together.A, single.B, single.C, together.D, single.z),
            *(together.dt_bias, together.dt_softplus, rows),
        )
        assert torch.equal(out[:, t], y)
        assert torch.equal(snapshots[:, t + 1], state)
    assert torch.equal(after, state)
    expected = torch.empty_like(snapshots)
    reference, _ = run(together, reference_selective_state_update, num_steps=counts, snapshots=expected)
    tolerance = {"rtol": 3e-2, "atol": 3e-2} if dtype != torch.float32 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(out, reference, **tolerance)
    torch.testing.assert_close(snapshots, expected, **tolerance)


def test_a_snapshot_is_the_state_of_the_accepted_prefix():
    together, _ = several(5)
    for accepted in range(6):
        snapshots = torch.empty(3, 6, *together.state.shape[1:])
        run(together, snapshots=snapshots)
        prefix = together.map(lambda n, t, k=accepted: t[:, :k] if n in TOKENS else t)
        _, state = run(prefix)
        assert torch.equal(snapshots[:, accepted], state)


def test_tokens_of_one_call_equal_the_scan():
    u, delta, z = (torch.randn(2, 20, 9) for _ in range(3))
    a, b, c = -torch.rand(20, 16), torch.randn(2, 16, 9), torch.randn(2, 16, 9)
    scanned, last = selective_scan(u, delta, a, b, c, None, z, None, True, True)
    state = torch.zeros(2, 20, 16)
    tokens = [t.transpose(1, 2) for t in (u, delta, b, c, z)]
    y = selective_state_update(state, *tokens[:2], a, *tokens[2:4], None, tokens[4], None, True)
    torch.testing.assert_close(y.transpose(1, 2), scanned, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("f", [selective_state_update, reference_selective_state_update])
def test_padding_by_number_and_by_sign(f):
    step = replace(make_step(3), state=torch.randn(6, 20, 16), pad_slot_id=4)
    out, state = replace(step, state_batch_indices=torch.tensor([4, -3, 2])).run(f)
    assert torch.equal(out[:2], torch.zeros(2, 20))
    assert (state != step.state).flatten(1).any(1).tolist() == [False, False, True, False, False, False]


def test_wrong_counts_and_snapshots():
    together, singles = several(3)
    with pytest.raises(RuntimeError, match="expected num_steps from 0 to the 3 steps of x but got 9"):
        run(together, num_steps=torch.tensor([0, 9, 1]))
    with pytest.raises(
        ValueError, match=r"expected snapshots of shape \(3, 4, 20, 16\) but got \(3, 3, 20, 16\)"
    ):
        run(together, snapshots=torch.zeros(3, 3, 20, 16))
    with pytest.raises(ValueError, match=r"with num_steps or snapshots but got \(3, 20\); x.unsqueeze\(1\)"):
        run(singles[0], num_steps=torch.tensor([1, 1, 1]))


def test_a_write_is_seen_by_autograd():
    step = make_step(1)
    u, B = torch.randn(1, 20, 7), torch.randn(1, 16, 7)
    delta = torch.full((1, 20, 7), 0.3, requires_grad=True)
    out = selective_scan(u, delta, step.A, B, B, initial_state=step.state)
    selective_state_update(step.state, step.x, step.dt, step.A, step.B, step.C)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("name", ["state", "x", "A", "dt_bias"])
def test_gradients_and_tangents_are_refused(name):
    step = make_step(2)
    getattr(step, name).requires_grad_()
    arguments = (step.state, step.x, step.dt, step.A, step.B, step.C, step.D, step.z, step.dt_bias)
    with pytest.raises(RuntimeError, match="selective_state_update: expected tensors without gradients"):
        selective_state_update(*arguments)
    with torch.no_grad():
        selective_state_update(*arguments)
    with pytest.raises(NotImplementedError, match="without forward-mode tangents"):
        torch.func.jvp(
            lambda x: make_step(2).run(lambda s, _, *rest: selective_state_update(s, x, *rest))[0],
            (step.x.detach(),),
            (step.x.detach(),),
        )


def test_memory_that_is_shared_is_refused():
    step = make_step(3)
    with pytest.raises(RuntimeError, match="expected state whose elements have memory of their own"):
        selective_state_update(
            step.state[:1].expand(3, 20, 16), *(getattr(step, n) for n in ("x", "dt", "A", "B", "C"))
        )
    with pytest.raises(RuntimeError, match="expected B apart from state, which is written in place"):
        selective_state_update(step.state, step.x, step.dt, step.A, step.state[:, 0], step.C)


def test_opcheck_and_compile():
    together, _ = several(3)
    counts, snapshots = torch.tensor([3, 0, 1]), torch.zeros(3, 4, 20, 16)
    arguments = (
        together.state,
        together.x,
        together.dt,
        together.A,
        together.B,
        together.C,
        together.D,
        together.z,
    )
    torch.library.opcheck(
        torch.ops.arcore.selective_state_update_steps.default,
        (*arguments, together.dt_bias, True, None, -1, counts, snapshots),
    )

    def step(state, snapshots):
        return selective_state_update(state, *arguments[1:], dt_softplus=True, snapshots=snapshots) * 2

    results = []
    for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        state, kept = together.state.clone(), snapshots.clone()
        results.append((f(state, kept), state, kept))
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)
