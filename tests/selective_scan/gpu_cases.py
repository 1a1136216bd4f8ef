"""What must hold of selective_scan on a device: `check_*(device, small)`, see tests/device_checks.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from arcore.ops import linear_scan, reference_linear_scan, reference_selective_scan, selective_scan
from tests import device_checks as checks
from tests.selective_scan.cases import Case, call, check_against_reference, everything, make_case

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALONG_TIME = ("u", "delta", "z", "B", "C", "grad_out")


def _ours(device: str) -> Any:
    return checks.on(device, selective_scan)


def _there(case: Case, device: str) -> Case:
    names = ("cu_seqlens", "seq_idx")
    moved = {name: checks.moved(getattr(case, name), device) for name in names}
    return replace(case.map(lambda _, t: checks.moved(t, device)), **moved)


def _everything(case: Case) -> list[Tensor]:
    return list(everything(case, selective_scan).values())


def _arguments(case: Case) -> tuple[Any, ...]:
    return (
        *(case.u, case.delta, case.A, case.B, case.C, case.D, case.z, case.delta_bias, case.initial_state),
        *(case.cu_seqlens, case.seq_idx, case.delta_softplus, case.reverse),
    )


def check_lengths(device: str, small: bool) -> None:
    lengths = (1, 65) if small else (0, 1, 2, 15, 63, 64, 65, 127, 128, 129, 300, 511, 513)
    for length in lengths:
        for initial in (False, True):
            check_against_reference(make_case(2, 17, length, 16, initial=initial), _ours(device))


def check_long_rows(device: str, small: bool) -> None:
    """Rows that a device splits into chunks scanned side by side."""
    check_against_reference(make_case(1, 3, 200 if small else 3000, 16, initial=True), _ours(device))


def check_states_and_channels(device: str, small: bool) -> None:
    states = (1, 17) if small else (1, 2, 3, 8, 15, 16, 17, 32, 64, 100, 128, 255, 256)
    for state in states:
        check_against_reference(make_case(2, 9, 70, state), _ours(device))
    for dim in (1, 33) if small else (1, 2, 31, 32, 33, 64, 100, 130, 257):
        check_against_reference(make_case(2, dim, 70, 16), _ours(device))


def check_forms_of_b_and_c(device: str, small: bool) -> None:
    for b, c in (("constant", "2"), ("varying", "constant"), ("1", "4"), ("4", "varying")):
        check_against_reference(make_case(2, 12, 70, 16, b=b, c=c), _ours(device))


def check_optional_arguments(device: str, small: bool) -> None:
    for absent in ("skip", "gate", "bias", "softplus"):
        for reverse in (False, True):
            case = make_case(2, 12, 70, 16, **{absent: False}, initial=True, reverse=reverse)
            check_against_reference(case, _ours(device))


def check_16_bit_storage(device: str, small: bool) -> None:
    for dtype in DTYPES[1:]:
        for reverse in (False, True):
            check_against_reference(make_case(2, 20, 131, 16, dtype=dtype, reverse=reverse), _ours(device))


def check_packed_rows(device: str, small: bool) -> None:
    for lengths in ([3, 70], [5, 64, 0, 100, 1]):
        for reverse in (False, True):
            case = make_case(dim=12, state=16, lengths=lengths, initial=True, reverse=reverse)
            check_against_reference(case, _ours(device))
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(-1, 3, (3, 40), generator=generator).repeat_interleave(4, dim=1).int()
    ids[1] = -1
    for reverse in (False, True):
        case = make_case(3, 12, 160, 5, ids=ids, initial=True, reverse=reverse)
        check_against_reference(case, _ours(device))


def check_empty(device: str, small: bool) -> None:
    for shape in ((0, 4, 5), (2, 0, 5), (2, 4, 0)):
        check_against_reference(make_case(*shape, 3, initial=True), _ours(device))


LAYOUTS = {
    "channel_last": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "sliced": lambda t: t.repeat_interleave(3, dim=-1)[..., ::3],
    "offset": lambda t: torch.nn.functional.pad(t, (3, 2, 1, 4))[..., 1:-4, 3:-2],
    "batch_inner": lambda t: t.movedim(0, 1).contiguous().movedim(0, 1),
}


def check_layouts(device: str, small: bool) -> None:
    for dtype in DTYPES[:2]:
        case = make_case(2, 36, 131, 16, dtype=dtype)
        expected = _everything(_there(case, device))
        for name, layout in LAYOUTS.items():
            other = case.map(lambda n, t, layout=layout: layout(t) if n in ALONG_TIME else t)
            checks.assert_equal(_everything(_there(other, device)), expected, name)


def check_nan_stays_in_its_channel(device: str, small: bool) -> None:
    case = make_case(2, 20, 70, 16)
    case.u[1, 7, 30] = float("nan")
    out, last = call(_ours(device), case)
    bad = torch.zeros(2, 20, 70, dtype=torch.bool)
    bad[1, 7, 30:] = True
    assert torch.equal(out.isnan(), bad)
    assert last[1, 7].isnan().all() and last.isnan().sum() == 16


def check_opcheck(device: str, small: bool) -> None:
    for options in (
        {},
        {"dtype": torch.bfloat16, "initial": True, "reverse": True},
        {"b": "constant", "c": "2", "skip": False, "gate": False, "bias": False},
        {"lengths": [3, 70], "initial": True},
    ):
        case = _there(make_case(2, 6, 70, 4, **options), device)
        leaves = [
            t.requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t
            for t in _arguments(case)
        ]
        torch.library.opcheck(torch.ops.arcore.selective_scan.default, (*leaves, True))
    case = _there(make_case(2, 6, 70, 4, initial=True), device)
    with torch.no_grad():
        states = torch.ops.arcore.selective_scan(*_arguments(case), True)[2]
    torch.library.opcheck(
        torch.ops.arcore.selective_scan_backward.default,
        (case.grad_out, case.grad_last_state, *_arguments(case)[:11], states, True, False),
    )


def _leaves(case: Case) -> list[Tensor]:
    return [t.requires_grad_() for t in case.floats().values()]


def check_compile(device: str, small: bool) -> None:
    case = _there(make_case(2, 12, 70, 16, initial=True), device)
    names = list(case.floats())

    def step(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        x = dict(zip(names, tensors, strict=True))
        state = x.pop("initial_state")
        return selective_scan(**x, delta_softplus=True, return_last_state=True, initial_state=2 * state)

    checks.assert_compiles(step, *_leaves(case), backend=checks.backend_for(small))


def check_graph(device: str, small: bool) -> None:
    """Forward and backward in a captured graph, replayed with other inputs, without waiting for the device."""
    for dtype in DTYPES[:2]:
        length = 70 if small else 1100
        cases = [make_case(2, 33, length, 16, initial=True, dtype=dtype, seed=s) for s in range(4)]
        names = [*cases[0].floats(), "grad_out", "grad_last_state"]

        def step(*tensors: Tensor, names: list[str] = names, base: Case = cases[0]) -> list[Tensor]:
            return _everything(replace(base, **dict(zip(names, tensors, strict=True))))

        checks.assert_replays(device, step, [[getattr(c, name) for name in names] for c in cases])
        case = _there(cases[0], device)
        with checks.no_host_sync(device):
            _everything(case)
    packed = _there(make_case(dim=12, state=16, lengths=[3, 70], initial=True), device)
    _everything(packed)
    with checks.no_host_sync(device):
        _everything(packed)


def check_determinism(device: str, small: bool) -> None:
    for options in ({"dtype": torch.bfloat16, "b": "2"}, {"initial": True}):
        shape = (2, 34, 100, 16) if small else (4, 512, 1000, 16)
        case = _there(make_case(*shape, **options), device)
        checks.assert_repeatable(lambda case=case: _everything(case), 5 if small else 50)


def check_batch_mates(device: str, small: bool) -> None:
    per_row = {*ALONG_TIME, "initial_state", "grad_last_state"}
    for length in (100,) if small else (100, 2500):
        case = _there(make_case(5, 20, length, 16, initial=True), device)
        together = everything(case, selective_scan)
        for i in range(5):
            mine = case.map(lambda name, t, i=i: t[i : i + 1] if name in per_row else t)
            alone = everything(mine, selective_scan)
            for name in ("out", "last_state", "u", "delta", "B", "C", "z", "initial_state"):
                checks.assert_equal(alone[name][0], together[name][i], f"{name} of row {i}")


def check_large_offsets(device: str, small: bool) -> None:
    """Batch entries more than 2^31 elements apart."""
    case = _there(make_case(2, 20, 70, 16, dtype=torch.bfloat16), device)
    far = case.map(lambda n, t: checks.far_apart(t, small, device) if n in ("u", "delta", "z") else t)
    checks.assert_equal(_everything(far), _everything(case), "far apart")


def check_large_outputs(device: str, small: bool) -> None:
    """More than 2^31 elements; the last batch entry is as if alone."""
    batch, dim, length = (3, 32, 70) if small else (260, 2048, 4096)
    checks.need_memory(8 * batch * dim * length * 2 + 8 * batch * dim * length // 2, device)
    pair = _there(make_case(2, dim, length, 16, dtype=torch.bfloat16), device)
    per_row = {*ALONG_TIME, "grad_last_state"}

    def grown(name: str, t: Tensor) -> Tensor:
        return torch.cat([t[:1].expand(batch - 1, *t.shape[1:]), t[1:]]) if name in per_row else t

    whole = everything(pair.map(grown), selective_scan)
    for i, source in ((0, 0), (batch - 2, 0), (batch - 1, 1)):
        mine = pair.map(lambda n, t, s=source: t[s : s + 1] if n in per_row else t)
        alone = everything(mine, selective_scan)
        for name in ("out", "last_state", "u", "delta", "B", "C", "z"):
            checks.assert_equal(alone[name][0], whole[name][i], f"{name} of row {i}")


def check_linear_recurrence(device: str, small: bool) -> None:
    """The plain loop's bits, whatever the factors, and its gradients."""
    generator = torch.Generator().manual_seed(7)
    sizes = (
        ((3, 33), (33, 64)) if small else ((0, 5), (5, 0), (1, 1), (3, 31), (32, 32), (33, 65), (300, 2048))
    )
    for rows, length in sizes:
        for dtype in (torch.float32, torch.float64):
            a = 1.5 - 2 * torch.rand(rows, length, generator=generator, dtype=dtype)
            b = torch.randn(rows, length, generator=generator, dtype=dtype)
            given = torch.randn(rows, generator=generator, dtype=dtype)
            for reverse in (False, True):
                for initial in (None, given):
                    found = []
                    for function in (checks.on(device, linear_scan), reference_linear_scan):
                        leaves = [x.clone().requires_grad_() for x in (a, b)]
                        out = function(*leaves, initial=initial, reverse=reverse)
                        found.append([out, *torch.autograd.grad(out, leaves, b)])
                    checks.assert_equal(found[0][0], found[1][0], "states")
                    for ours, known in zip(found[0][1:], found[1][1:], strict=True):
                        torch.testing.assert_close(ours, known, rtol=1e-4, atol=1e-4)


