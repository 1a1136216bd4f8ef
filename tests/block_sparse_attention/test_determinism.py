"""Same bits whatever the threads, the batch mates, the repetition; same answer in every instruction set."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from arcore import masks
from arcore.ops import block_sparse_attention
from tests.block_sparse_attention.cases import make_inputs, random_mask
from tests.isa import BF16_UNITS, ISAS, run_on_bf16_unit, run_under


def _everything(x, mask):
    q, k, v = (t.clone().requires_grad_() for t in (x.q, x.k, x.v))
    out, lse = block_sparse_attention(q, k, v, mask, return_lse=True)
    return out.detach(), lse.detach(), *torch.autograd.grad([out, lse], (q, k, v), [x.grad_out, x.grad_lse])


@pytest.fixture
def restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(1, 2, 1), (1, 4, 4), (3, 8, 2)])
def test_thread_count_changes_no_bit(shape, restore_threads):
    batch, heads, kv_heads = shape
    mask = masks.next_scale((1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
    x = make_inputs(mask, batch=batch, heads=heads, kv_heads=kv_heads, dim=32)
    torch.set_num_threads(1)
    expected = _everything(x, mask)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        for a, b in zip(_everything(x, mask), expected, strict=True):
            assert torch.equal(a, b)


def test_repetition_changes_no_bit():
    mask = random_mask(200, 300, seed=2, key_bounds=True)
    x = make_inputs(mask, dim=40, dtype=torch.bfloat16)
    expected = _everything(x, mask)
    for _ in range(20):
        for a, b in zip(_everything(x, mask), expected, strict=True):
            assert torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kv_heads", "n"), [(2, 150), (1, 800)])
def test_batch_mates_change_no_bit(kv_heads, n, dtype):
    """Of outputs, gradients and tangents."""
    mask = masks.causal(n)
    x = make_inputs(mask, batch=4, heads=2, kv_heads=kv_heads, dim=32, dtype=dtype)

    def results(at):
        part = type(x)(x.q[at], x.k[at], x.v[at], x.grad_out[at], x.grad_lse[at])
        tangent = torch.func.jvp(
            lambda q, k, v: block_sparse_attention(q, k, v, mask),
            (part.q, part.k, part.v),
            (part.grad_out, part.v, part.k),
        )
        return *_everything(part, mask), *tangent

    whole = results(slice(0, 4))
    for b in range(4):
        for a, alone in zip(whole, results(slice(b, b + 1)), strict=True):
            assert torch.equal(a[b : b + 1], alone)


FULL = [(1, 1), (1, 700), (9, 700), (16, 16), (33, 5), (130, 257)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("lengths", FULL, ids=str)
def test_batch_mates_change_no_bit_of_the_gradients_of_any_shape(lengths, kv_heads, dtype):
    """Few query rows and many keys, and the other way round, where work is cut in other places."""
    mask = masks.full(*lengths)
    x = make_inputs(mask, batch=5, heads=4, kv_heads=kv_heads, dim=40, dtype=dtype)
    whole = _everything(x, mask)
    for b in (0, 2, 4):
        at = slice(b, b + 1)
        part = type(x)(x.q[at], x.k[at], x.v[at], x.grad_out[at], x.grad_lse[at])
        for a, alone in zip(whole, _everything(part, mask), strict=True):
            assert torch.equal(a[at], alone)


PROBE = """
import torch
from tests.block_sparse_attention.cases import (
    MASKS, assert_as_good_as_eager, make_inputs, random_mask, random_tree
)
print(torch.ops.arcore.cpu_isa())
for name in ("next_scale", "skip_causal", "window_sinks"):
    mask = MASKS[name]()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert_as_good_as_eager(make_inputs(mask, batch=1, dim=72, dtype=dtype), mask)
