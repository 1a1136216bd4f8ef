"""The sm_80 kernels, run on the CPU by tests/cuda_host, through the public function against the reference."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from arcore.ops import reference_ssd, ssd
from tests.cuda_host.build import CudaHost, guarded, installed, unavailable
from tests.ssd.cases import ALONG_TIME, Case, call, check_against_reference, everything, make_case

reason = unavailable()
pytestmark = [pytest.mark.thinned, pytest.mark.skipif(reason is not None, reason=reason or "")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PER_ROW = (*ALONG_TIME, "initial_state", "grad_last_state")


@pytest.fixture
def host() -> Iterator[CudaHost]:
    with installed("ssd") as kernels:
        yield kernels


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names of the results that differ."""
    return [name for name in a if not torch.equal(a[name], b[name])]


@pytest.mark.parametrize("length", [0, 1, 15, 17, 31, 33, 63, 64, 65, 127, 200])
def test_odd_lengths(host: CudaHost, length: int) -> None:
    check_against_reference(make_case(1, length, 3, 17, groups=1, initial=True))


@pytest.mark.parametrize("dim", [1, 15, 16, 33, 64, 100])
@pytest.mark.parametrize("state", [1, 5, 40, 64, 65, 128])
def test_sizes(host: CudaHost, dim: int, state: int) -> None:
    check_against_reference(make_case(1, 70, 2, dim, state, 1, initial=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize(("dim", "state"), [(64, 128), (64, 64), (64, 16), (24, 200), (8, 256)])
def test_storage(host: CudaHost, dtype: torch.dtype, gate: bool, dim: int, state: int) -> None:
    case = make_case(1, 130, 2, dim, state, 1, initial=True, gate=gate)
    if dtype != torch.float32 or state <= 128:
        check_against_reference(case.to(dtype))
        return
    # On a GPU another way is taken before anybody asks; the forward has the kernel.
    with pytest.raises(
        RuntimeError, match=f"expected d_state of at most 128 with float32 .* but got {state}"
    ):
        everything(case)
    with torch.no_grad():
        for ours, known in zip(call(ssd, case), call(reference_ssd, case.to(torch.float64)), strict=True):
            torch.testing.assert_close(ours.double(), known, rtol=0, atol=1e-6 * known.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(
    "names", [ALONG_TIME, ("x", "grad_out"), ("B", "C", "z"), ("dt", "A", "initial_state")]
)
def test_mixed_storage(host: CudaHost, dtype: torch.dtype, names: tuple[str, ...]) -> None:
    check_against_reference(make_case(initial=True).map(lambda n, t: t.to(dtype) if n in names else t))


@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (5, 1), (9, 1), (6, 2), (6, 3), (6, 6)])
def test_heads_and_groups(host: CudaHost, heads: int, groups: int) -> None:
    check_against_reference(make_case(2, 70, heads, 20, 16, groups))


OPTIONS: list[dict[str, Any]] = [
    {"skip": None},
    {"skip": "head"},
    {"gate": False},
    {"bias": False},
    {"softplus": False},
    {"limit": (0.2, 0.7)},
    {"initial": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("reverse", [False, True])
def test_optional_arguments(host: CudaHost, options: dict[str, Any], reverse: bool) -> None:
    check_against_reference(make_case(reverse=reverse, **options))


@pytest.mark.parametrize("lengths", [[5], [1, 64, 65, 3], [0, 0], [200, 0, 1, 130], [20, 20, 20, 20, 3]])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_packed_rows(host: CudaHost, lengths: list[int], reverse: bool, dtype: torch.dtype) -> None:
    for initial in (False, True):
        check_against_reference(make_case(lengths=lengths, initial=initial, reverse=reverse).to(dtype))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_sequence_ids(host: CudaHost, reverse: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(-1, 3, (3, 40), generator=generator).repeat_interleave(4, dim=1).int()
    ids[1] = -1
    ids[2] = 0
    for initial in (False, True):
        check_against_reference(make_case(3, 160, ids=ids, initial=initial, reverse=reverse).to(dtype))


def test_every_step_a_sequence_of_its_own(host: CudaHost) -> None:
    check_against_reference(make_case(lengths=[1] * 70, initial=True))
    check_against_reference(make_case(1, 70, ids=torch.arange(70)[None].int(), initial=True))


# ---- rows whose cells are worked on side by side: few heads, more than four cells ----

LONG: list[Callable[[], Case]] = [
    lambda: make_case(1, 500, 1, 20, 16, 1, initial=True),
    lambda: make_case(1, 330, 2, 20, 16, 2, reverse=True),
    lambda: make_case(1, 600, 1, 64, 64, 1, initial=True).to(torch.bfloat16),
    lambda: make_case(1, 450, 1, 20, 200, 1, initial=True).to(torch.bfloat16),
    lambda: make_case(1, heads=1, groups=1, lengths=[300, 0, 5, 2, 100, 1], initial=True),
    lambda: make_case(1, heads=1, groups=1, lengths=[64, 64, 64, 100, 200], reverse=True),
    lambda: make_case(
        1, 420, 1, groups=1, ids=(torch.arange(420) // 60 % 4 - 1)[None].int(), initial=True, reverse=True
    ),
]


@pytest.mark.parametrize("i", range(len(LONG)))
def test_long_rows_of_few_heads(host: CudaHost, i: int) -> None:
    case = LONG[i]()
    check_against_reference(replace(case, A=case.A * 0.01))


@pytest.mark.parametrize("i", range(len(LONG)))
def test_cells_side_by_side_give_the_bits_of_cells_in_order(host: CudaHost, i: int) -> None:
    """Eight copies of the heads fill the device, and each block goes through its row."""
    case = LONG[i]()
    case = replace(case, A=case.A * 0.01)
    groups = case.B.shape[2]
    many = case.map(
        lambda n, t: t.repeat_interleave(8, {1: 0, 2: 0, 3: 2, 4: 1 if "state" in n else 2}[t.dim()])
    )
    assert many.B.shape[2] == 8 * groups
    heads, tiles = case.x.shape[2], (case.x.shape[3] + 63) // 64
    with torch.no_grad():
        alone = call(ssd, case)
        assert host.statistics()["blocks"] > heads * tiles
        together = call(ssd, many)
        assert host.statistics()["blocks"] == 8 * heads * tiles
    assert torch.equal(together[0][:, :, ::8], alone[0])
    assert torch.equal(together[1][:, ::8], alone[1])
    alone, together = everything(case), everything(many)
    for name in ("x", "dt", "B", "C", "z", "initial_state"):
        if name in alone:
            head = 1 if name == "initial_state" else 2
            assert torch.equal(together[name].select(head, 0), alone[name].select(head, 0)), name


# ---- equal bits ----

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "time_inner": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
    "every_other": lambda t: torch.stack([t, torch.full_like(t, torch.nan)], dim=-1).flatten(-2)[..., ::2],
    "off_by_one": lambda t: torch.cat([t[..., :1], t], dim=-1)[..., 1:],
    "guarded": lambda t: guarded(t) if t.numel() else t,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reverse", [False, True])
def test_layouts_give_the_same_bits(host: CudaHost, layout: str, dtype: torch.dtype, reverse: bool) -> None:
    case = make_case(1, 80, 2, 24, 40, 1, reverse=reverse, initial=True).to(dtype)
    other = case.map(lambda n, t: LAYOUTS[layout](t) if n in ALONG_TIME else t)
    assert not same(everything(other), everything(case))


def test_copies_are_asynchronous_where_rows_lie_on_16_bytes(host: CudaHost) -> None:
    case = make_case(1, 200, 1, 64, 64, 1, gate=False).to(torch.bfloat16)
    with torch.no_grad():
        call(ssd, case)
        tiles = host.statistics()["async_copies"]
        call(ssd, case.map(lambda n, t: LAYOUTS["off_by_one"](t) if n in ALONG_TIME else t))
        sizes = host.statistics()["async_copies"]
    assert tiles > 10 * sizes > 0
    assert host.statistics()["bank_conflicts"] == 0


def test_results_do_not_depend_on_order_or_batch_mates(host: CudaHost) -> None:
    case = make_case(3, 170, 2, 20, 16, 1, initial=True)
    first = everything(case)
    for seed in range(1, 4):
        host.set_seed(seed)
        assert not same(everything(case), first)
    for i in range(3):
        alone = everything(case.map(lambda n, t, i=i: t[i : i + 1] if n in PER_ROW else t))
        rows = {n: t[i : i + 1] for n, t in first.items() if n in (*PER_ROW, "out", "last_state")}
        assert not same(rows, alone)


# ---- what is not finite ----


def test_padding_may_hold_nan(host: CudaHost) -> None:
    ids = torch.tensor([[-1, -1, *[0] * 30, *[-1] * 40, 1, 1, -1, 2]], dtype=torch.int32)
    clean = make_case(1, ids.shape[1], ids=ids)
    case = clean.map(lambda _, t: t.clone())
    for name in ALONG_TIME:
        getattr(case, name)[:, ids[0] < 0] = float("nan")
    assert not same(everything(case), everything(clean))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_reaches_later_steps_of_its_channel_alone(
    host: CudaHost, dtype: torch.dtype, value: float
) -> None:
    case = make_case(2, 70).to(dtype)
    with torch.no_grad():
        clean = call(ssd, case)
        case.x[1, 30, 2, 7] = value
        out, last = call(ssd, case)
    bad = torch.zeros_like(out, dtype=torch.bool)
    bad[1, 30:, 2, 7] = True
    assert torch.equal(~out.isfinite(), bad)
    assert torch.equal(out[~bad], clean[0][~bad])
    assert not last[1, 2, 7].isfinite().any() and (~last.isfinite()).sum() == 16


@pytest.mark.parametrize("name", ["x", "dt", "B", "C"])
def test_other_sequences_of_a_cell_may_hold_nan(host: CudaHost, name: str) -> None:
    lengths = [20, 20, 24, 30]
    case = make_case(lengths=lengths, initial=True)
    ids = torch.arange(4).repeat_interleave(torch.tensor(lengths))[None].int()
    for one in (
        case,
        replace(
            case, cu_seqlens=None, seq_idx=ids, initial_state=None, grad_last_state=case.grad_last_state[:1]
        ),
    ):
        with torch.no_grad():
            clean = call(ssd, one)
            poisoned = one.map(lambda n, t: t.clone())
            getattr(poisoned, name)[:, 25:30] = float("nan")
            out, last = call(ssd, poisoned)
        others = (ids[0] != 1).nonzero()[:, 0]
        assert torch.equal(out[:, others], clean[0][:, others])
        assert out[:, 25:30].isnan().any()
        if one.cu_seqlens is None:
            assert torch.equal(last, clean[1])
        else:
            assert torch.equal(last[[0, 2, 3]], clean[1][[0, 2, 3]])
            assert bool(last[1].isnan().any()) == (name != "C")


def test_infinite_decay_forgets(host: CudaHost) -> None:
    case = make_case(1, 70, 4, 8, 4, 1, initial=True, softplus=False, bias=False, skip=None, gate=False)
    case = replace(case, dt=torch.ones_like(case.dt), A=torch.full_like(case.A, -float("inf")))
    with torch.no_grad():
        out, last = call(ssd, case)
    torch.testing.assert_close(out, (case.B * case.C).sum(-1, keepdim=True) * case.x)
    torch.testing.assert_close(last, case.x[:, -1, ..., None] * case.B[:, -1, :, None])


def test_long_decays_stay_exact(host: CudaHost) -> None:
    case = make_case(1, 130, 2, 8, groups=1, softplus=False, bias=False)
    check_against_reference(replace(case, A=torch.tensor([-30.0, -0.01]), dt=case.dt.abs() + 0.5))


def test_growing_states(host: CudaHost) -> None:
    check_against_reference(make_case().map(lambda n, t: t.abs() * 0.1 if n == "A" else t))


# ---- the rest ----


@pytest.mark.parametrize("shape", [(0, 5, 4, 3), (2, 5, 4, 0), (2, 0, 4, 3)])
def test_empty_tensors(host: CudaHost, shape: tuple[int, int, int, int]) -> None:
    check_against_reference(make_case(*shape, initial=True))


def test_boundaries_beyond_the_row_lead_nowhere(host: CudaHost) -> None:
    # Their values lie on the device, and the host does not look at them.
    case = make_case(heads=1, groups=1, dim=4, state=4, lengths=[10, 10], initial=True)
    case = case.map(lambda _, t: guarded(t))
    for bounds in ([-7, 10, 10**9], [30, 5, 2]):
        wrong = replace(case, cu_seqlens=torch.tensor(bounds, dtype=torch.int64))
        with torch.no_grad():
            assert call(ssd, wrong)[0].shape == (1, 20, 1, 4)


def test_a_row_without_sequences_is_refused(host: CudaHost) -> None:
    case = make_case(lengths=[5])
    with pytest.raises(ValueError, match="has one entry, which is no sequence"), torch.no_grad():
        call(ssd, replace(case, cu_seqlens=case.cu_seqlens[:1]))


@pytest.mark.slow
def test_random_cases(host: CudaHost) -> None:
    chosen = random.Random(2)
    for seed in range(60):
        host.set_seed(seed)
        lengths = [chosen.randrange(0, 140) for _ in range(chosen.randrange(1, 5))]
        heads = chosen.choice([1, 2, 6])
        batch, length = chosen.randrange(1, 3), chosen.choice([1, 17, 64, 129, 400])
        ids = torch.randint(-1, 3, (batch, length // 9 + 1)).repeat_interleave(9, 1)[:, :length].int()
        packed = chosen.random() < 0.3
        case = make_case(
            batch,
            length,
            heads,
            chosen.choice([1, 4, 17, 40, 64, 80]),
            chosen.choice([1, 3, 16, 40, 128, 200]),
            chosen.choice([g for g in (1, 2, 3) if heads % g == 0]),
            skip=chosen.choice([None, "head", "channel"]),
            gate=chosen.random() < 0.5,
            bias=chosen.random() < 0.5,
            softplus=chosen.random() < 0.7,
            limit=chosen.choice([(0.0, float("inf")), (0.1, 0.8)]),
            initial=chosen.random() < 0.5,
            lengths=lengths if packed else None,
            ids=ids if not packed and chosen.random() < 0.5 else None,
            reverse=chosen.random() < 0.5,
            seed=seed,
        )
        dtype = chosen.choice(DTYPES)
        # float32 with more states has gradients of other kernels.
        check_against_reference(case.to(torch.bfloat16 if case.B.shape[3] > 128 else dtype))
