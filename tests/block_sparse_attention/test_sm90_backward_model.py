"""The sm_90a backward kernels without a GPU: order of events and arithmetic on a model of the hardware.

Two kernels of seven products, and the fused one of five, whose blocks wait for each other.
"""

from __future__ import annotations

import ctypes
import math
import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from arcore.masks import IntervalMask, causal, full, next_scale, skip_causal
from tests.block_sparse_attention.cases import random_mask
from tests.block_sparse_attention.sm90 import build_model, plan_of, pointer

MISTAKES = {
    "tile_producer_skips_empty": 1,
    "numbers_producer_skips_empty": 2,
    "producer_skips_empty_own": 3,
    "consumer_skips_full": 4,
    "consumer_forgets_release": 5,
    "consumer_releases_early": 6,
}
UNMASKED_TILE, NO_REPAIR = 7, 8
FUSED_MISTAKES = {
    "adder_skips_its_turn": 9,
    "adder_passes_the_turn_early": 10,
    "consumer_skips_full_changes": 11,
    "consumer_skips_empty_sums": 12,
    "adder_frees_sums_early": 13,
}
# Not of one block: which units the blocks take.
FIRST_BY_BLOCK, FALLING_TICKETS = 14, 15

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ was not found")


class Given(ctypes.Structure):
    """That of sm90_backward_model.h."""

    _fields_ = [
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("scale", ctypes.c_float),
        ("half", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("bounds", "key_bounds", "by_query", "by_key")),
        *((name, ctypes.POINTER(ctypes.c_int64)) for name in ("plan_shapes", "strides")),
        ("tensors", ctypes.POINTER(ctypes.c_void_p)),
        *((name, ctypes.c_void_p) for name in ("lse", "delta")),
        *((name, ctypes.c_int64) for name in ("section", "blocks", "resident")),
        ("seed", ctypes.c_uint64),
        ("mistake", ctypes.c_int),
    ]


@pytest.fixture(scope="module")
def two() -> Callable[..., None]:
    return build_model("sm90_backward_model.cpp").arcore_model_backward_sm90


@pytest.fixture(scope="module")
def fused() -> Callable[..., None]:
    return build_model("sm90_fused_model.cpp").arcore_model_fused_sm90


@pytest.fixture(scope="module", params=["two", "fused"])
def model(request: pytest.FixtureRequest) -> Callable[..., None]:
    return request.getfixturevalue(request.param)


