"""The checks of gpu_cases.py on a GPU, and on the CPU, where they must also notice wrong results."""

from __future__ import annotations

import pytest

from tests import device_checks
from tests.speculative import gpu_cases


@pytest.mark.parametrize(("check", "device"), device_checks.parameters(gpu_cases.CHECKS))
def test_check(check, device):
    device_checks.run_check(check, device)


@pytest.mark.parametrize(
    "check", [c for c in gpu_cases.CHECKS if c not in gpu_cases.NOT_DISTURBED], ids=lambda c: c.__name__
)
def test_check_notices_wrong_results(check, monkeypatch):
    device_checks.assert_notices(check, gpu_cases, gpu_cases.FUNCTIONS, monkeypatch)
