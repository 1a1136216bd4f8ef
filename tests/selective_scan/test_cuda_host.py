"""The sm_80 kernels, run on the CPU by tests/cuda_host, through the public function against the reference."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from arcore.ops import linear_scan, selective_scan
from tests.cuda_host.build import CudaHost, guarded, installed, unavailable
from tests.selective_scan.cases import Case, call, check_against_reference, everything, make_case

reason = unavailable()
pytestmark = [pytest.mark.thinned, pytest.mark.skipif(reason is not None, reason=reason or "")]


LONG_CASES: list[dict[str, Any]] = [
    {"initial": True},
    {"b": "constant", "c": "constant", "gate": False, "reverse": True},
    {"lengths": [5000, 0, 100, 3100], "initial": True},
    {"ids": (torch.arange(8200) // 700 % 5 - 1).expand(2, -1).int(), "initial": True, "reverse": True},
]


def long_case(i: int) -> Case:
    """Rows that are cut into segments, with decays that carry over many steps."""
    case = make_case(2, 3, 8200, 5, **LONG_CASES[i])
    return replace(case, A=case.A * 0.01)


@pytest.fixture(scope="module")
def long_rows_of_the_cpu() -> list[dict[str, torch.Tensor]]:
    return [everything(long_case(i)) for i in range(len(LONG_CASES))]


@pytest.mark.parametrize("i", range(len(LONG_CASES)))
def test_long_rows_are_cut_into_segments(
    long_rows_of_the_cpu: list[dict[str, torch.Tensor]], host: CudaHost, i: int
) -> None:
    """Against the CPU kernels: what enters a segment is what left the one before it."""
    for name, value in everything(long_case(i)).items():
        expected = long_rows_of_the_cpu[i][name]
        scale = expected.abs().max().item()
        assert (value - expected).abs().max().item() <= 3e-5 * scale, name


@pytest.fixture
def host() -> Iterator[CudaHost]:
    with installed("selective_scan") as kernels:
        yield kernels


@pytest.mark.parametrize("length", [0, 1, 15, 17, 31, 32, 33, 63, 65, 127])
def test_odd_lengths(host: CudaHost, length: int) -> None:
    check_against_reference(make_case(1, 17, length, 16, initial=True))


@pytest.mark.parametrize("state", [1, 3, 4, 5, 8, 16, 17, 33, 65, 129, 256])
def test_state_sizes(host: CudaHost, state: int) -> None:
    check_against_reference(make_case(1, 9, 40, state))


@pytest.mark.parametrize("dim", [1, 2, 31, 33, 65])
def test_channel_counts(host: CudaHost, dim: int) -> None:
    check_against_reference(make_case(2, dim, 20, 4))


@pytest.mark.parametrize("b", ["constant", "varying", "2", "6"])
@pytest.mark.parametrize("c", ["constant", "varying", "3"])
def test_shapes_of_b_and_c(host: CudaHost, b: str, c: str) -> None:
    check_against_reference(make_case(2, 12, 40, 7, b=b, c=c, initial=True))


@pytest.mark.parametrize("absent", ["skip", "gate", "bias", "softplus"])
@pytest.mark.parametrize("reverse", [False, True])
def test_optional_arguments(host: CudaHost, absent: str, reverse: bool) -> None:
    check_against_reference(make_case(2, 20, 40, 16, reverse=reverse, **{absent: False}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
def test_16_bit_storage(host: CudaHost, dtype: torch.dtype, reverse: bool) -> None:
    check_against_reference(make_case(2, 36, 70, 16, dtype=dtype, initial=True, reverse=reverse))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("state", "gate", "groups"), [(16, True, "1"), (5, False, "2"), (40, True, "varying")]
)
def test_chunks_are_copied_ahead(
    host: CudaHost, dtype: torch.dtype, state: int, gate: bool, groups: str
) -> None:
    """Where rows of 16 bits lie on 16 bytes; the same bits as from a layout that has no such rows."""
    case = make_case(2, 64, 72, state, dtype=dtype, gate=gate, b=groups, c=groups, initial=True)
    with torch.no_grad():
        out, last = call(selective_scan, case)
        assert host.statistics()["async_copies"] > 0
        strided = channel_last(case)
        other, other_last = call(selective_scan, strided)
        assert host.statistics()["async_copies"] == 0
    assert torch.equal(out, other) and torch.equal(last, other_last)


def channel_last(case: Case) -> Case:
    return case.map(lambda n, t: t.mT.contiguous().mT if n in ("u", "delta", "z", "grad_out") else t)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("state", "length", "gate", "groups"),
    [(16, 104, True, "1"), (16, 8, True, "1"), (5, 32, False, "2"), (40, 72, True, "varying")],
)
def test_the_backward_copies_chunks_ahead(
    host: CudaHost, dtype: torch.dtype, state: int, length: int, gate: bool, groups: str
) -> None:
    case = make_case(2, 64, length, state, dtype=dtype, gate=gate, b=groups, c=groups, initial=True)

    def gradients(case: Case) -> tuple[dict[str, torch.Tensor], int]:
        leaves = {name: t.detach().requires_grad_() for name, t in case.floats().items()}
        out, last = call(selective_scan, replace(case, **leaves))
        before = host.statistics()["all_async_copies"]
        grads = torch.autograd.grad(
            [out, last], list(leaves.values()), [case.grad_out, case.grad_last_state.to(last.dtype)]
        )
        copies = host.statistics()["all_async_copies"] - before
        return dict(zip(leaves, grads, strict=True)), copies

    ahead, copies = gradients(case)
    assert copies > 0
    for seed in (1, 2):
        host.set_seed(seed)
        again, _ = gradients(case)
        assert all(torch.equal(again[name], ahead[name]) for name in ahead)
    other, copies = gradients(channel_last(case))
    assert copies == 0
    for name in ahead:
        assert torch.equal(ahead[name], other[name]), name
    check_against_reference(case)


@pytest.mark.parametrize("lengths", [[5], [1, 32, 33, 3], [0, 0], [70, 0, 1, 40]])
@pytest.mark.parametrize("reverse", [False, True])
def test_packed_rows(host: CudaHost, lengths: list[int], reverse: bool) -> None:
    for initial in (False, True):
        check_against_reference(make_case(dim=18, state=5, lengths=lengths, initial=initial, reverse=reverse))


@pytest.mark.parametrize("reverse", [False, True])
def test_sequence_ids(host: CudaHost, reverse: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(-1, 3, (3, 20), generator=generator).repeat_interleave(4, dim=1).int()
    ids[1] = -1
    ids[2] = 0
    for initial in (False, True):
        check_against_reference(
            make_case(3, 9, 80, 16, ids=ids, initial=initial, reverse=reverse, softplus=initial)
        )


def test_nan_in_padding_stays_there(host: CudaHost) -> None:
    ids = torch.tensor([[0] * 30 + [-1] * 7 + [1] * 10]).int()
    case = make_case(1, 5, 47, 16, ids=ids)
    clean = everything(case)

    def poison(name: str, t: torch.Tensor) -> torch.Tensor:
        if name in ("u", "delta", "z", "B", "C", "grad_out"):
            t = t.clone()
            t[..., 30:37] = torch.nan
        return t

    found = everything(case.map(poison))
    for name, value in found.items():
        assert torch.equal(value, clean[name]), name


def test_layouts_give_the_same_bits(host: CudaHost) -> None:
    case = make_case(2, 40, 50, 16)
    wanted = everything(case)

    def channel_last(name: str, t: torch.Tensor) -> torch.Tensor:
        if name in ("u", "delta", "z", "B", "C", "grad_out"):
            return t.transpose(-1, -2).contiguous().transpose(-1, -2)
        return t

    def every_other(name: str, t: torch.Tensor) -> torch.Tensor:
        if name in ("u", "delta", "z", "B", "C", "grad_out"):
            wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), torch.nan)
            wide[..., ::2] = t
            return wide[..., ::2]
        return t

    for layout in (channel_last, every_other):
        found = everything(case.map(layout))
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_results_do_not_depend_on_order_or_batch(host: CudaHost) -> None:
    case = make_case(3, 40, 50, 16, initial=True)

    def results(seed: int, x: Case = case) -> dict[str, torch.Tensor]:
        host.set_seed(seed)
        return everything(x)

    first = results(0)
    for seed in range(1, 5):
        again = results(seed)
        assert all(torch.equal(first[name], again[name]) for name in first)
    shared = ("A", "D", "delta_bias")
    alone = results(9, case.map(lambda name, t: t if name in shared else t[1:2]))
    for name in first:
        if name not in shared:
            assert torch.equal(first[name][1:2], alone[name]), name


BULK = ("u", "delta", "z", "B", "C", "grad_out")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
def test_16_byte_accesses_give_the_same_bits(host: CudaHost, dtype: torch.dtype, reverse: bool) -> None:
    # Rows of 72 steps lie on 16 bytes, and so do rows of 40 channels; a copy shifted by one does not.
    case = make_case(2, 40, 72, 16, dtype=dtype, reverse=reverse)
    wanted = everything(case)

    def channel_last(name: str, t: torch.Tensor) -> torch.Tensor:
        return t.mT.contiguous().mT if name in BULK else t

    def shifted(name: str, t: torch.Tensor) -> torch.Tensor:
        return torch.cat([t[..., :1], t], dim=-1)[..., 1:] if name in BULK else t

    for layout in (channel_last, shifted, lambda _, t: guarded(t)):
        for name, value in everything(case.map(layout)).items():
            assert torch.equal(value, wanted[name]), name


def test_mixed_dtypes(host: CudaHost) -> None:
    halves = ("u", "C", "grad_out", "initial_state")
    case = make_case(2, 20, 40, 16, initial=True)
    check_against_reference(case.map(lambda name, t: t.bfloat16() if name in halves else t))


def test_steps_so_long_that_the_state_is_forgotten(host: CudaHost) -> None:
    case = make_case(1, 16, 40, 4, initial=True)
    check_against_reference(case.map(lambda name, t: t + 200 if name == "delta" else t))


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 0, 5), (2, 4, 0)])
def test_empty_tensors(host: CudaHost, shape: tuple[int, int, int]) -> None:
    check_against_reference(make_case(*shape, 3, initial=True))


def test_zero_step_changes_nothing(host: CudaHost) -> None:
    case = make_case(2, 20, 40, 16, initial=True, softplus=False, bias=False)
    case = case.map(lambda name, t: torch.zeros_like(t) if name == "delta" else t)
    assert torch.equal(call(selective_scan, case)[1], case.initial_state)


def test_nan_stays_in_its_row_and_channel(host: CudaHost) -> None:
    case = make_case(2, 20, 40, 16)
    case.u[1, 7, 30] = float("nan")
    out, last = call(selective_scan, case)
    bad = torch.zeros(2, 20, 40, dtype=torch.bool)
    bad[1, 7, 30:] = True
    assert torch.equal(out.isnan(), bad)
    assert last[1, 7].isnan().all()
    assert last.isnan().sum() == 16


def test_a_long_memory_keeps_its_accuracy(host: CudaHost) -> None:
    # Decays close to 1 multiply the error of the exponential by the number of steps.
    case = make_case(1, 4, 1500, 4)
    check_against_reference(case.map(lambda name, t: t * 1e-3 if name == "A" else t))


def test_boundaries_beyond_the_row_lead_nowhere(host: CudaHost) -> None:
    # Their values lie on the device, and the host does not look at them.
    case = make_case(dim=4, state=4, lengths=[10, 10]).map(lambda _, t: guarded(t))
    for bounds in ([-7, 10, 10**9], [30, 5, 2]):
        wrong = replace(case, cu_seqlens=torch.tensor(bounds, dtype=torch.int64))
        assert call(selective_scan, wrong)[0].shape == (1, 4, 20)


@pytest.mark.slow
def test_random_cases(host: CudaHost) -> None:
    chosen = random.Random(1)
    for seed in range(60):
        host.set_seed(seed)
        lengths = [chosen.randrange(0, 80) for _ in range(chosen.randrange(1, 5))]
        case = make_case(
            chosen.randrange(1, 4),
            chosen.choice([2, 6, 18, 36, 150]),
            chosen.choice([1, 17, 64, 129]),
            chosen.choice([1, 3, 8, 16, 20, 40]),
            b=chosen.choice(["constant", "varying", "2"]),
            c=chosen.choice(["constant", "varying", "2"]),
            skip=chosen.random() < 0.5,
            gate=chosen.random() < 0.5,
            bias=chosen.random() < 0.5,
            softplus=chosen.random() < 0.7,
            initial=chosen.random() < 0.5,
            lengths=lengths if chosen.random() < 0.3 else None,
            reverse=chosen.random() < 0.5,
            dtype=chosen.choice([torch.float32, torch.float32, torch.bfloat16]),
            seed=seed,
        )
        flip = chosen.random() < 0.5
        check_against_reference(
            case.map(lambda name, t: t.mT.contiguous().mT if name in BULK and t.dim() > 2 else t)
            if flip
            else case
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("rows", "length"), [(0, 4), (3, 0), (1, 1), (3, 31), (32, 32), (33, 33), (65, 100), (2, 700)]
)
def test_linear_scan_has_the_bits_of_the_cpu(rows: int, length: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows + length)
    a = 1.1 - 2 * torch.rand(rows, length, generator=generator, dtype=dtype)
    b = torch.randn(rows, length, generator=generator, dtype=dtype)
    initial = torch.randn(rows, generator=generator, dtype=dtype)
    a[:, length // 2 :][:, :1] = 0.0

    def all_ways() -> list[torch.Tensor]:
        return [
            linear_scan(*(guarded(t) if t.numel() else t for t in (a, b)), initial=given, reverse=reverse)
            for given in (None, initial)
            for reverse in (False, True)
        ]

    known = all_ways()
    for seed in (0, 1):
        with installed("selective_scan", seed) as host:
            assert all(map(torch.equal, all_ways(), known))
            assert rows * length == 0 or host.statistics()["async_copies"] > 0
            assert host.statistics()["bank_conflicts"] == 0 or rows * length == 0


def test_linear_scan_keeps_what_is_not_finite_in_its_row() -> None:
    a, b = torch.full((40, 50), 0.5), torch.ones(40, 50)
    clean = linear_scan(a, b)
    b[7, 3], b[9, 4] = torch.nan, torch.inf
    with installed("selective_scan"):
        found = linear_scan(a, b)
    assert found[7, 3:].isnan().all() and found[9, 4:].isinf().all()
    others = [r for r in range(40) if r not in (7, 9)]
    assert torch.equal(found[others], clean[others])
