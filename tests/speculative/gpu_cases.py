"""What must hold of the verify_* ops on a device: `check_*(device, small)`, see tests/device_checks.py.

Every rule is called through `cases.calls()`; the references decide what is right, id for id.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from arcore.ops import Verified
from tests import device_checks as checks
from tests.speculative.cases import RULES, Case, calls, make_case

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHAIN, PARENTS = [-1, 0, 1, 2], [-1, -1, 0, 0, 1, 2]
REFERENCE = calls(reference=True)


def _parents(rule: str) -> list[int]:
    return CHAIN if rule.startswith(("chain", "jacobi")) else PARENTS


def _there(case: Case, device: str) -> Case:
    names = [f.name for f in dataclasses.fields(case)]
    return Case(**{name: checks.moved(getattr(case, name), device) for name in names})


def verify(rule: str, case: Case, **keywords: Any) -> Verified:
    """The op behind `rule`, on the device of the case."""
    result: Verified = calls()[rule](case, **{"seed": case.seed, "offset": case.offset, **keywords})
    return result


def _compare(device: str, rule: str, case: Case, lengths: Tensor | None = None) -> Verified:
    expected: Verified = REFERENCE[rule](case, seed=case.seed, offset=case.offset, lengths=lengths)
    got = verify(rule, _there(case, device), lengths=checks.moved(lengths, device))
    checks.assert_equal([t.cpu() for t in got], list(expected), rule)
    return expected


def check_rules(device: str, small: bool) -> None:
    for rule in RULES:
        for dtype in DTYPES[:2] if small else DTYPES:
            step = _compare(device, rule, make_case(12 if small else 48, dtype=dtype, parents=_parents(rule)))
            assert step.accepted.sum() > 0  # else nothing was tested


def check_vocabularies(device: str, small: bool) -> None:
    sizes = (1, 65) if small else (1, 2, 15, 17, 63, 65, 127, 513, 1000, 4097, 16384, 32769)
    for vocab in sizes:
        for rule in ("chain", "chain_block", "tree", "relaxed", "relaxed_drawn", "typical", "jacobi"):
            for dtype in DTYPES[:2]:
                _compare(device, rule, make_case(6, vocab, dtype=dtype, parents=_parents(rule)))


def check_lengths(device: str, small: bool) -> None:
    """A row's length, and -1, end its drafts; what lies behind may be anything."""
    for rule in RULES:
        case = make_case(14, parents=_parents(rule))
        nodes = case.tokens.shape[1]
        lengths = torch.arange(14) % (nodes + 1)
        behind = torch.arange(nodes) >= lengths.unsqueeze(1)
        for filler in (10**12, -1):
            padded = dataclasses.replace(case, tokens=case.tokens.masked_fill(behind, filler))
            _compare(device, rule, padded, lengths if filler > 0 else None)


def check_many_rows(device: str, small: bool) -> None:
    """Against the CPU kernels, which equal the references: the same ids for the same keys."""
    for rule in RULES:
        case = make_case(40 if small else 3000, 200, parents=_parents(rule))
        expected = [t.clone() for t in calls()[rule](case, seed=case.seed, offset=case.offset)]
        got = verify(rule, _there(case, device))
        checks.assert_equal([t.cpu() for t in got], expected, rule)


def check_rows_without_a_distribution(device: str, small: bool) -> None:
    case = make_case(12, parents=CHAIN)
    case.target[3, 1], case.target[5, 0, 2], case.draft[7, 0] = 0.0, float("nan"), float("nan")
    for rule in ("chain", "chain_block", "jacobi"):
        _compare(device, rule, case)


def check_empty(device: str, small: bool) -> None:
    for rule in RULES:
        step = verify(rule, _there(make_case(0, 20, parents=_parents(rule)), device))
        assert step.accepted.shape[0] == 0


def check_layouts(device: str, small: bool) -> None:
    layouts: dict[str, Callable[[Tensor], Tensor]] = {
        "sliced": lambda t: t.repeat_interleave(2, dim=-1)[..., ::2],
        "batch_inner": lambda t: t.movedim(0, 1).contiguous().movedim(0, 1),
        "offset": lambda t: torch.nn.functional.pad(t, (1, 2))[..., 1:-2],
    }
    for rule in RULES:
        case = _there(make_case(6, 33, parents=_parents(rule)), device)
        expected = verify(rule, case)
        for name, layout in layouts.items():
            changed = dataclasses.replace(
                case, target=layout(case.target), draft=layout(case.draft), tokens=layout(case.tokens)
            )
            checks.assert_equal(list(verify(rule, changed)), list(expected), f"{rule} {name}")


