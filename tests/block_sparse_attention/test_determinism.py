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
from tests.isa import ISAS, run_under


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


def test_batch_mates_change_no_bit():
    mask = masks.causal(150)
    x = make_inputs(mask, batch=4, dim=32)
    whole = block_sparse_attention(x.q, x.k, x.v, mask)
    for b in range(4):
        alone = block_sparse_attention(x.q[b : b + 1], x.k[b : b + 1], x.v[b : b + 1], mask)
        assert torch.equal(whole[b : b + 1], alone)


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


def test_a_missing_instruction_set_is_never_run():
    """Asking for more than the CPU has must not raise the choice."""
    code = "import arcore, torch; print(torch.ops.arcore.cpu_isa(), torch.ops.arcore.cpu_isa_supported())"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "avx512"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    used, supported = result.stdout.split()
    assert used == supported
