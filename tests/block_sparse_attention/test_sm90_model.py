"""The sm_90a forward without a GPU: its order of events and its arithmetic on a model of the hardware."""

from __future__ import annotations

import ctypes
import math
import shutil

import pytest
import torch
from torch import Tensor

from arcore.masks import IntervalMask, causal, documents, full, next_scale, next_scale_markov, skip_causal
from tests.block_sparse_attention.cases import random_mask
from tests.block_sparse_attention.sm90 import build_model, plan_of, pointer

MISTAKES = {
    "producer_skips_empty_keys": 1,
    "producer_skips_empty_values": 2,
    "producer_skips_empty_queries": 3,
    "consumer_skips_full_keys": 4,
    "consumer_skips_full_values": 5,
    "consumer_forgets_release": 6,
    "consumer_releases_early": 7,
}
UNMASKED_TILE, NO_REPAIR = 8, 9

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ was not found")


@pytest.fixture(scope="module")
def model() -> ctypes.CDLL:
    return build_model("sm90_model.cpp")


def halves_of_long_rows() -> IntervalMask:
    """Each half of a query tile sees stretches of many key tiles that the other does not see."""
    bounds = torch.zeros(1, 1, 256, 4, dtype=torch.int32)
    bounds[0, 0, :64] = torch.tensor([0, 100, 900, 1000])
    bounds[0, 0, 64:128] = torch.tensor([80, 500, 500, 900])
    bounds[0, 0, 128:192] = torch.tensor([0, 0, 1000, 1100])
    bounds[0, 0, 192:] = torch.tensor([300, 700, 850, 860])
    return IntervalMask(bounds, 1100)


