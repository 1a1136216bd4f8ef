"""What every test runs under: NaN in uninitialised memory, fixed seeds and threads, no display."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator

os.environ["MPLBACKEND"] = "Agg"
# Deterministic cuBLAS, which PyTorch asks for under use_deterministic_algorithms.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

import arcore  # noqa: F401  (its ops)

try:
    import hypothesis
except ImportError:  # a machine with a GPU has what the tests marked `cuda` need, not all of the extra [test]
    hypothesis = None

from tests.device_checks import reason_to_skip_cuda

THREADS = int(os.environ.get("ARCORE_TEST_THREADS", "1"))

if hypothesis is not None:
    hypothesis.settings.register_profile("arcore", deadline=None, derandomize=True, max_examples=50)
    hypothesis.settings.load_profile("arcore")


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    parser.addoption("--runslow", action="store_true", help="also run the tests marked slow")
    if not pluginmanager.hasplugin("timeout"):
        parser.addini("timeout", "seconds per test; without pytest-timeout there is no limit")


def pytest_configure(config: pytest.Config) -> None:
    # Commands that tests start are not workers of this run: pytest-benchmark, for one, refuses to measure in a worker.
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST_")]:
        del os.environ[name]
    for line in (
        "slow: takes more than a few seconds; runs with --runslow (make test-all)",
        "cuda: needs a CUDA device and an extension built with CUDA",
        "plain_empty: runs without the NaN fill of uninitialised memory",
        "thinned: of all combinations of parameters, those alone are not slow that hold each value once or a few times",
    ):
        config.addinivalue_line("markers", line)


def leave_out(items: list[pytest.Item]) -> None:
    """Marks as slow what the marker `thinned` leaves out of a test's combinations of parameters. With n values
    of the longest parameter n combinations stay: the i-th of each parameter, from the beginning again where one has
    fewer, then one further, so that two short parameters do not keep the same pairs."""
    tests: dict[tuple[object, ...], list[pytest.Function]] = {}
    for item in items:
        if (
            isinstance(item, pytest.Function)
            and hasattr(item, "callspec")
            and item.get_closest_marker("thinned")
        ):
            tests.setdefault((item.path, item.cls, item.originalname), []).append(item)
    for combinations in tests.values():
        axes = [dict.fromkeys(ids) for ids in zip(*(i.callspec._idlist for i in combinations), strict=True)]
        places = [{name: i for i, name in enumerate(axis)} for axis in axes]
        longest = max(map(len, axes))
        kept = {
            tuple((i + n * (i // len(axis))) % len(axis) for n, axis in enumerate(axes))
            for i in range(longest)
        }
        for item in combinations:
            if tuple(p[name] for p, name in zip(places, item.callspec._idlist, strict=True)) not in kept:
                item.add_marker(pytest.mark.slow)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    leave_out(items)
    slow = pytest.mark.skip(reason="slow: runs with --runslow")
    no_cuda = reason_to_skip_cuda()
    for item in items:
        # Marks, not keywords: those also hold the names of folders, such as that of a checkout.
        if item.get_closest_marker("slow") is not None and not config.getoption("--runslow"):
            item.add_marker(slow)
        if item.get_closest_marker("cuda") is not None and no_cuda is not None:
            item.add_marker(pytest.mark.skip(reason=no_cuda))


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
    torch.ops.arcore.poison_new_memory(poison)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(THREADS)
    torch.set_grad_enabled(True)
