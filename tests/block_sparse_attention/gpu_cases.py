"""What must hold of block_sparse_attention on a device: `check_*(device, small)`, see tests/device_checks.py."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from arcore import masks
from arcore.masks import IntervalMask
from arcore.ops import block_sparse_attention
from tests import device_checks as checks
from tests.block_sparse_attention.cases import (
    MASKS,
    Inputs,
    assert_as_good_as_eager,
    make_inputs,
    random_mask,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VAR_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


def _ours(device: str):
    return checks.on(device, block_sparse_attention)


def _moved(x: Inputs, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(checks.moved(t, device) for t in (x.q, x.k, x.v, x.grad_out, x.grad_lse))  # type: ignore[return-value]


def _everything(
    q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, grad_lse: Tensor, mask: IntervalMask
) -> list[Tensor]:
    """Output, lse and the three gradients; the lse's gradient is 0 where a row sees nothing."""
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    out, lse = block_sparse_attention(q, k, v, mask, return_lse=True)
    grad_lse = torch.where(lse.detach().isfinite(), grad_lse, 0.0)
    return [out, lse, *torch.autograd.grad([out, lse], (q, k, v), [grad_out, grad_lse])]


def check_masks(device: str, small: bool) -> None:
    names = ("next_scale", "skip_causal", "window_sinks") if small else tuple(MASKS)
    for name in names:
        mask = MASKS[name]()
        for dtype in DTYPES[:2] if small else DTYPES:
            x = make_inputs(mask, batch=1, heads=2, kv_heads=2, dtype=dtype)
            assert_as_good_as_eager(x, mask, function=_ours(device))


def check_random_bounds(device: str, small: bool) -> None:
    """Ranges without order, rows without keys, a mask per batch entry and per head, ranges per key."""
    for seed in range(2 if small else 8):
        nq, nk = (33, 70) if small else (97 + 60 * seed, 301)
        mask = random_mask(nq, nk, seed=seed, batch=2, heads=4, key_bounds=seed % 2 == 0)
        for dtype in (torch.float32, torch.bfloat16):
            assert_as_good_as_eager(make_inputs(mask, dtype=dtype), mask, function=_ours(device))


def check_head_dims(device: str, small: bool) -> None:
    mask = random_mask(40, 90, seed=1, key_bounds=True)
    dims = (8, 72, 128) if small else (8, 16, 40, 64, 72, 80, 96, 112, 128)
    for dim in dims:
        for dtype in (torch.bfloat16,) if small else DTYPES:
            x = make_inputs(mask, batch=1, dim=dim, dtype=dtype)
            assert_as_good_as_eager(x, mask, function=_ours(device))


def check_odd_lengths(device: str, small: bool) -> None:
    lengths = (1, 65) if small else (1, 2, 15, 17, 31, 63, 64, 65, 127, 128, 129, 200, 257)
    for n in lengths:
        for nq, nk in ((n, n), (1, n), (n, 1)):
            mask = random_mask(nq, nk, seed=n)
            for dtype in (torch.bfloat16, torch.float32):
                x = make_inputs(mask, batch=1, heads=2, kv_heads=1, dtype=dtype)
                assert_as_good_as_eager(x, mask, function=_ours(device))


def check_empty(device: str, small: bool) -> None:
    function = _ours(device)
    for batch, heads, nq, nk in ((0, 2, 5, 5), (2, 0, 5, 5), (2, 2, 0, 5), (2, 2, 5, 0)):
        mask = masks.full(nq, nk)
        q, k = torch.randn(batch, heads, nq, 64), torch.randn(batch, heads, nk, 64)
        out, lse = function(q, k, k, mask, return_lse=True)
        assert out.shape == q.shape and lse.shape == q.shape[:3]
        assert torch.equal(out, torch.zeros_like(q))
        assert torch.equal(lse, torch.full_like(lse, -math.inf))


def check_grouped_queries(device: str, small: bool) -> None:
    mask = masks.causal(70)
    for heads, kv_heads in ((4, 1), (6, 3)) if small else ((4, 1), (6, 3), (8, 8), (24, 2)):
        for dtype in (torch.bfloat16,) if small else DTYPES:
            x = make_inputs(mask, batch=1, heads=heads, kv_heads=kv_heads, dtype=dtype)
            assert_as_good_as_eager(x, mask, function=_ours(device))


LAYOUTS = {
    "heads_last": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "packed": lambda t: torch.stack([t, t, t], dim=3).unbind(3)[1],
    "batch_inner": lambda t: t.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3),
    "odd_offset": lambda t: torch.nn.functional.pad(t, (1, 7))[..., 1:-7],
}