def check_forward_mode(device: str, small: bool) -> None:
    """Tangents of the output and of the last state, which a GPU takes in PyTorch."""
    dim = 5 if small else 40
    for options in ({}, {"lengths": [5, 0, 60], "b": "constant"}, {"reverse": True, "gate": False}):
        case = make_case(2, dim, 65, 4, initial=True, **options)
        exact, given = case.to(torch.float64), case.floats()
        generator = torch.Generator().manual_seed(3)
        along = tuple(torch.randn(t.shape, generator=generator) for t in given.values())
        found = []
        for c, function, ways in (
            (case, _ours(device), along),
            (exact, reference_selective_scan, tuple(t.double() for t in along)),
        ):

            def run(
                *tensors: Tensor, c: Case = c, function: Any = function, names: Any = tuple(given)
            ) -> Any:
                return call(function, replace(c, **dict(zip(names, tensors, strict=True))))

            results = torch.func.jvp(run, tuple(c.floats().values()), ways)
            found.append((*results[0], *results[1]))
        names = ("out", "last_state", "tangent of out", "tangent of last_state")
        for name, ours, known in zip(names, *found, strict=True):
            error = (ours.double() - known).abs().max().item()
            assert error <= 1e-4 * known.abs().max().item(), f"{name}: off by {error:.1e}"


CHECKS = (
    check_lengths,
    check_long_rows,
    check_states_and_channels,
    check_forms_of_b_and_c,
    check_optional_arguments,
    check_16_bit_storage,
    check_packed_rows,
    check_linear_recurrence,
    check_forward_mode,
    check_empty,
    check_layouts,
    check_nan_stays_in_its_channel,
    check_opcheck,
    check_compile,
    check_graph,
    check_determinism,
    check_batch_mates,
    check_large_offsets,
    check_large_outputs,
)
SANITIZED = (
    check_lengths,
    check_states_and_channels,
    check_forms_of_b_and_c,
    check_optional_arguments,
    check_16_bit_storage,
    check_packed_rows,
    check_linear_recurrence,
)
# Their failure cannot be brought about by wrong results: the op is called by its own name, or on nothing.
NOT_DISTURBED = (check_opcheck, check_nan_stays_in_its_channel)
FUNCTIONS = ("selective_scan", "linear_scan")
