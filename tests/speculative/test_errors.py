"""Every refusal names the argument, what was expected, what came, and the fix."""

from __future__ import annotations

import pytest
import torch

from arcore.ops import codebook_neighbours, verify_chain, verify_relaxed
from tests.speculative.cases import RULES, calls, make_case

B, M, V = 3, 2, 10


def _case(**changes):
    case = make_case(B, V, parents=[-1, 0])
    for name, value in changes.items():
        setattr(case, name, value)
    return case


P, Q = torch.full((B, M + 1, V), 0.1), torch.full((B, M, V), 0.1)

SHAPES = {
    "target_rank": ({"target": P[0]}, r"expected target_probs of shape \[B, M \+ 1, V\] but got \(3, 10\)"),
    "target_empty": ({"target": P[:, :0]}, r"expected target_probs of shape \[B, M \+ 1, V\]"),
    "tokens": (
        {"tokens": torch.zeros(B, M + 1).long()},
        r"expected draft_tokens of shape \(3, 2\) but got \(3, 3\)",
    ),
    "draft": (
        {"draft": P},
        r"expected draft_probs of shape \(B=3, M=2, V=10\), one row less than target_probs, but got \(3, 3, 10\)",
    ),
    "parents": (
        {"parents": torch.tensor([-1, 0, 1])},
        r"expected parents of shape \(2,\) but got \(3,\)",
    ),
    "draft_device": (
        {"draft": Q.to("meta")},
        r"expected draft_probs on the device of target_probs, cpu, but got meta",
    ),
    "tokens_device": (
        {"tokens": torch.zeros(B, M, device="meta").long()},
        r"expected draft_tokens on the device of target_probs, cpu, but got meta",
    ),
    "neighbours": (
        {"neighbours": torch.zeros(V + 1, 4).int()},
        r"expected neighbours of shape \(V=10, K\) but got \(11, 4\)",
    ),
}


def _uses(rule, change):
    if change.startswith("draft"):
        return rule in ("chain", "chain_block", "tree", "relaxed_drawn", "jacobi")
    if change == "parents":
        return rule.startswith(("tree", "typical", "relaxed"))
    if change == "neighbours":
        return rule.startswith("relaxed")
    return True


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("change", SHAPES)
def test_shapes_and_devices(change, reference):
    changes, message = SHAPES[change]
    for rule in RULES:
        if _uses(rule, change):
            with pytest.raises(ValueError, match=r"arcore.verify_\w+: " + message):
                calls(reference)[rule](_case(**changes), seed=0, offset=0)


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_every_device_and_integer(rule, reference):
    call = calls(reference)[rule]
    where = "on the device of target_probs, cpu, but got meta"
    keywords = {"seed": torch.arange(B), "offset": torch.arange(B), "lengths": torch.ones(B).long()}
    for name in keywords:
        with pytest.raises(ValueError, match=rf"arcore\.verify_\w+: expected {name} {where}"):
            call(_case(), **{**keywords, name: keywords[name].to("meta")})
    for field, name in (("tokens", "draft_tokens"), ("parents", "parents"), ("neighbours", "neighbours")):
        if _uses(rule, field):
            with pytest.raises(ValueError, match=f"expected {name} {where}"):
                call(_case(**{field: getattr(_case(), field).to("meta")}), **keywords)
    for name in ("seed", "offset"):
        for value in (1.5, 2.0, True):
            with pytest.raises(TypeError, match=f"expected {name} to be an integer but got {value}"):
                call(_case(), **{**keywords, name: value})
        with pytest.raises(ValueError, match=f"expected {name} to fit into int64 but got"):
            call(_case(), **{**keywords, name: 2**63})
    if _uses(rule, "parents"):
        with pytest.raises(TypeError, match=r"expected parents\[1\] to be an integer but got 0\.5"):
            call(_case(parents=[-1, 0.5]), **keywords)


def test_other_integers():
    near, tokens = torch.zeros(V, 4).int(), torch.zeros(B, M).long()
    with pytest.raises(TypeError, match=r"expected k to be an integer but got 2\.0"):
        verify_relaxed(P, tokens, near, seed=0, offset=0, k=2.0)
    with pytest.raises(TypeError, match=r"codebook_neighbours: expected k to be an integer but got 1\.0"):
        codebook_neighbours(torch.zeros(4, 2), 1.0)
    with pytest.raises(TypeError, match=r"expected rows to be an integer but got 1\.5"):
        codebook_neighbours(torch.zeros(4, 2), 1, rows=1.5)