def reference(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Dense attention in float64, rows that see no key give 0 and -inf; what is masked out is never multiplied."""
    group = q.shape[1] // k.shape[1]
    k, v = k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    scores = (q.double() @ k.transpose(-1, -2) * scale).masked_fill(~allowed, -math.inf)
    lse = scores.logsumexp(-1)
    weights = torch.where(allowed, (scores - lse[..., None]).exp(), 0.0)
    poisoned = ~v.isfinite()
    out = weights.nan_to_num(0.0) @ v.masked_fill(poisoned, 0.0)
    seen = allowed.expand(weights.shape).double() @ poisoned.double() > 0
    return out.masked_fill(seen, math.nan), lse


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

        def draw(h: int, n: int) -> Tensor:
            return torch.randn(batch, h, n, dim, generator=generator).mul(spread).to(dtype).float()

        self.q, self.k, self.v = draw(heads, self.nq), draw(kv_heads, self.nk), draw(kv_heads, self.nk)
        self.bounds = mask.bounds.contiguous()
        self.key_bounds = None if mask.key_bounds is None else mask.key_bounds.contiguous()
        self.allowed = mask.to_bool()

    def run(
        self,
        model: ctypes.CDLL,
        *,
        blocks: int = 2,
        seed: int = 0,
        mistake: int = 0,
        section: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """out and lse of the model, or a RuntimeError with what went wrong."""
        batch, heads, _, dim = self.q.shape
        key_batch = 1 if self.key_bounds is None else self.key_bounds.shape[0]
        shape = [batch, heads, self.k.shape[1], self.nq, self.nk, dim, self.bounds.shape[3] // 2]
        shape += [self.bounds.shape[0], self.bounds.shape[1], key_batch]
        plan = plan_of(self.allowed, 128, 128, halves=True)
        out = torch.full_like(self.q, math.nan)
        lse = torch.full((batch, heads, self.nq), math.nan)
        message = ctypes.create_string_buffer(256)

        model.arcore_model_forward_sm90(
            (ctypes.c_int64 * 10)(*shape),
            ctypes.c_float(self.scale),
            int(self.dtype == torch.float16),
            *map(pointer, (self.bounds, self.key_bounds, plan)),
            (ctypes.c_int64 * 4)(*plan.shape),
            (ctypes.c_int64 * 12)(*(n for t in (self.q, self.k, self.v, out) for n in t.stride()[:3])),
            *map(pointer, (self.q, self.k, self.v, out, lse)),
            ctypes.c_int64(section or batch * heads),
            ctypes.c_int64(blocks),
            ctypes.c_uint64(seed),
            mistake,
            message,
            ctypes.c_int64(len(message)),
        )
        if message.value:
            raise RuntimeError(message.value.decode())
        return out, lse

    def check(self, out: Tensor, lse: Tensor) -> None:
        want, want_lse = reference(self.q, self.k, self.v, self.allowed, self.scale)
        assert torch.equal(out.isnan(), want.isnan())
        # Two roundings to the 16-bit type: of a weight and of the result.
        epsilon = torch.finfo(self.dtype).eps
        magnitude = want.nan_to_num(0.0).abs().amax() + self.v.nan_to_num(0.0, 0.0, 0.0).abs().amax()
        assert (out - want).nan_to_num(0.0).abs().amax() <= epsilon * magnitude
        torch.testing.assert_close(lse.double(), want_lse, rtol=2e-5, atol=2e-5)


CASES = {
    "next_scale": lambda: Case(next_scale((1, 2, 3, 4, 5, 6, 8, 10))),
    "markov_two_heads": lambda: Case(next_scale_markov((1, 3, 5, 8, 12)), heads=2, kv_heads=2),
    "skip_causal_full_tiles": lambda: Case(skip_causal(2, 128), heads=2, dtype=torch.float16),
    "causal_grouped_heads": lambda: Case(causal(300), heads=4, kv_heads=2, batch=2),
    # More key tiles than any ring has buffers, and three units a block and more: all rings wrap.
    "many_tiles": lambda: Case(full(70, 1100)),
    "many_tiles_dim_72": lambda: Case(full(300, 1180), dim=72, heads=2),
    "many_tiles_dim_128": lambda: Case(full(300, 1180), dim=128, heads=2, kv_heads=2),
    # Consumers pass over tiles that the other one needs: between, before and behind their own.
    "halves_apart": lambda: Case(documents([64] * 7, causal=False)),
    "halves_of_long_rows": lambda: Case(halves_of_long_rows(), dim=128, heads=2),
    "one_query_one_key": lambda: Case(full(1, 1)),
    "ragged": lambda: Case(full(129, 127), dim=128),
    "dim_72": lambda: Case(causal(140), dim=72, dtype=torch.float16),
    "dim_80": lambda: Case(causal(257), dim=80),
    "dim_128": lambda: Case(next_scale((1, 4, 8, 16)), dim=128),
    "random_two_ranges": lambda: Case(random_mask(200, 310, seed=1, batch=2, heads=2), batch=2, heads=2),
    "key_bounds": lambda: Case(random_mask(190, 270, seed=2, key_bounds=True)),
    "large_logits": lambda: Case(causal(200), scale=1.0, spread=3.5),
}


@pytest.mark.parametrize("name", CASES)
def test_matches_dense_attention(model: ctypes.CDLL, name: str) -> None:
    case = CASES[name]()
    case.check(*case.run(model))


def test_large_logits_are_large() -> None:
    case = CASES["large_logits"]()
    assert (case.q @ case.k.transpose(-1, -2)).abs().amax() > 200


def test_empty_rows_and_empty_tiles(model: ctypes.CDLL) -> None:
    bounds = torch.zeros(1, 1, 300, 2, dtype=torch.int32)
    bounds[0, 0, 5] = torch.tensor([0, 9])
    bounds[0, 0, 270:, 1] = 200
    case = Case(IntervalMask(bounds, 200))
    out, lse = case.run(model)
    case.check(out, lse)
    assert torch.equal(out[0, 0, 6:270], torch.zeros(264, 64))
    assert lse[0, 0, 6:270].eq(-math.inf).all()


def test_any_layout_with_aligned_strides(model: ctypes.CDLL) -> None:
    case = Case(causal(150), batch=2, heads=2, kv_heads=2)
    case.q = case.q.transpose(1, 2).contiguous().transpose(1, 2)
    packed = torch.cat([case.k, case.v], dim=-1)
    case.k, case.v = packed[..., :64], packed[..., 64:]
    case.check(*case.run(model))


def test_heads_and_batch_entries_that_share_memory(model: ctypes.CDLL) -> None:
    case = Case(causal(150), batch=2, heads=2, kv_heads=2)
    case.k, case.v = case.k[:1, :1].expand(2, 2, -1, -1), case.v[:1].expand(2, -1, -1, -1)
    case.check(*case.run(model))


@pytest.mark.parametrize("columns", [60, 68])
def test_strides_that_cannot_be_copied_are_told(model: ctypes.CDLL, columns: int) -> None:
    case = Case(causal(20))
    case.k = torch.randn(1, 1, 30, columns).as_strided((1, 1, 20, 64), (1, 1, columns, 1))
    with pytest.raises(RuntimeError, match="unsupported strides"):
        case.run(model)


def test_order_of_events_does_not_change_a_bit(model: ctypes.CDLL) -> None:
    case = Case(skip_causal(3, 100), heads=2)
    first = case.run(model, blocks=1)
    for seed in range(1, 12):
        blocks, section = 1 + seed % 5, 1 + seed % 2
        again = case.run(model, blocks=blocks, seed=seed, section=section)
        assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_masked_out_values_never_leak(model: ctypes.CDLL, value: float) -> None:
    case = Case(causal(200), heads=2, kv_heads=1)
    clean = case.run(model)
    case.k[0, 0, 150:] = value
    case.v[0, 0, 150:, 3:] = value
    out, lse = case.run(model)
    assert torch.equal(lse[..., :150], clean[1][..., :150])
    # Column 0 has met finite values only; the others of these rows come from the exact path.
    assert torch.equal(out[..., :150, 0], clean[0][..., :150, 0])
    torch.testing.assert_close(out[..., :150, :], clean[0][..., :150, :], rtol=2e-2, atol=2e-2)
    assert out[..., 150:, :].isnan().all()


def test_without_repair_they_would_leak(model: ctypes.CDLL) -> None:
    case = Case(causal(200))
    case.v[0, 0, 150:] = math.nan
    assert case.run(model, mistake=NO_REPAIR)[0][..., 128:150, :].isnan().any()


def test_bounds_may_overlap_and_leave_the_tensor(model: ctypes.CDLL) -> None:
    case = Case(full(140, 200))
    case.bounds = torch.tensor([90, 999, -50, 120], dtype=torch.int32).expand(1, 1, 140, 4).contiguous()
    case.check(*case.run(model))


@pytest.mark.parametrize("name", MISTAKES)
def test_the_model_finds_planted_mistakes(model: ctypes.CDLL, name: str) -> None:
    # Long units wrap the rings of tiles, many short ones those of units.
    found = 0
    for mask in (full(130, 1300), full(1500, 120)):
        case = Case(mask)
        for seed in range(10):
            try:
                case.check(*case.run(model, blocks=1, seed=seed, mistake=MISTAKES[name]))
            except (RuntimeError, AssertionError):
                found += 1
    assert found > 0


def test_a_missing_mask_shows(model: ctypes.CDLL) -> None:
    case = Case(causal(200))
    with pytest.raises(AssertionError):
        case.check(*case.run(model, mistake=UNMASKED_TILE))


def test_sections_of_heads(model: ctypes.CDLL) -> None:
    section = model.arcore_model_section_pairs
    section.restype = ctypes.c_int64
    section.argtypes = [ctypes.c_int64] * 3
    assert section(1 << 20, 1, 1000) == 24
    assert section(1 << 20, 4, 1000) == 96
    assert section(1 << 40, 4, 1000) == 4
    assert section(1 << 10, 1, 80) == 80
