"""Same ids whatever the threads, the batch mates and the instruction set."""

from __future__ import annotations

import dataclasses
import hashlib

import pytest
import torch

from tests.isa import ISAS, run_under
from tests.speculative.cases import RULES, assert_same, calls, make_case

KERNEL, REFERENCE = calls(), calls(reference=True)


@pytest.mark.parametrize("rule", RULES)
def test_a_row_does_not_know_its_batch(rule):
    case = make_case(12, parents=[-1, 0, 1])
    whole = KERNEL[rule](case, seed=case.seed, offset=case.offset)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    for rows in (order, torch.tensor([5]), torch.tensor([7, 7, 2])):
        part = dataclasses.replace(
            case, target=case.target[rows], draft=case.draft[rows], tokens=case.tokens[rows]
        )
        step = KERNEL[rule](part, seed=case.seed[rows], offset=case.offset[rows])
        for a, b in zip(step, whole, strict=True):
            assert torch.equal(a, b[rows])


def test_padding_to_a_wider_batch_changes_nothing():
    """More nodes than a row has, as in a batch with a longer mate."""
    case = make_case(30, parents=[-1, 0, 1])
    wide = dataclasses.replace(
        case,
        target=torch.nn.functional.pad(case.target, (0, 0, 0, 2), value=float("nan")),
        draft=torch.nn.functional.pad(case.draft, (0, 0, 0, 2), value=float("nan")),
        tokens=torch.nn.functional.pad(case.tokens, (0, 2), value=-1),
        parents=torch.tensor([-1, 0, 1, -1, 3]),
    )
    for rule in RULES:
        narrow = KERNEL[rule](case, seed=case.seed, offset=case.offset)
        step = KERNEL[rule](wide, seed=case.seed, offset=case.offset)
        assert torch.equal(step.tokens[:, :4], narrow.tokens), rule
        assert torch.equal(step.accepted, narrow.accepted), rule
        assert bool((step.tokens[:, 4:] == -1).all())


@pytest.mark.parametrize("rule", RULES)
def test_thread_count_changes_nothing(rule):
    case = make_case(37, 15_000, parents=[-1, 0, 1])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = KERNEL[rule](case, seed=case.seed, offset=case.offset)
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            assert_same(KERNEL[rule](case, seed=case.seed, offset=case.offset), expected)
    finally:
        torch.set_num_threads(before)


def _digest(check=None):
    """Of the ids of every rule and storage type; each step goes to `check` first."""
    digest = hashlib.sha256()
    for rule in RULES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            case = make_case(10, 150, dtype=dtype, parents=[-1, 0, 1])
            step = KERNEL[rule](case, seed=case.seed, offset=case.offset)
            if check is not None:
                check(step, REFERENCE[rule](case, seed=case.seed, offset=case.offset))
            digest.update(step.tokens.numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_gives_the_same_ids(isa):
    """The references' ids, which this process compares with the instruction set that it uses itself."""
    if isa == torch.ops.arcore.cpu_isa():
        _digest(check=assert_same)
        return
    script = f"""
import torch
from tests.speculative.test_determinism import _digest
print(torch.ops.arcore.cpu_isa())
assert _digest() == {_digest()!r}
"""
    run_under(isa, script)
