"""The kernels against the references: the same ids, whatever the rule, storage type, shape and strides."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from arcore.ops import speculative as ops
from tests.speculative.cases import RULES, assert_same, calls, distributions, make_case

KERNEL, REFERENCE = calls(), calls(reference=True)


def _compare(rule, case, **options):
    keywords = {"seed": case.seed, "offset": case.offset, **options}
    got = KERNEL[rule](case, **keywords)
    assert_same(got, REFERENCE[rule](case, **keywords))
    return got


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_same_ids(rule, dtype):
    parents = [-1, 0, 1, 2] if rule.startswith(("chain", "jacobi")) else None
    step = _compare(rule, make_case(dtype=dtype, parents=parents))
    assert step.valid.all()
    assert step.accepted.sum() > 0  # else nothing was tested
    assert step.accepted.min() < step.accepted.max()


@pytest.mark.parametrize("vocab", [1, 2, 15, 16, 17, 63, 64, 65, 127, 511, 513, 1000])
@pytest.mark.parametrize("rule", ["chain", "chain_block", "tree", "relaxed", "relaxed_drawn", "typical"])
def test_odd_vocabularies(rule, vocab):
    parents = [-1, 0, 1, 2] if rule.startswith("chain") else [-1, -1, 0, 0]
    for dtype in (torch.float32, torch.bfloat16):
        _compare(rule, make_case(6, vocab, dtype=dtype, parents=parents))


@pytest.mark.parametrize("rule", RULES)
def test_lengths_and_padding(rule):
    """A row's length, and -1, end its drafts; what lies behind may be anything."""
    chain = rule.startswith(("chain", "jacobi"))
    case = make_case(18, parents=[-1, 0, 1, 2] if chain else [-1, -1, 0, 0, 1, 2])
    nodes = case.tokens.shape[1]
    lengths = torch.arange(18) % (nodes + 1)
    step = _compare(rule, case, lengths=lengths)
    assert bool((step.path < lengths.unsqueeze(1)).all())
    behind = torch.arange(nodes) >= lengths.unsqueeze(1)
    junk = dataclasses.replace(case, tokens=case.tokens.masked_fill(behind, 10**12))
    assert_same(_compare(rule, junk, lengths=lengths), step)
    padded = dataclasses.replace(case, tokens=case.tokens.masked_fill(behind, -1))
    assert_same(_compare(rule, padded), step)


def test_padding_inside_a_tree_has_no_descendants():
    case = make_case(200, 4)  # parents: -1 -1 0 0 1 2 2 5
    case.tokens[:, 0] = -1
    for rule in ("tree", "tree_chosen", "typical", "relaxed", "relaxed_drawn"):
        step = _compare(rule, case)
        assert not bool(torch.isin(step.path, torch.tensor([0, 2, 3, 5, 6, 7])).any())
        assert bool((step.path == 1).any())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(0, 7, [-1, 0]), (3, 7, []), (1, 1, [-1]), (1, 3, [-1, 0])], ids=str)
def test_small_shapes(rule, shape):
    batch, vocab, parents = shape
    _compare(rule, make_case(batch, vocab, parents=parents, zeros=0.0))


def test_without_drafts_everything_is_plain_sampling():
    case = make_case(50, parents=[])
    plain = ops.verify_chain(case.target, case.tokens, seed=case.seed, offset=case.offset)
    bits = torch.ops.arcore.random_bits(case.seed, case.offset, 0, 0)
    assert torch.equal(plain.tokens[:, 0], torch.ops.arcore.inverse_cdf(case.target[:, 0], bits))
    for rule in RULES:
        if rule != "typical":  # its last token is the likeliest
            assert torch.equal(KERNEL[rule](case, seed=case.seed, offset=case.offset).tokens, plain.tokens), (
                rule
            )


STRIDES = {
    "transposed": lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
    "every_other_token": lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2],
    "every_other_row": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "inside_a_larger_one": lambda x: torch.nn.functional.pad(x, (3, 5, 1, 2))[:, 1:-2, 3:-5],
}