def test_raw_ops_with_one_meta_tensor():
    """One meta argument sends the call to the fake, which must not return memory that nobody wrote."""
    tokens, parents, rows = torch.zeros(B, M).long(), torch.zeros(B, M).long() - 1, torch.arange(B)
    near = torch.zeros(V, 4).int()
    ops = torch.ops.arcore
    for op, args in (
        (ops.verify_chain, (P, tokens, Q, rows, rows, rows, False)),
        (ops.verify_tree, (P, tokens, parents, Q, rows, rows, rows, False)),
        (ops.verify_typical, (P, tokens, parents, rows, rows, rows, 0.1, 0.3, True)),
        (ops.verify_relaxed, (P, tokens, near, parents, Q, rows, rows, rows, 0.1, 4, False, False, False)),
        (ops.verify_jacobi, (P, tokens, Q, rows, rows, rows)),
    ):
        names = [a.name for a in op.default._schema.arguments]
        for i, x in enumerate(args):
            if i and isinstance(x, torch.Tensor):
                with pytest.raises(ValueError, match=f"expected {names[i]} on the device of target_probs"):
                    op(*args[:i], x.to("meta"), *args[i + 1 :])


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_rows_of_numbers(rule, reference):
    call = calls(reference)[rule]
    with pytest.raises(ValueError, match=r"expected one seed, or one per row \(B=3\), but got shape \(4,\)"):
        call(_case(), seed=torch.arange(4), offset=0)
    with pytest.raises(TypeError, match=r"expected offset of dtype int64 but got int32"):
        call(_case(), seed=0, offset=torch.arange(3).int())
    with pytest.raises(ValueError, match=r"expected lengths of shape \(3,\) but got \(2,\)"):
        call(_case(), seed=0, offset=0, lengths=torch.tensor([1, 2]))
    with pytest.raises(TypeError, match=r"expected lengths of an integer dtype but got float32"):
        call(_case(), seed=0, offset=0, lengths=torch.ones(3))


def test_dtypes():
    for rule in RULES:
        with pytest.raises(
            TypeError,
            match=r"a dtype of float32, bfloat16, float16 but got float64; convert it with .float\(\)",
        ):
            calls()[rule](_case(target=P.double(), draft=Q.double()), seed=0, offset=0)
        with pytest.raises(TypeError, match=r"expected draft_tokens of an integer dtype but got float32"):
            calls()[rule](_case(tokens=torch.zeros(B, M)), seed=0, offset=0)
    with pytest.raises(
        TypeError, match=r"draft_probs of target_probs' dtype float32 but got bfloat16; verify with"
    ):
        calls()["chain"](_case(draft=Q.bfloat16()), seed=0, offset=0)
    with pytest.raises(TypeError, match=r"neighbours of a dtype of int32, int64, uint16 but got float32"):
        calls()["relaxed"](_case(neighbours=torch.zeros(V, 4)), seed=0, offset=0)


@pytest.mark.parametrize("reference", [False, True])
def test_values(reference):
    """Kernels check ids before they use them; the message is the same as the reference's."""
    error = ValueError if reference else RuntimeError
    for rule in RULES:
        call = calls(reference)[rule]
        with pytest.raises(
            error,
            match=r"expected draft_tokens from 0 to 9, or -1 for padding, but row 1, node 1 has 10",
        ):
            call(_case(tokens=torch.tensor([[0, 1], [2, 10], [3, 4]])), seed=0, offset=0)
        with pytest.raises(error, match=r"node 1 has -2"):
            call(_case(tokens=torch.tensor([[0, 1], [2, -2], [3, 4]])), seed=0, offset=0)
        with pytest.raises(error, match=r"expected lengths from 0 to 2 but row 2 has 3"):
            call(_case(), seed=0, offset=0, lengths=torch.tensor([0, 2, 3]))
        if not _uses(rule, "parents"):
            continue
        for parents in ([-1, 1], [0, 0], [-1, -2], [1, -1]):  # itself, itself, nobody, a later node
            with pytest.raises(
                error,
                match=r"expected -1 <= parents\[i\] < i but node . of row 0 has parent .*; list parents",
            ):
                call(_case(parents=torch.tensor(parents)), seed=0, offset=0)


