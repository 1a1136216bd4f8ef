"""The sm_80 kernels, run on the CPU by tests/cuda_host, through the public function against the reference."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from arcore import masks
from arcore.masks import IntervalMask
from arcore.ops import block_sparse_attention, reference_block_sparse_attention
from arcore.ops.block_sparse_attention import CUDA_TILES
from tests.block_sparse_attention.sm90 import plan_of
from tests.cuda_host.build import CudaHost, guarded, installed, unavailable

reason = unavailable()
pytestmark = [pytest.mark.thinned, pytest.mark.skipif(reason is not None, reason=reason or "")]


@pytest.fixture
def host() -> Iterator[CudaHost]:
    with installed("block_sparse_attention") as kernels:
        yield kernels


def tensors(shape: tuple[int, int, int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, kv_heads, nq, nk, dim = shape
    q = torch.randn(batch, heads, nq, dim).to(dtype)
    k = torch.randn(batch, kv_heads, nk, dim).to(dtype)
    return q, k, torch.randn(batch, kv_heads, nk, dim).to(dtype)


def assert_close(found: Tensor, eager: Tensor, wanted: Tensor, name: str, factor: float = 2.0) -> None:
    """`found` errs at most `factor` times as much as eager PyTorch in the same precision."""
    assert found.shape == wanted.shape
    floor = {torch.float32: 2e-6, torch.bfloat16: 2e-3, torch.float16: 3e-4}[found.dtype]
    scale = wanted.abs().nan_to_num(0, 0, 0).max().item() if wanted.numel() else 1.0
    error = (found.double() - wanted).abs().nan_to_num(0, 0, 0)
    allowed = factor * (eager.double() - wanted).abs().nan_to_num(0, 0, 0).max() if wanted.numel() else 0.0
    assert torch.equal(found.isnan(), wanted.isnan()), name
    assert (error <= allowed + floor * max(scale, 1.0)).all(), f"{name}: {error.max()} against {allowed}"


def check_forward(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, scale: float | None = None) -> None:
    out, lse = block_sparse_attention(q, k, v, mask, scale=scale, return_lse=True)
    eager = reference_block_sparse_attention(q, k, v, mask, scale=scale)
    wanted, wanted_lse = reference_block_sparse_attention(
        q.double(), k.double(), v.double(), mask, scale=scale, return_lse=True
    )
    assert out.dtype == q.dtype
    assert_close(out, eager, wanted, "out")
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-5, atol=1e-5)


def gradients(
    function: Callable[..., tuple[Tensor, Tensor]],
    inputs: tuple[Tensor, Tensor, Tensor],
    grads: tuple[Tensor, Tensor],
    mask: IntervalMask,
    scale: float | None,
) -> tuple[Tensor, ...]:
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs]
    out, lse = function(*leaves, mask, scale=scale, return_lse=True)
    seen = lse > -math.inf
    total = (out * grads[0].to(out.dtype)).sum() + (lse.where(seen, 0.0) * grads[1].to(lse.dtype)).sum()
    return torch.autograd.grad(total, leaves)


def check_backward(
    q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, scale: float | None = None, *, with_lse: bool = True
) -> None:
    grads = torch.randn(q.shape).to(q.dtype), torch.randn(q.shape[:3]) * with_lse
    found = gradients(block_sparse_attention, (q, k, v), grads, mask, scale)
    eager = gradients(reference_block_sparse_attention, (q, k, v), grads, mask, scale)
    wanted = gradients(
        reference_block_sparse_attention, (q.double(), k.double(), v.double()), grads, mask, scale
    )
    for name, f, e, w in zip("qkv", found, eager, wanted, strict=True):
        assert_close(f, e, w, f"grad_{name}")


MASKS = {
    "causal": lambda: masks.causal(130),
    "next_scale": lambda: masks.next_scale((1, 2, 3, 4, 5, 6)),
    "markov": lambda: masks.next_scale_markov((1, 2, 3, 5, 8)),
    "skip_causal": lambda: masks.skip_causal(3, 32),
    "window": lambda: masks.sliding_window(150, 20, sinks=3),
    "documents": lambda: masks.documents([1, 63, 65, 15]),
}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_backward(host: CudaHost, name: str, dtype: torch.dtype) -> None:
    mask = MASKS[name]()
    q, k, v = tensors((1, 2, 1, mask.nq, mask.nk, 64), dtype)
    check_forward(q, k, v, mask)
    check_backward(q, k, v, mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [8, 40, 72, 80, 96, 128])
def test_head_dims(host: CudaHost, dim: int, dtype: torch.dtype) -> None:
    inputs = tensors((1, 1, 1, 70, 70, dim), dtype)
    check_forward(*inputs, masks.causal(70))
    assert host.statistics()["bank_conflicts"] == 0
    check_backward(*inputs, masks.causal(70))
    assert host.statistics()["bank_conflicts"] == 0


@pytest.mark.parametrize("nq", [1, 15, 17, 63, 65, 127, 129])
def test_odd_lengths(host: CudaHost, nq: int) -> None:
    inputs = tensors((2, 2, 2, nq, nq + 3, 64), torch.bfloat16)
    check_forward(*inputs, masks.causal(nq, offset=3))
    check_backward(*inputs, masks.causal(nq, offset=3), with_lse=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_past_the_inputs_is_touched(host: CudaHost, dtype: torch.dtype) -> None:
    """The last element of each tensor lies before a page that may not be touched."""
    mask = masks.causal(37)
    q, k, v, grad_out = (guarded(torch.randn(1, 1, 37, 72).to(dtype)) for _ in range(4))
    bounds = guarded(mask.bounds)
    out, lse = torch.ops.arcore.block_sparse_attention(q, k, v, bounds, None, 0.125)
    out, lse, grad_lse = guarded(out), guarded(lse), guarded(torch.zeros_like(lse))
    grads = torch.ops.arcore.block_sparse_attention_backward(
        grad_out, grad_lse, q, k, v, out, lse, bounds, None, 0.125
    )
    assert all(x.isfinite().all() for x in grads)


@pytest.mark.parametrize(
    "shape", [(0, 2, 2, 5, 5, 64), (1, 0, 0, 5, 5, 64), (1, 2, 2, 0, 5, 64), (1, 2, 2, 5, 0, 64)]
)
def test_empty(host: CudaHost, shape: tuple[int, int, int, int, int, int]) -> None:
    q, k, v = (x.requires_grad_() for x in tensors(shape, torch.bfloat16))
    out = block_sparse_attention(q, k, v, masks.full(shape[3], shape[4]))
    assert (out == 0).all()
    out.sum().backward()
    assert all((x.grad == 0).all() for x in (q, k, v) if x.grad is not None)


def test_split_keys_of_a_cached_step(host: CudaHost) -> None:
    """One query tile and many keys: the keys are split, and the parts combined."""
    mask = masks.full(9, 700)
    check_forward(*tensors((1, 1, 1, 9, 700, 64), torch.bfloat16), mask)
    assert host.statistics()["blocks"] == 3  # the last launch combines, four rows per block


@pytest.mark.parametrize(("nq", "nk"), [(9, 700), (130, 1100), (150, 150)])
def test_what_else_is_in_the_batch_changes_no_bit(host: CudaHost, nq: int, nk: int) -> None:
    q, k, v = tensors((5, 4, 2, nq, nk, 64), torch.bfloat16)
    mask = masks.full(nq, nk)
    together = block_sparse_attention(q, k, v, mask, return_lse=True)
    alone = block_sparse_attention(q[3:4, :2], k[3:4, :1], v[3:4, :1], mask, return_lse=True)
    assert torch.equal(together[0][3:4, :2], alone[0])
    assert torch.equal(together[1][3:4, :2], alone[1])


def test_rows_that_see_nothing(host: CudaHost) -> None:
    allowed = torch.zeros(5, 70, dtype=torch.bool)
    allowed[1, 3:9] = allowed[3] = True
    mask = masks.from_bool(allowed)
    q, k, v = tensors((1, 1, 1, 5, 70, 64), torch.bfloat16)
    out, lse = block_sparse_attention(q, k, v, mask, return_lse=True)
    assert (out[0, 0, [0, 2, 4]] == 0).all()
    assert (lse[0, 0, [0, 2, 4]] == -math.inf).all()
    check_forward(q, k, v, mask)
    check_backward(q, k, v, mask)
    q, k, v = tensors((1, 1, 1, 300, 700, 64), torch.bfloat16)
    nothing = masks.from_bool(torch.zeros(300, 700, dtype=torch.bool))
    out, lse = block_sparse_attention(q, k, v, nothing, return_lse=True)
    assert (out == 0).all()
    assert (lse == -math.inf).all()


@pytest.mark.parametrize("scale", [-0.3, 0.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_scales(host: CudaHost, scale: float, dtype: torch.dtype) -> None:
    inputs = tensors((1, 1, 1, 70, 70, 64), dtype)
    check_forward(*inputs, masks.causal(70), scale)
    check_backward(*inputs, masks.causal(70), scale)


def test_strides_and_alignment(host: CudaHost) -> None:
    """[B, N, H, D] views, and rows that do not start on 16 bytes."""
    mask = masks.causal(70)
    q, k, v = (torch.randn(2, 70, 2, 64).bfloat16().transpose(1, 2) for _ in range(3))
    check_forward(q, k, v, mask)
    check_backward(q, k, v, mask)
    for dtype in DTYPES:
        q, k, v = (torch.randn(2, 2, 70, 67).to(dtype)[..., 1:65] for _ in range(3))
        check_forward(q, k, v, mask)
        check_backward(q, k, v, mask)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["k", "v"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_a_row_may_not_see_does_not_reach_it(
    host: CudaHost, dtype: torch.dtype, bad: float, where: str
) -> None:
    mask = masks.causal(130)
    q, k, v = tensors((1, 1, 1, 130, 130, 64), dtype)
    clean = block_sparse_attention(q, k, v, mask)
    (k if where == "k" else v)[0, 0, 77, 5] = bad
    out = block_sparse_attention(q, k, v, mask)
    assert torch.equal(out[:, :, :77], clean[:, :, :77])
    if where == "v":
        assert torch.equal(out[0, 0, 77:, 5].isnan(), torch.full((53,), math.isnan(bad)))
        if not math.isnan(bad):
            assert (out[0, 0, 77:, 5] == bad).all()
        others = [d for d in range(64) if d != 5]
        assert torch.equal(out[..., others], clean[..., others])
    elif math.isnan(bad):
        assert out[0, 0, 77:].isnan().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["q", "k", "v", "grad_out"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gradients_of_what_is_not_seen_stay_clean(
    host: CudaHost, dtype: torch.dtype, bad: float, where: str
) -> None:
    """Two documents: what is not finite in one leaves the other's gradients as they are, bit for bit."""
    mask = masks.documents([70, 50])
    inputs = tensors((1, 2, 1, 120, 120, 64), dtype)
    grad_out, grad_lse = torch.randn(1, 2, 120, 64).to(dtype), torch.zeros(1, 2, 120)
    clean = gradients(block_sparse_attention, inputs, (grad_out, grad_lse), mask, None)
    target = grad_out if where == "grad_out" else inputs["qkv".index(where)]
    target[0, 0, 90, 3] = bad
    found = gradients(block_sparse_attention, inputs, (grad_out, grad_lse), mask, None)
    for f, c in zip(found, clean, strict=True):
        assert torch.equal(f[:, :, :70], c[:, :, :70])
        # Causal: queries before the bad row and keys behind it stay clean too, also in its document.
        rows = slice(70, 90) if f is found[0] else slice(91, 120)
        if where in ("q", "grad_out") or f is found[0]:
            assert torch.equal(f[:, :, rows], c[:, :, rows])
    assert not all(f.isfinite().all() for f in found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_results_do_not_depend_on_the_order_of_warps_and_blocks(host: CudaHost, dtype: torch.dtype) -> None:
    mask = masks.skip_causal(3, 32)
    inputs = tensors((1, 2, 2, mask.nq, mask.nk, 64), dtype)
    grads = torch.randn(1, 2, mask.nq, 64).to(dtype), torch.randn(1, 2, mask.nq)

    def once(seed: int) -> list[Tensor]:
        host.set_seed(seed)
        outputs = block_sparse_attention(*inputs, mask, return_lse=True)
        return [*outputs, *gradients(block_sparse_attention, inputs, grads, mask, None)]

    first = once(0)
    for seed in range(1, 6):
        assert all(torch.equal(a, b) for a, b in zip(first, once(seed), strict=True))


def test_wild_bounds_are_cut_to_the_keys(host: CudaHost) -> None:
    q, k, v = tensors((1, 1, 1, 9, 70, 64), torch.bfloat16)
    wild = torch.tensor([-5, 1 << 30], dtype=torch.int32).expand(1, 1, 9, 2).contiguous()
    out, lse = torch.ops.arcore.block_sparse_attention(q, k, v, wild, None, 0.25)
    wanted = block_sparse_attention(q, k, v, masks.full(9, 70), scale=0.25, return_lse=True)
    assert torch.equal(out, wanted[0])
    assert torch.equal(lse, wanted[1])


def test_a_plan_may_be_given(host: CudaHost) -> None:
    mask = masks.causal(130)
    q, k, v = tensors((2, 2, 1, 130, 130, 64), torch.bfloat16)
    plans = [
        torch.ops.arcore.interval_tile_plan(mask.bounds, mask.key_bounds, mask.nk, *tiles)
        for tiles in CUDA_TILES
    ]
    args = (q, k, v, mask.bounds, mask.key_bounds, 0.125)
    op, backward = torch.ops.arcore.block_sparse_attention, torch.ops.arcore.block_sparse_attention_backward
    out, lse = op(*args, *plans)
    assert torch.equal(out, op(*args)[0])
    grads = [torch.randn_like(q), None, q, k, v, out, lse, mask.bounds, None, 0.125]
    for a, b in zip(backward(*grads, *plans), backward(*grads), strict=True):
        assert torch.equal(a, b)
    with_visits = torch.ops.arcore.interval_tile_plan(
        mask.bounds, mask.key_bounds, mask.nk, *CUDA_TILES[1], visits=True
    )
    for a, b in zip(backward(*grads, plans[0], with_visits), backward(*grads), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="expected halves or visits, not both"):
        torch.ops.arcore.interval_tile_plan(mask.bounds, None, mask.nk, 16, 16, True, True, True)
    with pytest.raises(RuntimeError, match=r"expected the tile plan int32 of shape \[1 or 2, 1 or 2, 2, 5\]"):
        op(*args, plans[0][..., :4].contiguous(), plans[1])
    with pytest.raises(RuntimeError, match="expected head_dim <= 128 on CUDA"):
        block_sparse_attention(*tensors((1, 1, 1, 5, 5, 136), torch.bfloat16), masks.causal(5))


def plan_by_rule(mask: IntervalMask, tile_q: int, tile_k: int, by_key: bool) -> list[list[list[int]]]:
    """Per grid and row of the plan: (column << 1) | full."""
    grids = []
    for allowed in mask.to_bool().flatten(0, 1):
        rows = []
        tile_rows = allowed.split(tile_k, 1) if by_key else allowed.split(tile_q, 0)
        for strip in tile_rows:
            tiles = strip.split(tile_q, 0) if by_key else strip.split(tile_k, 1)
            rows.append([c << 1 | int(bool(t.all())) for c, t in enumerate(tiles) if t.any()])
        grids.append(rows)
    return grids


@pytest.mark.parametrize("by_key", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_plan(host: CudaHost, name: str, by_key: bool) -> None:
    mask = MASKS[name]()
    plan = torch.ops.arcore.interval_tile_plan(mask.bounds, mask.key_bounds, mask.nk, 16, 8, by_key)
    check_plan(plan, plan_by_rule(mask, 16, 8, by_key))


@pytest.mark.parametrize("by_key", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_plan_with_halves(host: CudaHost, name: str, by_key: bool) -> None:
    mask = MASKS[name]()
    plan = torch.ops.arcore.interval_tile_plan(mask.bounds, mask.key_bounds, mask.nk, 16, 16, by_key, True)
    allowed = mask.to_bool().flatten(0, 1)
    for grid, rows in zip(allowed, plan.flatten(0, 1).tolist(), strict=True):
        for r, strip in enumerate((grid.T if by_key else grid).split(16, 0)):
            wanted = []
            for c, tile in enumerate(strip.split(16, 1)):
                seen = [int(tile[:8].any()), int(tile[8:].any())]
                if any(seen):
                    wanted.append(c << 3 | seen[1] << 2 | seen[0] << 1 | int(tile.all()))
            assert rows[r][2 : 2 + rows[r][0]] == wanted


@pytest.mark.parametrize("by_key", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_plan_with_visits(host: CudaHost, name: str, by_key: bool) -> None:
    mask = MASKS[name]()
    check_visits(mask, by_key)


def check_visits(mask: IntervalMask, by_key: bool) -> None:
    plan = torch.ops.arcore.interval_tile_plan(
        mask.bounds, mask.key_bounds, mask.nk, 16, 8, by_key, visits=True
    )
    check_plan(plan, plan_by_rule(mask, 16, 8, by_key))
    allowed = mask.to_bool().transpose(-1, -2) if by_key else mask.to_bool()
    wanted = plan_of(allowed, *((8, 16) if by_key else (16, 8)), visits=True)
    assert plan.shape == wanted.shape
    columns = (plan.shape[3] - 2) // 2
    for rows, wanted_rows in zip(plan.flatten(0, 1).tolist(), wanted.flatten(0, 1).tolist(), strict=True):
        for row, wanted_row in zip(rows, wanted_rows, strict=True):
            end = 2 + columns + row[0]
            assert row[2 + columns : end] == wanted_row[2 + columns : end]
            assert not any(row[2 + row[0] : 2 + columns]) and not any(row[end:])


def check_plan(plan: Tensor, wanted: list[list[list[int]]]) -> None:
    grids = plan.flatten(0, 1).tolist()
    assert len(grids) == len(wanted)
    for rows, wanted_rows in zip(grids, wanted, strict=True):
        assert [row[2 : 2 + row[0]] for row in rows] == wanted_rows
        counts = [len(row) for row in wanted_rows]
        order = sorted(range(len(counts)), key=lambda r: (-counts[r], r))
        assert [row[1] for row in rows] == order


def test_plan_with_key_bounds_batches_and_heads(host: CudaHost) -> None:
    generator = torch.Generator().manual_seed(1)
    low = torch.randint(0, 60, (2, 3, 50, 1), generator=generator)
    bounds = torch.cat([low, (low + torch.randint(0, 30, low.shape, generator=generator)).clamp(max=70)], -1)
    first = torch.randint(0, 50, (2, 70, 1), generator=generator)
    key_bounds = torch.cat([first, (first + 40).clamp(max=50)], -1)
    mask = IntervalMask(bounds.int(), 70, key_bounds=key_bounds.int())
    for by_key in (False, True):
        plan = torch.ops.arcore.interval_tile_plan(mask.bounds, mask.key_bounds, 70, 16, 8, by_key)
        check_plan(plan, plan_by_rule(mask, 16, 8, by_key))
        check_visits(mask, by_key)
    for dtype in DTYPES:
        q, k, v = tensors((2, 3, 3, 50, 70, 64), dtype)
        check_forward(q, k, v, mask)
        check_backward(q, k, v, mask)


def test_plans_of_the_sm90a_kernels_are_kept_with_the_mask(
    host: CudaHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = importlib.import_module("arcore.ops.block_sparse_attention")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    mask = masks.causal(300)
    assert len(attention._cuda_plans(mask)) == 2
    monkeypatch.setenv("ARCORE_SM90A", "1")
    two = attention._cuda_plans(mask)
    monkeypatch.setenv("ARCORE_SM90A_BACKWARD", "fused")
    fused = attention._cuda_plans(mask)
    assert [p.shape[3] for p in two] == [2 + 5, 2 + 5, 2 + 3]
    assert [p.shape[3] for p in fused] == [2 + 5, 2 + 2 * 5, 2 + 3]
    assert all(a is b for a, b in zip(attention._cuda_plans(mask), fused, strict=True))
    # Key tiles of 128 in the order 0, 1, 2, query tiles of 64: the last one is seen by all three.
    assert fused[1][0, 0, :, 7:].tolist()[2][0] == 2


def test_plans_built_while_a_graph_is_captured_stay_in_the_graph(
    host: CudaHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a capture records has not run: a mask must not keep it for plain calls."""
    attention = importlib.import_module("arcore.ops.block_sparse_attention")
    mask = masks.causal(130)
    monkeypatch.setattr(attention, "capturing", lambda: True)
    first, second = attention._cuda_plans(mask), attention._cuda_plans(mask)
    assert first[0] is not second[0]
    monkeypatch.setattr(attention, "capturing", lambda: False)
    kept = attention._cuda_plans(mask)
    assert torch.equal(kept[0], first[0])
    monkeypatch.setattr(attention, "capturing", lambda: True)
    assert attention._cuda_plans(mask)[0] is kept[0]