@pytest.mark.parametrize("layout", STRIDES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_strides(rule, dtype, layout):
    case = make_case(5, 70, dtype=dtype, parents=[-1, 0, 1])
    expected = KERNEL[rule](case, seed=case.seed, offset=case.offset)
    other = dataclasses.replace(
        case,
        target=STRIDES[layout](case.target),
        draft=STRIDES[layout](case.draft),
        tokens=case.tokens.repeat_interleave(3, dim=1)[:, ::3],
        neighbours=case.neighbours.t().contiguous().t(),
    )
    assert torch.equal(other.target, case.target)
    assert_same(
        KERNEL[rule](
            other, seed=case.seed.repeat_interleave(2)[::2], offset=case.offset.repeat_interleave(2)[::2]
        ),
        expected,
    )


def test_broadcast_rows():
    """Stride 0 over the batch: one distribution for many seeds, without a copy."""
    case = make_case(1, 30)
    wide = dataclasses.replace(case, target=case.target.expand(9, -1, -1), tokens=case.tokens.expand(9, -1))
    step = ops.verify_tree(wide.target, wide.tokens, case.parents, seed=torch.arange(9), offset=3)
    one = [ops.verify_tree(case.target, case.tokens, case.parents, seed=i, offset=3) for i in range(9)]
    assert torch.equal(step.tokens, torch.cat([x.tokens for x in one]))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint16], ids=str)
def test_types_of_neighbour_tables(dtype):
    case = make_case(40)
    table = case.neighbours.to(dtype)
    expected = KERNEL["relaxed"](case, seed=case.seed, offset=case.offset)
    other = dataclasses.replace(case, neighbours=table)
    assert_same(_compare("relaxed", other), expected)


def test_neighbours_that_are_none():
    """The token itself, negative ids and ids beyond the vocabulary count for nothing."""
    case = make_case(40)
    table = case.neighbours[:, :6]
    own = torch.arange(40, dtype=torch.int32).unsqueeze(1)
    noise = torch.cat(
        [own, torch.full_like(own, -1), table[:, :3], torch.full_like(own, 10**6), table[:, 3:]], 1
    )
    for rule in ("relaxed", "relaxed_drawn"):
        clean = dataclasses.replace(case, neighbours=table)
        dirty = dataclasses.replace(case, neighbours=noise)
        assert_same(_compare(rule, dirty), _compare(rule, clean))


def test_parents_per_row_and_as_a_mask():
    case = make_case(6, parents=[-1, -1, 0, 1])
    keywords = {"seed": case.seed, "offset": case.offset}
    shared = ops.verify_tree(case.target, case.tokens, [-1, -1, 0, 1], case.draft, **keywords)
    table = case.parents.expand(6, -1).clone()
    assert_same(ops.verify_tree(case.target, case.tokens, table, case.draft, **keywords), shared)
    from arcore import masks

    mask = masks.tree([-1, -1, 0, 1], 5)
    assert_same(ops.verify_tree(case.target, case.tokens, mask, case.draft, **keywords), shared)
    table[2] = torch.tensor([-1, 0, 1, 2])
    mixed = ops.verify_tree(case.target, case.tokens, table, case.draft, **keywords)
    keep = torch.arange(6) != 2
    assert torch.equal(mixed.tokens[keep], shared.tokens[keep])


def test_integer_types():
    case = make_case(5)
    keywords = {"seed": case.seed, "offset": case.offset}
    expected = ops.verify_tree(case.target, case.tokens, case.parents, **keywords)
    other = ops.verify_tree(
        case.target, case.tokens.short(), case.parents.int(), lengths=torch.full((5,), 8).int(), **keywords
    )
    assert_same(other, expected)


def test_gradients_are_not_followed():
    case = make_case(3)
    target = case.target.clone().requires_grad_()
    step = ops.verify_tree(target, case.tokens, case.parents, seed=0, offset=0)
    assert not any(x.requires_grad for x in step)


def test_one_seed_for_all_rows_is_one_sequence_of_numbers():
    p = distributions(1, 1, 1000, seed=0).expand(4, -1, -1)
    none = torch.zeros(4, 0, dtype=torch.int64)
    assert len(ops.verify_chain(p, none, seed=1, offset=2).tokens.unique()) == 1
    assert len(ops.verify_chain(p, none, seed=1, offset=torch.arange(4)).tokens.unique()) > 1
