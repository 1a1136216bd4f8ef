"""What must hold of causal_conv1d and its update on a device: `check_*(device, small)`, see tests/device_checks.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from arcore.ops import causal_conv1d, causal_conv1d_update, reference_causal_conv1d_update
from tests import device_checks as checks
from tests.causal_conv1d.cases import ALONG_TIME, Case, check_against_reference, everything, make_case

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _ours(device: str) -> Any:
    return checks.on(device, causal_conv1d)


def _there(case: Case, device: str) -> Case:
    moved = case.map(lambda _, t: checks.moved(t, device))
    return replace(moved, seq_idx=checks.moved(case.seq_idx, device))


def _everything(case: Case) -> list[Tensor]:
    return list(everything(case, causal_conv1d).values())


def check_lengths(device: str, small: bool) -> None:
    lengths = (1, 65) if small else (0, 1, 2, 3, 15, 63, 64, 65, 127, 255, 256, 257, 1000, 3001)
    for length in lengths:
        for initial in (False, True):
            check_against_reference(make_case(2, 17, length, initial=initial), _ours(device))


def check_widths(device: str, small: bool) -> None:
    for width in (2, 5) if small else (1, 2, 3, 4, 5, 9, 31, 300):
        for reverse in (False, True):
            for activation in (None, "silu"):
                case = make_case(2, 9, 270, width, initial=True, reverse=reverse, activation=activation)
                check_against_reference(case, _ours(device))


def check_channels(device: str, small: bool) -> None:
    for dim in (1, 33) if small else (1, 2, 15, 31, 32, 33, 64, 130, 257):
        check_against_reference(make_case(2, dim, 20, bias=False), _ours(device))


def check_16_bit_storage(device: str, small: bool) -> None:
    for dtype in DTYPES[1:]:
        case = make_case(2, 36, 300, initial=True)
        check_against_reference(case.to(dtype), _ours(device))
        mixed = case.map(lambda n, t, d=dtype: t.to(d) if n in (*ALONG_TIME, "grad_final") else t)
        check_against_reference(mixed, _ours(device))


def check_sequence_ids(device: str, small: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(-1, 3, (3, 100), generator=generator).repeat_interleave(3, dim=1).int()
    ids[1], ids[2] = -1, 0
    for reverse in (False, True):
        for width in (2, 4, 9):
            case = make_case(3, 18, 300, width, ids=ids, initial=True, reverse=reverse)
            check_against_reference(case, _ours(device))


def check_empty(device: str, small: bool) -> None:
    for shape in ((0, 4, 5), (2, 0, 5), (2, 4, 0)):
        check_against_reference(make_case(*shape, initial=True), _ours(device))


LAYOUTS = {
    "channel_last": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "sliced": lambda t: t.repeat_interleave(3, dim=-1)[..., ::3],
    "offset": lambda t: torch.nn.functional.pad(t, (3, 2, 1, 4))[..., 1:-4, 3:-2],
}


def check_layouts(device: str, small: bool) -> None:
    for dtype in DTYPES[:2]:
        for reverse in (False, True):
            case = make_case(2, 36, 131, initial=True, reverse=reverse).to(dtype)
            expected = _everything(_there(case, device))
            for name, layout in LAYOUTS.items():
                other = case.map(lambda n, t, layout=layout: layout(t) if n in ALONG_TIME else t)
                checks.assert_equal(_everything(_there(other, device)), expected, name)


def check_opcheck(device: str, small: bool) -> None:
    for options in ({}, {"bias": False, "initial": True, "reverse": True}):
        case = _there(make_case(2, 6, 70, **options), device)
        floats = {name: t.requires_grad_() for name, t in case.floats().items()}
        x, weight, bias, initial = (floats.get(n) for n in ("x", "weight", "bias", "initial_states"))
        torch.library.opcheck(
            torch.ops.arcore.causal_conv1d.default, (x, weight, bias, None, initial, True, case.reverse)
        )
        backward = torch.ops.arcore.causal_conv1d_backward.default
        arguments = (case.x, case.weight, case.bias, None, case.initial_states)
        plain = [None if t is None else t.detach() for t in arguments]
        torch.library.opcheck(backward, (case.grad_out, case.grad_final, *plain, True, case.reverse))
    case = _there(make_case(2, 6, 1), device)
    state = torch.randn(2, 6, 3, device=device)
    torch.library.opcheck(
        torch.ops.arcore.causal_conv1d_update.default,
        (case.x, state, case.weight, case.bias, None, None, True),
    )


def check_compile(device: str, small: bool) -> None:
    case = _there(make_case(2, 12, 70, initial=True), device)
    x, weight, bias, initial = (t.requires_grad_() for t in case.floats().values())

    def step(x: Tensor, weight: Tensor, bias: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
        return causal_conv1d(2 * x, weight, bias, None, initial, True, None, "silu")

    checks.assert_compiles(step, x, weight, bias, initial, backend=checks.backend_for(small))

    def update(x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        state = state.clone()
        return causal_conv1d_update(x, state, weight.detach(), None, "silu"), state

    token, state = x.detach()[..., 0], torch.randn(2, 12, 3, device=device)
    checks.assert_compiles(update, token, state, backend=checks.backend_for(small))


def check_graph(device: str, small: bool) -> None:
    """Forward, backward and update in captured graphs, replayed with other inputs, without waiting."""
    for dtype in DTYPES[:2]:
        cases = [make_case(2, 33, 70 if small else 700, initial=True, seed=s).to(dtype) for s in range(4)]
        names = [*cases[0].floats(), "grad_out", "grad_final"]

        def step(*tensors: Tensor, names: list[str] = names, base: Case = cases[0]) -> list[Tensor]:
            return _everything(replace(base, **dict(zip(names, tensors, strict=True))))

        checks.assert_replays(device, step, [[getattr(c, name) for name in names] for c in cases])
        case = _there(cases[0], device)
        with checks.no_host_sync(device):
            _everything(case)

    def update(x: Tensor, state: Tensor, weight: Tensor, places: Tensor, rows: Tensor) -> list[Tensor]:
        out = causal_conv1d_update(x, state, weight, None, "silu", places, rows)
        return [out, state]

    draws = []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(6, generator=generator)[:3].int()
        rows[seed % 3] = -1
        places = torch.randint(0, 40, (3,), generator=generator).int()
        draws.append(
            (
                torch.randn(3, 20, generator=generator),
                torch.randn(6, 20, 5, generator=generator),
                torch.randn(20, 4, generator=generator),
                places,
                rows,
            )
        )
    checks.assert_replays(device, update, draws)


def check_determinism(device: str, small: bool) -> None:
    for dtype in DTYPES[:2]:
        shape = (2, 34, 100) if small else (8, 600, 2000)
        case = _there(make_case(*shape, initial=True).to(dtype), device)
        checks.assert_repeatable(lambda case=case: _everything(case), 5 if small else 50)


def check_batch_mates(device: str, small: bool) -> None:
    per_row = {*ALONG_TIME, "initial_states", "grad_final"}
    case = _there(make_case(5, 20, 300, initial=True), device)
    together = everything(case, causal_conv1d)
    for i in range(5):
        mine = case.map(lambda name, t, i=i: t[i : i + 1] if name in per_row else t)
        alone = everything(mine, causal_conv1d)
        for name in ("out", "final", "x", "initial_states"):
            checks.assert_equal(alone[name][0], together[name][i], f"{name} of row {i}")


def check_large_offsets(device: str, small: bool) -> None:
    """Batch entries more than 2^31 elements apart."""
    case = _there(make_case(2, 20, 70).to(torch.bfloat16), device)
    far = case.map(lambda n, t: checks.far_apart(t, small, device) if n in ALONG_TIME else t)
    checks.assert_equal(_everything(far), _everything(case), "far apart")


def check_large_outputs(device: str, small: bool) -> None:
    """More than 2^31 elements; the last batch entry is as if alone."""
    batch, dim, length = (3, 32, 70) if small else (260, 2048, 4096)
    checks.need_memory(6 * batch * dim * length * 2, device)
    pair = _there(make_case(2, dim, length).to(torch.bfloat16), device)
    per_row = {*ALONG_TIME, "grad_final"}

    def grown(name: str, t: Tensor) -> Tensor:
        return torch.cat([t[:1].expand(batch - 1, *t.shape[1:]), t[1:]]) if name in per_row else t

    whole = everything(pair.map(grown), causal_conv1d)
    for i, source in ((0, 0), (batch - 2, 0), (batch - 1, 1)):
        mine = pair.map(lambda n, t, s=source: t[s : s + 1] if n in per_row else t)
        alone = everything(mine, causal_conv1d)
        for name in ("out", "final", "x"):
            checks.assert_equal(alone[name][0], whole[name][i], f"{name} of row {i}")


def _compare_update(device: str, x: Tensor, state: Tensor, *rest: Any) -> None:
    update: Callable[..., Tensor] = checks.on(device, causal_conv1d_update, written=(1,))
    ours, theirs = state.clone(), state.clone()
    out = update(x, ours, *rest)
    expected = reference_causal_conv1d_update(x, theirs, *rest)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}[x.dtype]
    torch.testing.assert_close(out.float(), expected.float(), rtol=tolerance, atol=1e-5)
    assert torch.equal(ours, theirs)


def check_update(device: str, small: bool) -> None:
    """Shifted and ring states, several new tokens, chosen rows, padding rows, 16 bits, strided states."""
    for width in (2, 4) if small else (2, 3, 4, 7):
        for spare, steps in ((0, 1), (5, 2), (1, 6)):
            generator = torch.Generator().manual_seed(width)
            x = torch.randn(3, 21, steps, generator=generator)
            state = torch.randn(3, 21, width - 1 + spare, generator=generator)
            case = make_case(3, 21, 1, width)
            for places in (None, torch.tensor([0, 4, 1000])):
                _compare_update(device, x, state, case.weight, case.bias, "silu", places)
    case = make_case(4, 20, 1)
    slots = torch.randn(6, 20, 3, generator=torch.Generator().manual_seed(9))
    rows = torch.tensor([5, -1, 0, 2], dtype=torch.int32)
    for dtype in DTYPES:
        typed = case.to(dtype)
        arguments = (typed.weight, typed.bias, "silu", None, rows)
        _compare_update(device, typed.x[..., 0], slots.to(dtype), *arguments)
        strided = slots.to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
        _compare_update(device, typed.x[..., 0], strided, *arguments)


CHECKS = (
    check_lengths,
    check_widths,
    check_channels,
    check_16_bit_storage,
    check_sequence_ids,
    check_empty,
    check_layouts,
    check_opcheck,
    check_compile,
    check_graph,
    check_determinism,
    check_batch_mates,
    check_large_offsets,
    check_large_outputs,
    check_update,
)
SANITIZED = (
    check_lengths,
    check_widths,
    check_channels,
    check_16_bit_storage,
    check_sequence_ids,
    check_layouts,
    check_update,
)
# Its failure cannot be brought about by wrong results: the op is called by its own name.
NOT_DISTURBED = (check_opcheck,)
FUNCTIONS = ("causal_conv1d", "causal_conv1d_update")