def check_opcheck(device: str, small: bool) -> None:
    c = _there(make_case(4, 20, parents=[-1, -1, 0]), device)
    parents, lengths = c.parents.expand(4, -1), torch.tensor([0, 1, 2, 3], device=device)
    ops, rows = torch.ops.arcore, (c.seed, c.offset)
    for op, arguments in (
        (ops.verify_chain, (c.target, c.tokens, c.draft, lengths, *rows, True)),
        (ops.verify_tree, (c.target, c.tokens, parents, c.draft, None, *rows, True)),
        (ops.verify_typical, (c.target, c.tokens, parents, None, *rows, 0.09, 0.3, True)),
        (
            ops.verify_relaxed,
            (c.target, c.tokens, c.neighbours, parents, c.draft, None, *rows, 0.1, 5, True, False, False),
        ),
        (ops.verify_jacobi, (c.target, c.tokens, c.draft, lengths, *rows)),
    ):
        torch.library.opcheck(op.default, arguments)


def _as_function(rule: str, base: Case) -> Callable[..., list[Tensor]]:
    def run(target: Tensor, draft: Tensor, tokens: Tensor, seed: Tensor, offset: Tensor) -> list[Tensor]:
        case = dataclasses.replace(base, target=target, draft=draft, tokens=tokens, seed=seed, offset=offset)
        return list(verify(rule, case))

    return run


def _inputs(case: Case) -> tuple[Tensor, ...]:
    return case.target, case.draft, case.tokens, case.seed, case.offset


def check_compile(device: str, small: bool) -> None:
    for rule in ("chain", "tree", "typical", "relaxed", "jacobi"):
        case = _there(make_case(4, 20, parents=_parents(rule)), device)
        checks.assert_compiles(_as_function(rule, case), *_inputs(case), backend=checks.backend_for(small))


def check_graph(device: str, small: bool) -> None:
    """Captured in a graph and replayed with other distributions, drafts and keys, without waiting."""
    for rule in RULES:
        made = [make_case(6, 100 if small else 4096, seed=s, parents=_parents(rule)) for s in range(3)]
        base = _there(made[0], device)
        checks.assert_replays(device, _as_function(rule, base), [_inputs(c) for c in made])
        with checks.no_host_sync(device):
            verify(rule, base)


def check_determinism(device: str, small: bool) -> None:
    for rule in RULES:
        case = _there(make_case(8 if small else 64, 300, parents=_parents(rule)), device)
        checks.assert_repeatable(lambda rule=rule, case=case: list(verify(rule, case)), 3 if small else 50)


def check_batch_mates(device: str, small: bool) -> None:
    for rule in RULES:
        case = _there(make_case(12, parents=_parents(rule)), device)
        whole = verify(rule, case)
        for rows in ([5], [7, 7, 2], [11, 0, 3]):
            index = torch.tensor(rows, device=device)
            part = dataclasses.replace(
                case,
                **{n: getattr(case, n)[index] for n in ("target", "draft", "tokens", "seed", "offset")},
            )
            checks.assert_equal(list(verify(rule, part)), [t[index] for t in whole], f"{rule} {rows}")


def check_large_offsets(device: str, small: bool) -> None:
    """Rows of the batch more than 2^31 elements apart."""
    for rule in ("chain", "tree", "typical", "relaxed", "jacobi"):
        case = _there(make_case(2, 60, dtype=torch.bfloat16, parents=_parents(rule)), device)
        far = dataclasses.replace(case, target=checks.far_apart(case.target, small, device))
        checks.assert_equal(list(verify(rule, far)), list(verify(rule, case)), rule)


CHECKS = (
    check_rules,
    check_vocabularies,
    check_lengths,
    check_many_rows,
    check_rows_without_a_distribution,
    check_empty,
    check_layouts,
    check_opcheck,
    check_compile,
    check_graph,
    check_determinism,
    check_batch_mates,
    check_large_offsets,
)
SANITIZED = (check_rules, check_vocabularies, check_lengths, check_layouts)
# Their failure cannot be brought about by wrong results: the op is called by its own name, or on nothing.
NOT_DISTURBED = (check_opcheck, check_empty)
FUNCTIONS = ("verify",)
