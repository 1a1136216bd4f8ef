"""What must hold of ssd on a device: `check_*(device, small)`, see tests/device_checks.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from arcore.ops import ssd
from tests import device_checks as checks
from tests.ssd.cases import ALONG_TIME, Case, check_against_reference, everything, make_case


def _ours(device: str) -> Any:
    return checks.on(device, ssd)


def check_sizes(device: str, small: bool) -> None:
    for length in (1, 65) if small else (0, 1, 31, 33, 127, 300, 1025):
        check_against_reference(make_case(1, length, 3, 17, groups=1, initial=True), _ours(device))
    for dim, state in ((20, 5),) if small else ((1, 1), (17, 40), (64, 128), (100, 256)):
        check_against_reference(make_case(2, 70, 4, dim, state), _ours(device))


def check_optional_arguments(device: str, small: bool) -> None:
    for options in (
        {"skip": None, "gate": False},
        {"skip": "head", "bias": False},
        {"softplus": False},
        {"limit": (0.2, 0.7)},
        {"groups": 6},
    ):
        for reverse in (False, True):
            check_against_reference(make_case(reverse=reverse, **options), _ours(device))


def check_16_bit_storage(device: str, small: bool) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        case = make_case(length=130, initial=True)
        mixed = case.map(lambda n, t, dtype=dtype: t.to(dtype) if n in ALONG_TIME else t)
        check_against_reference(case.to(dtype), _ours(device))
        check_against_reference(mixed, _ours(device))


def check_packed_rows(device: str, small: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(-1, 3, (3, 40), generator=generator).repeat_interleave(4, dim=1).int()
    ids[1] = -1
    for reverse in (False, True):
        for lengths in ([5], [1, 64, 65, 3], [200, 0, 1, 130]):
            case = make_case(lengths=lengths, initial=True, reverse=reverse)
            check_against_reference(case, _ours(device))
        case = make_case(3, 160, ids=ids, initial=True, reverse=reverse)
        check_against_reference(case, _ours(device))


def check_batch_mates(device: str, small: bool) -> None:
    case = make_case(3, 70, skip=None)
    whole = everything(case, _ours(device))
    for i in range(3):
        alone = everything(case.map(lambda n, t, i=i: t[i : i + 1] if n in _BATCHED else t), _ours(device))
        for name in ("out", "last_state", "x", "dt", "B", "C", "z"):
            checks.assert_equal(alone[name], whole[name][i : i + 1], f"row {i}: {name}")


_BATCHED = (*ALONG_TIME, "grad_last_state")


def check_repetition(device: str, small: bool) -> None:
    case: Case = make_case(length=200, initial=True)
    there = replace(case.map(lambda _, t: checks.moved(t, device)))
    checks.assert_repeatable(lambda: tuple(everything(there, ssd).values()), 3 if small else 30)


CHECKS = (
    check_sizes,
    check_optional_arguments,
    check_16_bit_storage,
    check_packed_rows,
    check_batch_mates,
    check_repetition,
)
# What compute-sanitizer runs, in small.
SANITIZED = (check_sizes, check_optional_arguments, check_packed_rows)
FUNCTIONS = ("ssd",)