class Case:
    def __init__(
        self,
        mask: IntervalMask,
        *,
        batch: int = 1,
        heads: int = 1,
        kv_heads: int = 1,
        dim: int = 64,
        dtype: torch.dtype = torch.bfloat16,
        scale: float | None = None,
        spread: float = 1.0,
    ) -> None:
        self.dtype, self.scale = dtype, dim**-0.5 if scale is None else scale
        self.nq, self.nk = mask.nq, mask.nk
        generator = torch.Generator().manual_seed(self.nq + 7 * self.nk + dim)

        def draw(h: int, n: int, by: float = 1.0) -> Tensor:
            return torch.randn(batch, h, n, dim, generator=generator).mul(by).to(dtype).float()

        self.q, self.k = draw(heads, self.nq, spread), draw(kv_heads, self.nk, spread)
        self.v, self.grad_out = draw(kv_heads, self.nk), draw(heads, self.nq)
        self.bounds = mask.bounds.contiguous()
        self.key_bounds = None if mask.key_bounds is None else mask.key_bounds.contiguous()
        self.allowed = mask.to_bool()
        self.group = heads // kv_heads
        self.prepare()

    def prepare(self) -> None:
        """What the forward leaves behind, in float64, and the gradients with bounds of their rounding errors."""
        k, v = (t.double().repeat_interleave(self.group, 1) for t in (self.k, self.v))
        q, grad_out = self.q.double(), self.grad_out.double()
        scores = (q @ k.transpose(-1, -2) * self.scale).masked_fill(~self.allowed, -math.inf)
        lse = scores.logsumexp(-1)
        p = torch.where(self.allowed, (scores - lse[..., None]).exp(), 0.0)
        delta = (grad_out * (p @ v)).sum(-1)
        ds = torch.where(p > 0, p * (grad_out @ v.transpose(-1, -2) - delta[..., None]), 0.0)
        self.lse, self.delta = lse.float().contiguous(), delta.float().contiguous()

        def by_head(t: Tensor) -> Tensor:
            return t.unflatten(1, (-1, self.group)).sum(2)

        def products(p: Tensor, ds: Tensor, q: Tensor, k: Tensor, grad_out: Tensor) -> tuple[Tensor, ...]:
            grad_k = by_head(ds.transpose(-1, -2) @ q) * self.scale
            return ds @ k * self.scale, grad_k, by_head(p.transpose(-1, -2) @ grad_out)

        self.want = products(p, ds, q, k, grad_out)
        # Each weight and each result is rounded once; dP and delta cancel in float32.
        epsilon = torch.finfo(self.dtype).eps
        sizes = products(p, ds.abs(), q.abs(), k.abs(), grad_out.abs())
        slack = products(p, p * delta.abs().add(1.0)[..., None], q.abs(), k.abs(), grad_out.abs())
        self.bound = [epsilon * s.abs() + 1e-5 * x.abs() + 1e-7 for s, x in zip(sizes, slack, strict=True)]

    def run(
        self,
        model: Callable[..., None],
        *,
        blocks: int = 2,
        resident: int | None = None,
        seed: int = 0,
        mistake: int = 0,
    ) -> tuple[Tensor, ...]:
        """grad_q, grad_k and grad_v of the model, or a RuntimeError with what went wrong."""
        batch, heads, _, dim = self.q.shape
        key_batch = 1 if self.key_bounds is None else self.key_bounds.shape[0]
        shape = [batch, heads, self.k.shape[1], self.nq, self.nk, dim, self.bounds.shape[3] // 2]
        shape += [self.bounds.shape[0], self.bounds.shape[1], key_batch]
        by_query = plan_of(self.allowed, 128, 64)
        by_key = plan_of(self.allowed.transpose(-1, -2), 128, 64, visits=True)
        grads = tuple(torch.full_like(t, math.nan) for t in (self.q, self.k, self.v))
        tensors = (self.grad_out, self.q, self.k, self.v, *grads)
        given = Given(
            (ctypes.c_int64 * 10)(*shape),
            self.scale,
            int(self.dtype == torch.float16),
            *(pointer(t).value for t in (self.bounds, self.key_bounds, by_query, by_key)),
            (ctypes.c_int64 * 8)(*by_query.shape, *by_key.shape),
            (ctypes.c_int64 * 21)(*(n for t in tensors for n in t.stride()[:3])),
            (ctypes.c_void_p * 7)(*(t.data_ptr() for t in tensors)),
            *(pointer(t).value for t in (self.lse, self.delta)),
            section=2,
            blocks=blocks,
            resident=blocks if resident is None else resident,
            seed=seed,
            mistake=mistake,
        )
        message = ctypes.create_string_buffer(256)
        model(ctypes.byref(given), message, ctypes.c_int64(len(message)))
        if message.value:
            raise RuntimeError(message.value.decode())
        return grads

    def check(self, grads: tuple[Tensor, ...]) -> None:
        for name, ours, want, bound in zip(("q", "k", "v"), grads, self.want, self.bound, strict=True):
            excess = ((ours - want).abs() - bound).max()
            assert excess <= 0, f"grad_{name} is off by {excess} more than its rounding"


CASES = {
    "next_scale": lambda: Case(next_scale((1, 2, 3, 4, 5, 6, 8, 10))),
    "skip_causal_two_heads": lambda: Case(skip_causal(2, 64), heads=2, kv_heads=2, dtype=torch.float16),
    "causal_grouped_heads": lambda: Case(causal(200), heads=4, kv_heads=2, batch=2),
    "many_tiles": lambda: Case(full(70, 700)),
    "many_query_tiles": lambda: Case(full(700, 70)),
    # All rings wrap: more tiles than buffers, three units a block and more.
    "many_tiles_dim_72": lambda: Case(full(420, 600), dim=72, heads=2),
    "many_tiles_dim_128": lambda: Case(full(420, 600), dim=128, heads=2, kv_heads=2),
    "one_query_one_key": lambda: Case(full(1, 1)),
    "ragged": lambda: Case(full(129, 127), dim=128),
    "dim_72": lambda: Case(causal(140), dim=72, dtype=torch.float16),
    "random_two_ranges": lambda: Case(
        random_mask(200, 230, seed=1, batch=2, heads=2), batch=2, heads=2, kv_heads=1
    ),
    "key_bounds": lambda: Case(random_mask(190, 170, seed=2, key_bounds=True)),
    "large_logits": lambda: Case(causal(150), scale=1.0, spread=3.5),
    "negative_scale": lambda: Case(causal(100), scale=-0.2),
}


@pytest.mark.parametrize("name", CASES)
def test_matches_dense_gradients(model: Callable[..., None], name: str) -> None:
    case = CASES[name]()
    case.check(case.run(model))


def test_order_of_events_does_not_change_a_bit(model: Callable[..., None]) -> None:
    case = Case(skip_causal(3, 50), heads=2)
    first = case.run(model, blocks=1)
    for seed in range(1, 8):
        again = case.run(model, blocks=1 + seed % 5, seed=seed)
        assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_a_row_does_not_see_never_leaks(model: Callable[..., None], value: float) -> None:
    case = Case(causal(200), heads=2)
    clean = case.run(model)
    # Queries from 150 on and keys from 150 on: the others' gradients may not change, except for what the later
    # queries contribute to the earlier keys, so those queries see nothing before 150.
    case.bounds = case.bounds.clone()
    case.bounds[0, 0, 150:, 0] = 150
    case.allowed = case.allowed.clone()
    case.allowed[..., 150:, :150] = False
    case.prepare()
    want = [w[..., :150, :] for w in case.want]
    for t in (case.q, case.k, case.v, case.grad_out):
        t[..., 150:, 3:] = value
    case.lse[..., 150:] = math.nan
    case.delta[..., 150:] = math.nan
    grads = case.run(model)
    for ours, expected, bound in zip(grads, want, case.bound, strict=True):
        assert ((ours[..., :150, :] - expected).abs() <= bound[..., :150, :]).all()
        assert not ours[..., 150:, 3:].isfinite().any()
    assert torch.equal(grads[0][..., :128, :], clean[0][..., :128, :])


def test_without_repair_it_would_leak(model: Callable[..., None]) -> None:
    case = Case(causal(200))
    case.k[..., 150:, :] = math.nan
    assert case.run(model, mistake=NO_REPAIR)[0][..., 128:150, :].isnan().any()


def test_rows_without_keys_have_no_gradient(model: Callable[..., None]) -> None:
    bounds = torch.zeros(1, 1, 150, 2, dtype=torch.int32)
    bounds[0, 0, :3] = torch.tensor([5, 9])
    case = Case(IntervalMask(bounds, 200))
    case.grad_out[..., 3:, :] = math.nan
    case.delta[..., 3:] = math.nan
    grad_q, grad_k, grad_v = case.run(model)
    assert not grad_q[..., 3:, :].any()
    assert not grad_k[..., 9:, :].any() and not grad_v[..., 9:, :].any()
    assert grad_k.isfinite().all() and grad_v[..., 5:9, :].ne(0).any()


def test_both_ways_agree(two: Callable[..., None], fused: Callable[..., None]) -> None:
    """The same products, summed in other orders; over one query tile of each head the same order for dK and dV."""
    case = Case(next_scale((1, 2, 3, 4, 5, 6, 8)), heads=2, kv_heads=1)
    for ours, theirs in zip(case.run(fused, blocks=3), case.run(two), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
    case = Case(full(64, 300), heads=4, kv_heads=2)
    assert all(map(torch.equal, case.run(fused, blocks=3)[1:], case.run(two)[1:]))


@pytest.mark.parametrize("dim", [64, 96, 128])
def test_blocks_that_run_at_different_times_end_and_agree(fused: Callable[..., None], dim: int) -> None:
    """Every block waits for sums of others, and some start when others have ended: no deadlock, the same bits."""
    case = Case(causal(400), dim=dim, heads=2)
    first = case.run(fused, blocks=1)
    for seed in range(2):
        for blocks, resident in ((3, 1), (4, 2), (8, 8)):
            again = case.run(fused, blocks=blocks, resident=resident, seed=seed)
            assert all(map(torch.equal, first, again))


def test_visits_follow_the_order_of_units(fused: Callable[..., None]) -> None:
    """Per head another mask, and all of them share the order of key tiles of the first."""
    case = Case(random_mask(260, 520, seed=3, batch=2, heads=4), batch=2, heads=4, kv_heads=2)
    first = case.run(fused, blocks=1)
    case.check(first)
    assert all(map(torch.equal, first, case.run(fused, blocks=5, resident=3, seed=1)))


@pytest.mark.parametrize(("mistake", "blocks"), [(FIRST_BY_BLOCK, 3), (FALLING_TICKETS, 1)])
def test_other_hand_outs_of_units_would_hang(fused: Callable[..., None], mistake: int, blocks: int) -> None:
    """Units numbered by block, some of which start late, or from the last on."""
    case = Case(causal(400))
    said = set()
    for seed in range(6):
        try:
            case.run(fused, blocks=blocks, resident=1, seed=seed, mistake=mistake)
        except RuntimeError as error:
            said.add(str(error))
    assert said == {"deadlock"}


@pytest.mark.parametrize("name", FUSED_MISTAKES)
def test_the_model_finds_planted_mistakes_in_sums(fused: Callable[..., None], name: str) -> None:
    found = 0
    for case in (Case(full(200, 500)), Case(full(300, 260), dim=128)):
        for seed in range(5):
            try:
                case.check(case.run(fused, blocks=3, seed=seed, mistake=FUSED_MISTAKES[name]))
            except (RuntimeError, AssertionError):
                found += 1
    assert found > 0


@pytest.mark.parametrize("name", MISTAKES)
def test_the_model_finds_planted_mistakes(model: Callable[..., None], name: str) -> None:
    # Long units wrap the rings of tiles, many short ones those of units.
    found = 0
    for mask in (full(700, 700), full(1500, 60), full(60, 1500)):
        case = Case(mask)
        for seed in range(4):
            try:
                case.check(case.run(model, blocks=1, seed=seed, mistake=MISTAKES[name]))
            except (RuntimeError, AssertionError):
                found += 1
    assert found > 0


def test_a_missing_mask_shows(model: Callable[..., None]) -> None:
    case = Case(causal(100))
    with pytest.raises(AssertionError):
        case.check(case.run(model, mistake=UNMASKED_TILE))