def check_layouts(device: str, small: bool) -> None:
    mask = masks.skip_causal(2, 40)
    for dtype in (torch.bfloat16,) if small else DTYPES:
        x = make_inputs(mask, dtype=dtype)
        there = mask.to(device)
        expected = _everything(*_moved(x, device), there)
        for name, layout in LAYOUTS.items():
            changed = Inputs(layout(x.q), layout(x.k), layout(x.v), layout(x.grad_out), x.grad_lse)
            checks.assert_equal(_everything(*_moved(changed, device), there), expected, name)


def check_nan_stays_in_its_row(device: str, small: bool) -> None:
    """NaN in keys that nobody may see changes no bit; NaN in a query stays in its row."""
    mask = masks.documents([40, 60], causal=False)
    x = make_inputs(mask, dtype=torch.bfloat16)
    function = _ours(device)
    clean = function(x.q, x.k, x.v, mask, return_lse=True)
    k, v, q = x.k.clone(), x.v.clone(), x.q.clone()
    k[:, :, 50], v[:, :, 50], q[:, :, 7] = math.nan, math.nan, math.nan
    for seen, part in zip(function(x.q, k, v, mask, return_lse=True), clean, strict=True):
        assert torch.equal(seen[:, :, :40], part[:, :, :40])
    out, lse = function(q, x.k, x.v, mask, return_lse=True)
    assert out[:, :, 7].isnan().all() and lse[:, :, 7].isnan().all()
    others = torch.arange(100) != 7
    assert torch.equal(out[:, :, others], clean[0][:, :, others])


def check_opcheck(device: str, small: bool) -> None:
    mask = random_mask(17, 33, seed=4, heads=4, key_bounds=True).to(device)
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v, grad_out, grad_lse = _moved(make_inputs(mask.to("cpu"), dtype=dtype), device)
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        op = torch.ops.arcore.block_sparse_attention
        torch.library.opcheck(op.default, (*leaves, mask.bounds, mask.key_bounds, 0.25))
        out, lse = op(q, k, v, mask.bounds, mask.key_bounds, 0.25)
        torch.library.opcheck(
            torch.ops.arcore.block_sparse_attention_backward.default,
            (grad_out, grad_lse, q, k, v, out, lse, mask.bounds, mask.key_bounds, 0.25),
        )
    if device == "cuda":
        for by_key in (False, True):
            torch.library.opcheck(
                torch.ops.arcore.interval_tile_plan.default,
                (mask.bounds, mask.key_bounds, mask.nk, 64, 128, by_key),
            )


