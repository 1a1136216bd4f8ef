"""A pytest plugin (-p tests.cuda_host.plugin): tests of the op named by ARCORE_CUDA_HOST_OP run its CUDA kernels."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.cuda_host.build import CudaHost, installed


@pytest.fixture(scope="session", autouse=True)
def _cuda_kernels_on_the_cpu() -> Iterator[CudaHost]:
    import arcore.ops  # noqa: F401  the schemas come first

    with installed(os.environ["ARCORE_CUDA_HOST_OP"]) as host:
        yield host
