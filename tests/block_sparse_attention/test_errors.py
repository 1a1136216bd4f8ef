"""Every refusal names the argument, what was expected, what came, and the fix."""

from __future__ import annotations

import pytest
import torch

from arcore import masks
from arcore.ops import block_sparse_attention, reference_block_sparse_attention

B, H, N, D = 2, 4, 9, 16


def tensors(**changes):
    shapes = {"q": (B, H, N, D), "k": (B, 2, N, D), "v": (B, 2, N, D), **changes}
    return [torch.randn(shapes[name]) for name in ("q", "k", "v")]


CASES = {
    "q_rank": (
        lambda: (*tensors(q=(B, N, D)), masks.causal(N)),
        r"expected q of shape \[B, H, N, D\] but got \(2, 9, 16\)",
    ),
    "k_batch": (
        lambda: (*tensors(k=(1, 2, N, D)), masks.causal(N)),
        r"expected k of shape \(B=2, Hkv, Nk, D=16\)",
    ),
    "k_dim": (
        lambda: (*tensors(k=(B, 2, N, 24)), masks.causal(N)),
        r"expected k of shape .* but got \(2, 2, 9, 24\)",
    ),
    "v_shape": (
        lambda: (*tensors(v=(B, 2, N + 1, D)), masks.causal(N)),
        r"expected v of k's shape \(2, 2, 9, 16\)",
    ),
    "heads": (
        lambda: (*tensors(k=(B, 3, N, D), v=(B, 3, N, D)), masks.causal(N)),
        r"heads of q to be a multiple of those of k but got H=4 and Hkv=3",
    ),
    "head_dim": (
        lambda: (*tensors(q=(B, H, N, 12), k=(B, 2, N, 12), v=(B, 2, N, 12)), masks.causal(N)),
        r"head_dim to be a multiple of 8 from 8 to 256 but got 12; pad it",
    ),
    "head_dim_large": (
        lambda: (*tensors(q=(B, H, N, 264), k=(B, 2, N, 264), v=(B, 2, N, 264)), masks.causal(N)),
        r"from 8 to 256 but got 264",
    ),
    "mask_length": (
        lambda: (*tensors(), masks.causal(N + 1)),
        r"a mask for Nq=9 queries and Nk=9 keys but got one for 10 and 10",
    ),
    "mask_heads": (
        lambda: (*tensors(), masks.IntervalMask(torch.zeros(1, 3, N, 2, dtype=torch.int32), N)),
        r"mask's batch and heads to be 1 or \(B=2, H=4\) but got \(1, 3\)",
    ),
    "mask_key_bounds": (
        lambda: (
            *tensors(),
            masks.IntervalMask(
                torch.zeros(1, 1, N, 2, dtype=torch.int32),
                N,
                key_bounds=torch.zeros(3, N, 2, dtype=torch.int32),
            ),
        ),
        r"batch",
    ),
}


@pytest.mark.parametrize("function", [block_sparse_attention, reference_block_sparse_attention])
@pytest.mark.parametrize("name", CASES)
def test_shapes(name, function):
    make, message = CASES[name]
    q, k, v, mask = make()
    with pytest.raises(ValueError, match=message):
        function(q, k, v, mask)


def test_mask_type():
    q, k, v = tensors()
    with pytest.raises(
        TypeError, match=r"mask to be an arcore.masks.IntervalMask but got Tensor; build one with"
    ):
        block_sparse_attention(q, k, v, torch.ones(N, N, dtype=torch.bool))


def test_not_a_tensor():
    q, k, v = tensors()
    with pytest.raises(TypeError, match=r"expected k to be a tensor but got ndarray"):
        block_sparse_attention(q, k.numpy(), v, masks.causal(N))


def test_dtypes():
    q, k, v = tensors()
    with pytest.raises(TypeError, match=r"one dtype but got float32, bfloat16 and float32"):
        block_sparse_attention(q, k.bfloat16(), v, masks.causal(N))
    with pytest.raises(TypeError, match=r"but got float64; for float64 \(gradcheck\) call reference_"):
        block_sparse_attention(q.double(), k.double(), v.double(), masks.causal(N))
    with pytest.raises(TypeError, match=r"float32, bfloat16 or float16 but got int64"):
        block_sparse_attention(q.long(), k.long(), v.long(), masks.causal(N))


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_scale(scale):
    with pytest.raises(ValueError, match=r"scale to be finite but got"):
        block_sparse_attention(*tensors(), masks.causal(N), scale=scale)


def test_device():
    q, k, v = tensors()
    with pytest.raises(
        ValueError, match=r"on one device but got meta, cpu, cpu and cpu; move the mask with mask.to"
    ):
        block_sparse_attention(q.to("meta"), k, v, masks.causal(N))


def test_keyword_only():
    with pytest.raises(TypeError, match="positional"):
        block_sparse_attention(*tensors(), masks.causal(N), 0.5)


def test_raw_op_checks_too():
    """torch.ops calls reach the C++ checks: wrong input is an error there, never a crash."""
    op = torch.ops.arcore.block_sparse_attention
    q, k, v = tensors()
    bounds = masks.causal(N).bounds
    with pytest.raises(
        RuntimeError, match=r"arcore::block_sparse_attention: expected bounds of dtype int32 but got Long"
    ):
        op(q, k, v, bounds.long(), None, 1.0)
    with pytest.raises(
        RuntimeError, match=r"expected bounds of shape \[1 or 2, 1 or 4, 9, 2 or 4\] but got \(1, 1, 8, 2\)"
    ):
        op(q, k, v, bounds[:, :, :8].contiguous(), None, 1.0)
    with pytest.raises(
        RuntimeError, match=r"expected q of dtype float32, bfloat16 or float16 but got Double"
    ):
        op(q.double(), k.double(), v.double(), bounds, None, 1.0)
    with pytest.raises(RuntimeError, match=r"expected key_bounds of shape \[1 or 2, 9, 2\]"):
        op(q, k, v, bounds, torch.zeros(1, 8, 2, dtype=torch.int32), 1.0)
    with pytest.raises(RuntimeError, match=r"expected bounds to be contiguous"):
        op(q, k, v, bounds.expand(2, 4, N, 2), None, 1.0)


def test_raw_op_clamps_wild_bounds():
    """Bounds outside of [0, Nk] cannot make the kernel read outside of its tensors."""
    q, k, v = tensors()
    wild = torch.tensor([-5, 1 << 30], dtype=torch.int32).expand(1, 1, N, 2).contiguous()
    out, _ = torch.ops.arcore.block_sparse_attention(q, k, v, wild, None, 0.25)
    assert torch.equal(out, block_sparse_attention(q, k, v, masks.full(N, N), scale=0.25))