def check_compile(device: str, small: bool) -> None:
    mask = masks.next_scale((1, 2, 3))
    x = make_inputs(mask, dtype=torch.bfloat16)
    there = mask.to(device)
    leaves = [checks.moved(t, device).requires_grad_() for t in (x.q, x.k, x.v)]

    def step(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return block_sparse_attention(2 * q, k, v, there, return_lse=True)

    checks.assert_compiles(step, *leaves, backend=checks.backend_for(small))


def check_autocast(device: str, small: bool) -> None:
    mask = masks.causal(70)
    x = make_inputs(mask)
    there = mask.to(device)
    q, k, v = (checks.moved(t, device) for t in (x.q, x.k, x.v))
    for dtype in DTYPES[1:]:
        expected = block_sparse_attention(q.to(dtype), k.to(dtype), v.to(dtype), there, return_lse=True)
        with torch.autocast(device, dtype=dtype):
            got = block_sparse_attention(q, k.to(dtype), v, there, return_lse=True)
        checks.assert_equal(got, expected, f"autocast to {dtype}")


def check_graph(device: str, small: bool) -> None:
    """Forward and backward in a captured graph, replayed with other inputs, without waiting for the device."""
    mask = masks.next_scale((1, 2, 3, 4, 5) if small else VAR_256)
    for dtype in (torch.bfloat16,) if small else DTYPES:
        draws = []
        for seed in range(4):
            x = make_inputs(mask, dtype=dtype, seed=seed)
            draws.append((x.q, x.k, x.v, x.grad_out, x.grad_lse))
        there = mask.to(device)

        def step(*tensors: Tensor, there: IntervalMask = there) -> list[Tensor]:
            return _everything(*tensors, there)  # type: ignore[arg-type]

        checks.assert_replays(device, step, draws)
        inputs = [checks.moved(t, device) for t in draws[0]]
        with checks.no_host_sync(device):
            step(*inputs)


def check_first_use_in_a_graph(device: str, small: bool) -> None:
    """A mask whose tile plans are first wanted while a graph is captured serves plain calls afterwards."""
    x = make_inputs(masks.causal(130), dtype=torch.bfloat16)
    inputs = [checks.moved(t, device) for t in (x.q, x.k, x.v)]
    warm, fresh = (masks.causal(130).to(device) for _ in range(2))
    expected = block_sparse_attention(*inputs, warm).clone()
    if device == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = block_sparse_attention(*inputs, fresh)
        # Before any replay: what the capture recorded has not run yet.
        checks.assert_equal(block_sparse_attention(*inputs, fresh), expected, "plain call after a capture")
        graph.replay()
        checks.assert_equal(captured, expected, "replay")
    checks.assert_equal(block_sparse_attention(*inputs, fresh), expected, "plain call")


def check_determinism(device: str, small: bool) -> None:
    mask = masks.next_scale((1, 2, 3, 4) if small else VAR_256)
    heads = 4 if small else 16
    for dtype in (torch.bfloat16, torch.float32):
        x = make_inputs(mask, batch=2, heads=heads, kv_heads=heads // 2, dtype=dtype)
        inputs, there = _moved(x, device), mask.to(device)
        checks.assert_repeatable(
            lambda inputs=inputs, there=there: _everything(*inputs, there), 5 if small else 50
        )


def check_batch_mates(device: str, small: bool) -> None:
    mask = masks.causal(150)
    for dtype in (torch.bfloat16,) if small else DTYPES:
        inputs, there = _moved(make_inputs(mask, batch=5, dtype=dtype), device), mask.to(device)
        whole = _everything(*inputs, there)
        for b in range(5):
            alone = _everything(*(t[b : b + 1] for t in inputs), there)
            checks.assert_equal(alone, [t[b : b + 1] for t in whole], f"batch entry {b}")


def check_large_offsets(device: str, small: bool) -> None:
    """Batch entries more than 2^31 elements apart."""
    mask = masks.causal(65)
    x = make_inputs(mask, batch=2, dtype=torch.bfloat16)
    there = mask.to(device)
    expected = _everything(*_moved(x, device), there)
    q, k, v, grad_out = (checks.far_apart(t, small, device) for t in (x.q, x.k, x.v, x.grad_out))
    got = _everything(q, k, v, grad_out, checks.moved(x.grad_lse, device), there)
    checks.assert_equal(got, expected, "far apart")


def check_large_outputs(device: str, small: bool) -> None:
    """More than 2^31 elements and more than 65535 heads of all batch entries; the last is as if alone."""
    mask = masks.causal(256)
    batch, heads = (3, 2) if small else (8194, 16)
    checks.need_memory(9 * batch * heads * 256 * 64 * 2, device)
    generator = torch.Generator(device).manual_seed(0)
    there = mask.to(device)

    def draw() -> Tensor:
        values = torch.randn(2, heads, 256, 64, generator=generator, device=device, dtype=torch.bfloat16)
        return torch.cat([values[:1].expand(batch - 1, -1, -1, -1), values[1:]])

    inputs = [draw() for _ in range(4)]
    grad_lse = torch.randn(2, heads, 256, device=device)
    grad_lse = torch.cat([grad_lse[:1].expand(batch - 1, -1, -1), grad_lse[1:]])
    whole = _everything(*inputs, grad_lse, there)
    for b in (0, batch - 2, batch - 1):
        alone = _everything(*(t[b : b + 1] for t in (*inputs, grad_lse)), there)
        checks.assert_equal([t[b : b + 1] for t in whole], alone, f"batch entry {b}")


CHECKS = (
    check_masks,
    check_random_bounds,
    check_head_dims,
    check_odd_lengths,
    check_empty,
    check_grouped_queries,
    check_layouts,
    check_nan_stays_in_its_row,
    check_opcheck,
    check_compile,
    check_autocast,
    check_graph,
    check_first_use_in_a_graph,
    check_determinism,
    check_batch_mates,
    check_large_offsets,
    check_large_outputs,
)
# What compute-sanitizer runs, in small.
SANITIZED = (check_masks, check_random_bounds, check_head_dims, check_odd_lengths, check_layouts)
# Their failure cannot be brought about by wrong results: the op is called by its own name, or on nothing.
NOT_DISTURBED = (check_opcheck, check_empty)
FUNCTIONS = ("block_sparse_attention",)
