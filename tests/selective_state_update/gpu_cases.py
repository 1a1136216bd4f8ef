"""What must hold of selective_state_update on a device: `check_*(device, small)`, see tests/device_checks.py."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from arcore.ops import selective_state_update
from tests import device_checks as checks
from tests.selective_state_update.cases import Step, check_against_reference, make_step

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BULK = ("x", "z", "B", "C", "dt")


def _ours(device: str) -> Any:
    return checks.on(device, selective_state_update, written=(0,))


def _there(step: Step, device: str) -> Step:
    moved = step.map(lambda _, t: checks.moved(t, device))
    return replace(moved, state_batch_indices=checks.moved(step.state_batch_indices, device))


def _run(step: Step) -> tuple[Tensor, Tensor]:
    return step.run(selective_state_update)


def check_sizes(device: str, small: bool) -> None:
    for d_state in (1, 17) if small else (1, 2, 3, 8, 15, 16, 17, 33, 64, 128, 255, 256):
        for dim in (1, 33) if small else (1, 15, 16, 17, 33, 130, 300):
            check_against_reference(make_step(2, dim, d_state), _ours(device))


def check_forms(device: str, small: bool) -> None:
    """Every optional argument left out, heads in groups, one number per head."""
    for absent in ("skip", "gate", "bias", "softplus"):
        for heads in (None, 6):
            step = make_step(heads=heads, groups=2, **{absent: False})  # type: ignore[arg-type]
            check_against_reference(step, _ours(device))
    for groups in (1, 2, 6):
        for tied in (False, True):
            for d_state in (16,) if small else (16, 37, 128):
                check_against_reference(make_step(2, 64, d_state, 6, groups, tied=tied), _ours(device))
    step = make_step(2, 64, 128, 6, tied=True)
    written_out = step.map(lambda _, t: t.contiguous())
    checks.assert_equal(step.run(_ours(device)), written_out.run(_ours(device)), "one number per head")


def check_16_bit_storage(device: str, small: bool) -> None:
    for dtype in DTYPES[1:]:
        for d_state in (16, 19):
            step = make_step(d_state=d_state)
            check_against_reference(step.map(lambda _, t, d=dtype: t.to(d)), _ours(device))
            mixed = step.map(lambda n, t, d=dtype: t.to(d) if n in BULK else t)
            check_against_reference(mixed, _ours(device))


def check_rows(device: str, small: bool) -> None:
    """Rows of a larger state are picked; padding changes nothing and gives 0; a row may come twice."""
    slots = torch.randn(7, 20, 16, generator=torch.Generator().manual_seed(1))
    for dtype in (torch.int32, torch.int64):
        picked = replace(make_step(4), state=slots, state_batch_indices=torch.tensor([5, -1, 0, 2]).to(dtype))
        check_against_reference(picked, _ours(device))
        out, state = picked.run(_ours(device))
        assert torch.equal(out[1], torch.zeros(20))
        for untouched in (1, 3, 4, 6):
            assert torch.equal(state[untouched], slots[untouched])
    twice = replace(make_step(3), state=slots[:2], state_batch_indices=torch.tensor([1, 1, 1]))
    check_against_reference(twice, _ours(device))


def check_empty(device: str, small: bool) -> None:
    for shape in ((0, 20, 16), (3, 0, 16)):
        check_against_reference(make_step(*shape), _ours(device))


LAYOUTS = {
    "last_dims_swapped": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 1 else t,
    "sliced": lambda t: t.repeat_interleave(3, dim=-1)[..., ::3],
}


def check_layouts(device: str, small: bool) -> None:
    for layout in LAYOUTS.values():
        for heads in (None, 6):
            step = _there(make_step(heads=heads), device)
            expected = _run(step)
            checks.assert_equal(
                _run(step.map(lambda n, t, f=layout: f(t) if n != "state" else t)), expected, "inputs"
            )
            strided = layout(step.state)
            assert strided.stride() != step.state.stride()
            out = selective_state_update(strided, *(getattr(step, f.name) for f in fields(step)[1:]))
            checks.assert_equal((out, strided), expected, "state")


def check_nan_stays_in_its_channel(device: str, small: bool) -> None:
    step = make_step()
    step.x[1, 7] = float("nan")
    out, state = step.run(_ours(device))
    assert out.isnan().nonzero().tolist() == [[1, 7]]
    assert state.isnan().sum() == 16 and state[1, 7].isnan().all()


def check_opcheck(device: str, small: bool) -> None:
    for step in (make_step(), make_step(heads=4, tied=True)):
        arguments = [getattr(_there(step, device), f.name) for f in fields(step)]
        torch.library.opcheck(torch.ops.arcore.selective_state_update.default, tuple(arguments))


def _with_state(step: Step) -> Any:
    """The step as a function of what varies from token to token; the state is changed in place."""

    def run(state: Tensor, x: Tensor, dt: Tensor, b: Tensor, c: Tensor) -> list[Tensor]:
        changed = replace(step, x=x, dt=dt, B=b, C=c)
        out = selective_state_update(state, *(getattr(changed, f.name) for f in fields(changed)[1:]))
        return [out, state]

    return run


def check_compile(device: str, small: bool) -> None:
    step = _there(make_step(3, 33), device)
    inner = _with_state(step)

    def run(state: Tensor, *rest: Tensor) -> list[Tensor]:
        return inner(state.clone(), *rest)

    inputs = (step.state, step.x, step.dt, step.B, step.C)
    checks.assert_compiles(run, *inputs, backend=checks.backend_for(small))


def check_graph(device: str, small: bool) -> None:
    """A captured step, replayed on other inputs and states, without waiting for the device."""
    for dtype in DTYPES[:2]:
        steps = [
            make_step(3, 33, seed=s).map(lambda n, t, d=dtype: t.to(d) if n in BULK else t) for s in range(4)
        ]
        run = _with_state(_there(steps[0], device))
        draws = [(s.state, s.x, s.dt, s.B, s.C) for s in steps]
        checks.assert_replays(device, run, draws)
        step = _there(steps[0], device)
        with checks.no_host_sync(device):
            _run(step)


def check_determinism(device: str, small: bool) -> None:
    step = _there(make_step(*((3, 34, 16) if small else (16, 2048, 128))), device)
    checks.assert_repeatable(lambda: _run(step), 5 if small else 50)


def check_batch_mates(device: str, small: bool) -> None:
    step = _there(make_step(5, 300, 64), device)
    together = _run(step)
    shared = ("A", "D", "dt_bias")
    for i in range(5):
        alone = _run(step.map(lambda n, t, i=i: t if n in shared else t[i : i + 1]))
        checks.assert_equal([t[0] for t in alone], [t[i] for t in together], f"row {i}")


def check_large_offsets(device: str, small: bool) -> None:
    """Rows of the state more than 2^31 elements apart."""
    step = _there(make_step(2, 20, 16), device)
    far = checks.far_apart(step.state.bfloat16(), small, device)
    near = far.clone(memory_format=torch.contiguous_format)
    rest = [getattr(step, f.name) for f in fields(step)[1:]]
    results = [(selective_state_update(state, *rest), state) for state in (far, near)]
    checks.assert_equal(*results, "far apart")


CHECKS = (
    check_sizes,
    check_forms,
    check_16_bit_storage,
    check_rows,
    check_empty,
    check_layouts,
    check_nan_stays_in_its_channel,
    check_opcheck,
    check_compile,
    check_graph,
    check_determinism,
    check_batch_mates,
    check_large_offsets,
)
SANITIZED = (check_sizes, check_forms, check_16_bit_storage, check_rows, check_layouts)
# Their failure cannot be brought about by wrong results: the op is called by its own name, or on nothing, or the
# disturbance keeps what they look at.
NOT_DISTURBED = (check_opcheck, check_empty, check_nan_stays_in_its_channel)
FUNCTIONS = ("selective_state_update",)
