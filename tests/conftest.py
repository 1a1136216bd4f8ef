"""What every test runs under: NaN in uninitialised memory, fixed seeds and threads, no display."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator

os.environ["MPLBACKEND"] = "Agg"

import hypothesis
import pytest
import torch

THREADS = int(os.environ.get("ARCORE_TEST_THREADS", "1"))

hypothesis.settings.register_profile("arcore", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("arcore")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--runslow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config: pytest.Config) -> None:
    for line in (
        "slow: takes more than a few seconds; runs with --runslow (make test-all)",
        "cuda: needs a CUDA device",
        "plain_empty: runs without the NaN fill of uninitialised memory",
    ):
        config.addinivalue_line("markers", line)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    slow = pytest.mark.skip(reason="slow: runs with --runslow")
    cuda = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "slow" in item.keywords and not config.getoption("--runslow"):
            item.add_marker(slow)
        if "cuda" in item.keywords and not torch.cuda.is_available():
            item.add_marker(cuda)


@pytest.fixture(autouse=True)
def _surroundings(request: pytest.FixtureRequest) -> Iterator[None]:
    """Puts process-wide torch state into a known form, and back after the test.

    Under `torch.use_deterministic_algorithms`, ATen itself fills what `empty`, `empty_like`, `new_empty`,
    `empty_strided` and `resize_` return with NaN (integers with their maximum), for calls from Python and from C++.
    A kernel or module that reads memory before it wrote it then fails loudly. Tests marked `plain_empty` opt out.
    """
    random.seed(0)
    torch.manual_seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(THREADS)
    torch.set_grad_enabled(True)
    poison = request.node.get_closest_marker("plain_empty") is None
    torch.use_deterministic_algorithms(poison)
    torch.utils.deterministic.fill_uninitialized_memory = poison
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(THREADS)
    torch.set_grad_enabled(True)