mask = random_mask(97, 301, seed=0, key_bounds=True)
assert_as_good_as_eager(make_inputs(mask, dim=40), mask)
for nodes, prefix in ((64, [3, 509]), (130, [40, 7])):
    mask = random_tree(nodes, prefix, seed=1, batch=2)
    for dtype in (torch.float32, torch.bfloat16):
        assert_as_good_as_eager(make_inputs(mask, dim=36, v_dim=20, key_bias=True, dtype=dtype), mask)
"""


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    run_under(isa, PROBE)


BF16_PROBE = """
import math
import torch
from arcore import masks
from arcore.ops import block_sparse_attention
from tests.block_sparse_attention.cases import (
    MASKS, assert_as_good_as_eager, make_inputs, random_mask, random_tree
)
print(torch.ops.arcore.cpu_bf16())
dtype = torch.bfloat16
for i, name in enumerate(MASKS):
    dim, v_dim = ((64, 64), (40, 72), (7, 20))[i % 3]
    x = make_inputs(MASKS[name](), dim=dim, v_dim=v_dim, key_bias=i % 2 == 1, sinks=i % 4 == 3, dtype=dtype)
    assert_as_good_as_eager(x, MASKS[name](), scale=(None, -0.4)[i % 5 == 4])
for nq, nk in ((1, 1), (1, 1000), (15, 17), (33, 31), (193, 513), (300, 1), (385, 600)):
    mask = random_mask(nq, nk, seed=nq, batch=2, heads=4, key_bounds=nq % 2 == 1)
    assert_as_good_as_eager(make_inputs(mask, dim=48, v_dim=33, dtype=dtype), mask)
mask = random_tree(130, [3, 509], seed=1)
assert_as_good_as_eager(make_inputs(mask, dtype=dtype), mask)

# What a row may not see does not reach it, and what it sees does.
mask = masks.causal(300)
x = make_inputs(mask, dim=32, dtype=dtype)
def everything(q, k, v, grad_out):
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    out = block_sparse_attention(*leaves, mask)
    return out.detach(), *torch.autograd.grad(out, leaves, grad_out)
clean = everything(x.q, x.k, x.v, x.grad_out)
k, v = x.k.clone(), x.v.clone()
k[:, :, 200], v[:, :, 200] = math.nan, math.inf
dirty = everything(x.q, k, v, x.grad_out)
for a, b in zip(dirty[:2], clean[:2]):
    torch.testing.assert_close(a[:, :, :200], b[:, :, :200], rtol=2e-2, atol=2e-2)
    assert a[:, :, 200:].isnan().any(-1).all()
q, grad_out = x.q.clone(), x.grad_out.clone()
q[:, :, 100], grad_out[:, :, 100] = math.inf, math.nan
dirty = everything(q, x.k, x.v, grad_out)
for a, b in zip(dirty[2:], clean[2:]):
    torch.testing.assert_close(a[:, :, 101:], b[:, :, 101:], rtol=2e-2, atol=5e-2)
    assert a[:, :, :101].isnan().any(-1).all()

# The same bits for any number of threads and any batch mates.
whole = everything(x.q, x.k, x.v, x.grad_out)
torch.set_num_threads(3)
assert all(torch.equal(a, b) for a, b in zip(everything(x.q, x.k, x.v, x.grad_out), whole))
assert torch.equal(block_sparse_attention(x.q[1:], x.k[1:], x.v[1:], mask), whole[0][1:])
"""


@pytest.mark.parametrize("unit", BF16_UNITS)
def test_every_bf16_unit(unit):
    run_on_bf16_unit(unit, BF16_PROBE)


def test_a_bf16_unit_goes_with_its_instruction_set():
    run_under(
        "avx2",
        "import arcore, torch; print(torch.ops.arcore.cpu_isa()); assert torch.ops.arcore.cpu_bf16() == 'none'",
    )


def test_a_missing_instruction_set_is_never_run():
    """Asking for more than the CPU has must not raise the choice."""
    code = "import arcore, torch; print(torch.ops.arcore.cpu_isa(), torch.ops.arcore.cpu_isa_supported())"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "avx512"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    used, supported = result.stdout.split()
    assert used == supported
