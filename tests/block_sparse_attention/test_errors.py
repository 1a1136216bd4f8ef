"""Every refusal names the argument, what was expected, what came, and the fix."""

from __future__ import annotations

import sys

import pytest
import torch

from arcore import masks
from arcore.ops import alibi_bias, block_sparse_attention, reference_block_sparse_attention
from tests.isa import run_under

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
        lambda: (*tensors(k=(3, 2, N, D)), masks.causal(N)),
        r"expected k of shape \(1 or B=2, Hkv, Nk, D=16\), to fit q .* but got \(3, 2, 9, 16\)",
    ),
    "k_dim": (
        lambda: (*tensors(k=(B, 2, N, 24)), masks.causal(N)),
        r"expected k of shape .* but got \(2, 2, 9, 24\)",
    ),
    "v_shape": (
        lambda: (*tensors(v=(B, 2, N + 1, D)), masks.causal(N)),
        r"expected v of shape \(2, 2, 9, Dv\), to fit k, but got \(2, 2, 10, 16\)",
    ),
    "v_batch": (
        lambda: (*tensors(k=(1, 2, N, D)), masks.causal(N)),
        r"expected v of shape \(1, 2, 9, Dv\), to fit k, but got \(2, 2, 9, 16\)",
    ),
    "heads": (
        lambda: (*tensors(k=(B, 3, N, D), v=(B, 3, N, D)), masks.causal(N)),
        r"heads of q to be a multiple of those of k but got H=4 and Hkv=3",
    ),
    "head_dim": (
        lambda: (*tensors(v=(B, 2, N, 0)), masks.causal(N)),
        r"head_dim of at least 1 but got D=16 and Dv=0; drop the empty heads",
    ),
    "tree_length": (
        lambda: (*tensors(q=(B, H, 3, D)), masks.tree([-1, 0, 0], 5)),
        r"a mask for Nq=3 queries and Nk=9 keys but got one for 3 and 8; cut the cache at mask.nk keys",
    ),
    "tree_batch": (
        lambda: (*tensors(q=(B, H, 3, D)), masks.tree([-1, 0, 0], [6, 5, 4])),
        r"mask's batch and heads to be 1 or \(B=2, H=4\) but got \(3, 1\)",
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
        TypeError, match=r"mask to be an arcore.masks.IntervalMask or TreeMask but got Tensor; build one with"
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
    # A device that has no autocast, which may be asked for no state of it.
    q, k, v, mask = (x.to("meta") for x in (q, k, v, masks.causal(N)))
    with pytest.raises(TypeError, match=r"one dtype but got float32, bfloat16 and float32"):
        block_sparse_attention(q, k.bfloat16(), v, mask)
    with pytest.raises(TypeError, match=r"but got float64; for float64 \(gradcheck\) call reference_"):
        block_sparse_attention(q.double(), k.double(), v.double(), mask)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_scale(scale):
    with pytest.raises(ValueError, match=r"scale to be finite in float32 but got"):
        block_sparse_attention(*tensors(), masks.causal(N), scale=scale)


DEVICES = ["q", "k", "v", "mask", "key_bias", "sinks"]


@pytest.mark.parametrize("away", DEVICES)
@pytest.mark.parametrize("function", [block_sparse_attention, reference_block_sparse_attention])
def test_devices(function, away):
    q, k, v = tensors()
    mask = masks.causal(N)
    given = {"q": q, "k": k, "v": v, "mask": mask, "key_bias": torch.zeros(N), "sinks": torch.zeros(H)}
    given[away] = given[away].to("meta")
    name = "k" if away == "q" else away
    with pytest.raises(ValueError, match=rf"expected {name} on the device of q.*move it with {name}.to"):
        function(**given)


@pytest.mark.parametrize("away", range(11))
def test_devices_of_the_raw_op(away):
    """torch runs the fake as soon as one tensor is a meta tensor."""
    q, k, v = tensors()
    tree = masks.TreeMask(masks.tree([-1] * N, 0).words, 0)
    arguments = [q, k, v, masks.causal(N).bounds, None, 1.0, None, None, tree.words.unsqueeze(2), tree.prefix]
    arguments.append(torch.zeros(1, 1, N))
    if not isinstance(arguments[away], torch.Tensor):
        return
    arguments[away] = arguments[away].to("meta")
    with pytest.raises(ValueError, match=r"arcore::block_sparse_attention: expected \w+ on the device of q"):
        torch.ops.arcore.block_sparse_attention(*arguments)


def test_devices_of_the_raw_derivatives():
    q, k, v = tensors()
    bounds = masks.causal(N).bounds
    out, lse = torch.ops.arcore.block_sparse_attention(q, k, v, bounds, None, 1.0)
    with pytest.raises(ValueError, match=r"attention_backward: expected out on the device of q"):
        torch.ops.arcore.block_sparse_attention_backward(
            q, None, q, k, v, out.to("meta"), lse, bounds, None, 1.0
        )
    with pytest.raises(ValueError, match=r"attention_jvp: expected tangent_k on the device of q"):
        torch.ops.arcore.block_sparse_attention_jvp(
            q, k, v, out, lse, q, k.to("meta"), None, None, bounds, None, 1.0
        )


def test_key_bias_and_sinks():
    q, k, v = tensors()
    for bias in (torch.zeros(N + 1), torch.zeros(3, N), torch.zeros(()), torch.zeros(1, 1, 1, N)):
        with pytest.raises(ValueError, match=r"expected key_bias of shape \[Nk=9\], \[H=4, Nk\] or"):
            block_sparse_attention(q, k, v, masks.causal(N), key_bias=bias)
    with pytest.raises(ValueError, match=r"a floating-point dtype but got \(9,\) int64"):
        block_sparse_attention(q, k, v, masks.causal(N), key_bias=torch.zeros(N, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"expected sinks of shape \[H=4\] .* but got \(2,\) float32"):
        block_sparse_attention(q, k, v, masks.causal(N), sinks=torch.zeros(2))
    with pytest.raises(TypeError, match=r"expected sinks to be a tensor but got list"):
        block_sparse_attention(q, k, v, masks.causal(N), sinks=[0.0] * H)
    with pytest.raises(ValueError, match=r"expected slopes of shape \[H\] but got \(2, 2\)"):
        alibi_bias(torch.zeros(2, 2), 5)


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


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_raw_op_takes_four_dimensions_only(name):
    given = dict(zip("qkv", tensors(), strict=True))
    given[name] = given[name][0]
    with pytest.raises(RuntimeError, match=rf"arcore::block_sparse_attention: expected {name} of shape"):
        torch.ops.arcore.block_sparse_attention(*given.values(), masks.causal(N).bounds, None, 1.0)


def test_raw_derivatives_check_ranks():
    q, k, v = tensors()
    bounds = masks.causal(N).bounds
    out, lse = torch.ops.arcore.block_sparse_attention(q, k, v, bounds, None, 1.0)
    backward = torch.ops.arcore.block_sparse_attention_backward
    for bad in ({"grad_out": q[0]}, {"out": out[0]}, {"lse": lse[0]}, {"grad_lse": lse[0]}):
        given = {"grad_out": q, "grad_lse": lse, "out": out, "lse": lse, **bad}
        with pytest.raises(RuntimeError, match=rf"attention_backward: expected {next(iter(bad))} "):
            backward(
                given["grad_out"], given["grad_lse"], q, k, v, given["out"], given["lse"], bounds, None, 1.0
            )
    tangent = torch.ops.arcore.block_sparse_attention_jvp
    for place, name in enumerate(("tangent_q", "tangent_k", "tangent_v", "tangent_key_bias")):
        moving = [None] * 4
        moving[place] = q[0]
        with pytest.raises(RuntimeError, match=rf"attention_jvp: expected {name} "):
            tangent(q, k, v, out, lse, *moving, bounds, None, 1.0)


def test_raw_op_checks_trees():
    op = torch.ops.arcore.block_sparse_attention
    q, k, v = tensors()
    bounds = masks.causal(N).bounds
    words, prefix = torch.ones(1, N, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="tree_words and tree_prefix together but got one"):
        op(q, k, v, bounds, None, 1.0, None, None, words)
    for bad in (words[:, :-1].contiguous(), words.int(), words[0], words.repeat(3, 1, 1)):
        with pytest.raises(RuntimeError, match=r"expected tree_words int64 of shape \[1 or 2, 9, words\]"):
            op(q, k, v, bounds, None, 1.0, None, None, bad, prefix)
    for bad in (prefix.long(), prefix.repeat(3), prefix.view(1, 1)):
        with pytest.raises(RuntimeError, match=r"expected tree_prefix int32 of shape \[1 or 2\]"):
            op(q, k, v, bounds, None, 1.0, None, None, words, bad)
    # Wild prefixes cannot make the kernel read outside of the words.
    for wild in (-(2**31), -70, 2**31 - 1):
        op(q, k, v, bounds, None, 1.0, None, None, words, torch.tensor([wild], dtype=torch.int32))


OUT_OF_MEMORY = """
import os, resource
import torch
from arcore import masks
from arcore.ops import block_sparse_attention
print(torch.ops.arcore.cpu_isa())
torch.set_num_threads(1)
mask, q = masks.causal(1024), torch.randn(1, 1, 1024, 256, requires_grad=True)
ends = set()
for kilobytes in range(0, 20000, 500):
    pid = os.fork()
    if pid == 0:
        used = int(open("/proc/self/statm").read().split()[0]) * 4096
        try:
            resource.setrlimit(resource.RLIMIT_AS, (used + kilobytes * 1024,) * 2)
            block_sparse_attention(q, q, q, mask).sum().backward()
            os._exit(0)
        except RuntimeError:
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    assert not status & 127, f"signal {status & 127} with {kilobytes} KiB left"
    ends.add(status >> 8)
assert ends == {0, 1}, ends
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits its own memory as Linux counts it")
def test_running_out_of_memory_is_an_error():
    run_under(torch.ops.arcore.cpu_isa(), OUT_OF_MEMORY)


def test_scratch_that_cannot_be_had_is_named():
    """Expanded tensors ask for scratch of Nk x D, although they hold one row."""
    n = 1 << 30
    k = torch.zeros(1, 1, 1, 256).expand(1, 1, n, 256)
    bounds = torch.zeros(1, 1, 200, 2, dtype=torch.int32)
    with pytest.raises(
        RuntimeError, match=r"block_sparse_attention: could not allocate \d+ MiB of scratch; free memory"
    ):
        torch.ops.arcore.block_sparse_attention(torch.zeros(1, 1, 200, 256), k, k, bounds, None, 1.0)
