"""What must hold of block_sparse_attention on a device: `check_*(device, small)`, see tests/device_checks.py."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor

from arcore import masks
from arcore.masks import IntervalMask
from arcore.ops import block_sparse_attention, reference_block_sparse_attention
from tests import device_checks as checks
from tests.block_sparse_attention.cases import (
    MASKS,
    Inputs,
    assert_as_good_as_eager,
    make_inputs,
    random_mask,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# With the sm_90a kernels: what they take, and where they promise a tolerance instead of equal bits. "require" makes a
# call that would quietly take other kernels an error, so these checks leave such calls out.
SM90A = os.environ.get("ARCORE_SM90A", "0") not in ("", "0")
REQUIRED = os.environ.get("ARCORE_SM90A") == "require"
if REQUIRED:
    DTYPES = (torch.bfloat16, torch.float16)
VAR_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


def _of(*dtypes: torch.dtype) -> tuple[torch.dtype, ...]:
    return tuple(dtype for dtype in dtypes if dtype in DTYPES)


def _assert_same(device: str, got: Any, expected: Any, what: str) -> None:
    """Equal bits; where the design promises no more, equal up to the rounding of a result to 16 bits.

    That is on sm_90a, and on a CPU's AMX tiles, whose slower path for values that are not finite rounds otherwise.
    """
    tiles = device == "cpu" and torch.ops.arcore.cpu_bf16() == "tiles"
    if not (tiles or (device == "cuda" and SM90A)):
        checks.assert_equal(got, expected, what)
        return
    for a, b in zip(checks.tensors_of(got), checks.tensors_of(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2, msg=lambda m: f"{what}: {m}")


def _assert_equal_on(device: str, got: Any, expected: Any, what: str) -> None:
    checks.assert_equal(got, expected, what)


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
        for dtype in _of(torch.float32, torch.bfloat16):
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
            for dtype in _of(torch.bfloat16, torch.float32):
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
            if name == "odd_offset" and REQUIRED:
                continue
            changed = Inputs(layout(x.q), layout(x.k), layout(x.v), layout(x.grad_out), x.grad_lse)
            # The copy engine takes rows of whole 16 bytes only, so the odd ones come from other kernels.
            same = _assert_same if name == "odd_offset" else _assert_equal_on
            same(device, _everything(*_moved(changed, device), there), expected, name)


def check_nan_stays_in_its_row(device: str, small: bool) -> None:
    """NaN in keys that nobody may see changes no bit; NaN in a query stays in its row.

    The sm_90a kernels compute the rows again whose tile holds what they may not see: the same numbers, other roundings.
    """
    mask = masks.documents([40, 60], causal=False)
    x = make_inputs(mask, dtype=torch.bfloat16)
    function = _ours(device)
    clean = function(x.q, x.k, x.v, mask, return_lse=True)
    k, v, q = x.k.clone(), x.v.clone(), x.q.clone()
    k[:, :, 50], v[:, :, 50], q[:, :, 7] = math.nan, math.nan, math.nan
    for seen, part in zip(function(x.q, k, v, mask, return_lse=True), clean, strict=True):
        _assert_same(device, seen[:, :, :40], part[:, :, :40], "rows that see none of it")
    out, lse = function(q, x.k, x.v, mask, return_lse=True)
    assert out[:, :, 7].isnan().all() and lse[:, :, 7].isnan().all()
    others = torch.arange(100) != 7
    assert torch.equal(out[:, :, others], clean[0][:, :, others])


def check_opcheck(device: str, small: bool) -> None:
    mask = random_mask(17, 33, seed=4, heads=4, key_bounds=True).to(device)
    for dtype in _of(torch.float32, torch.bfloat16):
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
        for more in ((False,), (True,), (True, False, True), (False, True)):
            torch.library.opcheck(
                torch.ops.arcore.interval_tile_plan.default,
                (mask.bounds, mask.key_bounds, mask.nk, 64, 128, *more),
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
    for dtype in (torch.bfloat16, torch.float16):
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
    for dtype in _of(torch.bfloat16, torch.float32):
        x = make_inputs(mask, batch=2, heads=heads, kv_heads=heads // 2, dtype=dtype)
        inputs, there = _moved(x, device), mask.to(device)
        checks.assert_repeatable(
            lambda inputs=inputs, there=there: _everything(*inputs, there), 5 if small else 50
        )


def check_batch_mates(device: str, small: bool) -> None:
    """Whether the keys of a query tile are split over blocks is a matter of its lengths, not of its batch."""
    for mask in (masks.causal(150), masks.full(9, 700), masks.full(200, 1300)):
        if REQUIRED and mask.nq < mask.nk:
            continue  # split keys are for the sm_80 kernels
        _check_batch_mates(device, mask, (torch.bfloat16,) if small else DTYPES)


def _check_batch_mates(device: str, mask: IntervalMask, dtypes: tuple[torch.dtype, ...]) -> None:
    for dtype in dtypes:
        inputs, there = _moved(make_inputs(mask, batch=5, dtype=dtype), device), mask.to(device)
        whole = _everything(*inputs, there)
        for b in range(5):
            alone = _everything(*(t[b : b + 1] for t in inputs), there)
            # Over few queries of many keys the CPU's gradient of q sums parts whose number follows the batch.
            compared = 2 if device == "cpu" and mask.nq < mask.nk else 5
            of_batch = [t[b : b + 1] for t in whole[:compared]]
            checks.assert_equal(alone[:compared], of_batch, f"batch entry {b}")


def check_trees_and_biases(device: str, small: bool) -> None:
    """What a GPU does in PyTorch: trees and key biases, with gradients of all inputs."""
    generator = torch.Generator().manual_seed(4)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    parents = torch.tensor([-1, 0, 0, 1, 1, 2, 5]).expand(2, 7)
    n = 30 if small else 1000
    for mask, nq, nk, bias in (
        (masks.tree(parents, torch.tensor([n - 7, n - 9])), 7, n, None),
        (masks.tree(parents, n - 7), 7, n, normal(4, n)),
        (masks.causal(n), n, n, normal(n)),
    ):
        inputs = [normal(2, 4, nq, 16), normal(2, 2, nk, 16), normal(2, 2, nk, 16)]
        inputs += [] if bias is None else [bias]
        grads = normal(2, 4, nq, 16), normal(2, 4, nq)
        found = []
        for function, dtype in (
            (_ours(device), torch.float32),
            (reference_block_sparse_attention, torch.float64),
        ):
            leaves = [x.to(dtype).requires_grad_() for x in inputs]
            extra = {} if bias is None else {"key_bias": leaves[3]}
            out, lse = function(*leaves[:3], mask, return_lse=True, **extra)
            given = [g.to(dtype) for g in grads]
            found.append([out, lse, *torch.autograd.grad([out, lse], leaves, given)])
        for name, ours, exact in zip(("out", "lse", "q", "k", "v", "key_bias"), *found, strict=False):
            error = (ours.double() - exact).abs().max().item()
            assert error <= 1e-4 * exact.abs().max().item(), f"{name}: off by {error:.1e}"


def check_full_rings(device: str, small: bool) -> None:
    """More key tiles than any ring of buffers holds, and three units or more per block, at each padded head dim."""
    # 11 tiles of 128 rows; 36 pairs make 396 units, three for each of 132 multiprocessors.
    n, heads = (200, 2) if small else (1350, 36)
    mask, there = masks.causal(n), masks.causal(n).to(device)
    for dim in (72,) if small else (64, 96, 128):
        x = make_inputs(mask, batch=1, heads=heads, kv_heads=heads // 2, dim=dim, dtype=torch.bfloat16)
        inputs = _moved(x, device)
        ours = _everything(*inputs, there)
        for head in {0, heads // 2 - 1, heads // 2, heads - 1}:
            # One query head and its keys; gradients of keys that heads share are compared in other checks.
            kv = slice(head // 2, head // 2 + 1)
            q, k, v, grad_out = (
                t.double()
                for t in (inputs[0][:, head : head + 1], *(t[:, kv] for t in inputs[1:3]),
                          inputs[3][:, head : head + 1])
            )  # fmt: skip
            q.requires_grad_()
            out, lse = reference_block_sparse_attention(q, k, v, there, return_lse=True)
            (grad_q,) = torch.autograd.grad([out, lse], q, [grad_out, inputs[4][:, head : head + 1].double()])
            for name, got, wanted, limit in (
                ("out", ours[0], out, 1e-2), ("lse", ours[1], lse, 1e-5), ("grad_q", ours[2], grad_q, 2e-2)
            ):  # fmt: skip
                error = (got[:, head : head + 1].double() - wanted).norm() / wanted.norm()
                assert error <= limit, f"head dim {dim}, {name} of head {head} is off by {error:.1e}"
        gradients = _everything(
            *(t[:, :2] if i in (0, 3, 4) else t[:, :1] for i, t in enumerate(inputs)), there
        )
        checks.assert_equal([ours[3][:, :1], ours[4][:, :1]], gradients[3:], "gradients of the first keys")


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
    check_trees_and_biases,
    check_full_rings,
    check_large_offsets,
    check_large_outputs,
)
if REQUIRED:
    CHECKS = tuple(check for check in CHECKS if check not in (check_empty, check_trees_and_biases))  # float32
# What compute-sanitizer runs, in small.
SANITIZED = (check_masks, check_random_bounds, check_head_dims, check_odd_lengths, check_layouts)
# Their failure cannot be brought about by wrong results: the op is called by its own name, or on nothing.
NOT_DISTURBED = (check_opcheck, check_empty)
FUNCTIONS = ("block_sparse_attention",)
