"""Same bits whatever the threads, the batch mates, the repetition; same answer in every instruction set."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from arcore.ops import linear_logprobs, token_logprobs
from tests.token_logprobs.cases import bits, make_case, random_mask, run


@pytest.fixture
def restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(1, 300000), (7, 128256), (500, 1000)])
def test_thread_count_changes_no_bit(shape, restore_threads):
    case = make_case(*shape, temperature=torch.rand(shape[0]) + 0.5)
    torch.set_num_threads(1)
    expected = bits(run(token_logprobs, case, torch.float32))
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        for a, b in zip(bits(run(token_logprobs, case, torch.float32)), expected, strict=True):
            assert torch.equal(a, b)


def test_batch_mates_change_no_bit():
    kept = random_mask(6, 3001)
    case = make_case(6, 3001, dtype=torch.bfloat16, mask=kept, softcap=9.0)
    whole = run(token_logprobs, case, torch.bfloat16)
    for row in range(6):
        alone = make_case(1, 3001)
        alone.logits, alone.target = case.logits[row : row + 1], case.target[row : row + 1]
        alone.cotangents = tuple(c[row : row + 1] for c in case.cotangents)
        alone.options = {"mask": kept[row : row + 1], "softcap": 9.0}
        for name, x in run(token_logprobs, alone, torch.bfloat16).items():
            assert torch.equal(x, whole[name][row : row + 1]), name


def test_repetition_changes_no_bit():
    hidden, weight = torch.randn(40, 16, requires_grad=True), torch.randn(300, 16, requires_grad=True)
    target = torch.randint(300, (40,))

    def everything():
        out = linear_logprobs(hidden, weight, target, return_entropy=True, tile=(16, 64))
        return [*out, *torch.autograd.grad(sum(x.sum() for x in out), (hidden, weight))]

    expected = everything()
    for _ in range(10):
        for a, b in zip(everything(), expected, strict=True):
            assert torch.equal(a, b)


PROBE = """
import torch
from tests.token_logprobs.cases import assert_as_good_as_eager, make_case, pack_mask, random_mask
print("isa", torch.ops.arcore.cpu_isa())
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for vocab in (5, 33, 4099):
        kept = random_mask(3, vocab, share=0.7)
        for mask in (None, kept, pack_mask(kept)):
            for softcap in (None, 4.0):
                rows = torch.tensor([0.5, 1.0, 2.0])
                options = dict(mask=mask, softcap=softcap, temperature=rows)
                assert_as_good_as_eager(make_case(3, vocab, dtype=dtype, **options))
case = make_case(3, 2050)
case.logits[1] = -torch.inf
case.logits[2, 7] = torch.nan
assert_as_good_as_eager(case)
"""


@pytest.mark.parametrize("isa", ["default", "avx2", "avx512"])
def test_every_instruction_set(isa):
    order = ["default", "avx2", "avx512"]
    if order.index(isa) > order.index(torch.ops.arcore.cpu_isa_supported()):
        pytest.skip(f"this CPU has no {isa}")
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": isa, "PYTHONPATH": root}
    if "PYTHONPATH" in os.environ:
        environment["PYTHONPATH"] += os.pathsep + os.environ["PYTHONPATH"]
    result = subprocess.run(
        [sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr
    assert f"isa {isa}" in result.stdout