@pytest.mark.parametrize("name", ["verify_", "reference_verify_"])
def test_options(name):
    from arcore.ops import speculative as ops

    chain, typical, relaxed = (getattr(ops, name + rule) for rule in ("chain", "typical", "relaxed"))
    tokens, near = torch.zeros(B, M).long(), torch.zeros(V, 4).int()
    keywords = {"seed": 0, "offset": 0}
    with pytest.raises(ValueError, match=r'method "token" or "block" but got \'greedy\''):
        chain(P, tokens, Q, method="greedy", **keywords)
    with pytest.raises(ValueError, match=r'expected draft_probs with method="block"'):
        chain(P, tokens, method="block", **keywords)
    for option, value in (("epsilon", -1.0), ("delta", float("nan"))):
        with pytest.raises(ValueError, match=rf"a finite {option} >= 0 but got"):
            typical(P, tokens, **{option: value})
    with pytest.raises(ValueError, match=r'bonus "greedy" or "sample" but got \'none\''):
        typical(P, tokens, bonus="none")
    for option, value, message in (
        ("delta", -0.1, r"a finite delta >= 0 but got -0.1"),
        ("k", 5, r"k from 0 to the K=4 stored neighbours but got 5"),
        ("k", -1, r"k from 0 to the K=4"),
        ("bound", "both", r'bound "additive" or "multiplicative" but got \'both\''),
        ("residual", "none", r'residual "relaxed" or "released" but got \'none\''),
    ):
        with pytest.raises(ValueError, match=message):
            relaxed(P, tokens, near, **{option: value}, **keywords)
    with pytest.raises(ValueError, match=r'expected no draft_probs with residual="released"'):
        relaxed(P, tokens, near, None, Q, residual="released", **keywords)


def test_codebook():
    with pytest.raises(ValueError, match=r"codebook of shape \[V, D\] but got \(4,\)"):
        codebook_neighbours(torch.zeros(4), 1)
    with pytest.raises(ValueError, match=r"k from 0 to V - 1 = 3 but got 4"):
        codebook_neighbours(torch.zeros(4, 2), 4)
    with pytest.raises(ValueError, match=r"rows >= 1 but got 0"):
        codebook_neighbours(torch.zeros(4, 2), 1, rows=0)


def test_seed_and_offset_have_no_default():
    """A forgotten offset would give every round the same numbers."""
    with pytest.raises(TypeError, match="offset"):
        verify_chain(P, torch.zeros(B, M).long(), seed=0)


def test_raw_op_checks_too():
    op = torch.ops.arcore.verify_tree
    tokens, parents, rows = torch.zeros(B, M).long(), torch.zeros(B, M).long() - 1, torch.zeros(B).long()
    with pytest.raises(RuntimeError, match=r"arcore::verify_tree: expected draft_tokens of shape \(3, 2\)"):
        op(P, tokens[:, :1], parents, None, None, rows, rows, False)
    with pytest.raises(RuntimeError, match=r"expected parents of dtype int64 but got Int"):
        op(P, tokens, parents.int(), None, None, rows, rows, False)
    with pytest.raises(RuntimeError, match=r"expected seed of shape \(3\) but got \(2\)"):
        op(P, tokens, parents, None, None, rows[:2], rows, False)
    with pytest.raises(RuntimeError, match=r"expected draft_probs of target_probs' dtype but got Half"):
        op(P, tokens, parents, Q.half(), None, rows, rows, False)
    with pytest.raises(RuntimeError, match=r"float32, bfloat16 or float16 but got Double"):
        op(P.double(), tokens, parents, None, None, rows, rows, False)
    near = torch.zeros(V, 4)
    relaxed = torch.ops.arcore.verify_relaxed
    with pytest.raises(RuntimeError, match=r"neighbours of dtype int64, int32 or uint16 but got Float"):
        relaxed(P, tokens, near, None, None, None, rows, rows, 0.1, 4, False, False, False)
    with pytest.raises(RuntimeError, match=r"expected k from 0 to the 4 stored neighbours but got 5"):
        relaxed(P, tokens, near.int(), None, None, None, rows, rows, 0.1, 5, False, False, False)
