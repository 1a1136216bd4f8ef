"""The executor tests of all ops under AddressSanitizer and UndefinedBehaviorSanitizer, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.cuda_host.build import ROOT, unavailable

OPS = sorted(path.parent.name for path in (ROOT / "csrc").glob("*/cuda.cpp"))
reason = unavailable()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(reason is not None, reason=reason or ""),
]

PLANTED = """
import ctypes, torch
from tests.cuda_host.build import probe_library
library = probe_library(sanitize=True)
out, message = torch.zeros(128), ctypes.create_string_buffer(64)
library.probe(1, out.data_ptr(), None, {n}, {mistake}, 1, 128, 512, 1, message, 64)
print("alive")
"""


def sanitized(*command: str) -> subprocess.CompletedProcess[str]:
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = {
        **os.environ,
        "ARCORE_CUDA_HOST_SANITIZE": "1",
        "LD_PRELOAD": " ".join(found.stdout.strip() for found in libraries),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_sanitizers_find_a_write_past_a_buffer() -> None:
    index_past_buffer = 16
    assert "alive" in sanitized("-c", PLANTED.format(n=0, mistake=index_past_buffer)).stdout
    found = sanitized("-c", PLANTED.format(n=1, mistake=index_past_buffer))
    assert found.returncode != 0
    assert "AddressSanitizer" in found.stderr
    assert "misuse" in found.stderr


@pytest.mark.parametrize("op", OPS)
def test_kernels_under_sanitizers(op: str) -> None:
    done = sanitized("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/{op}/test_cuda_host.py")
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert " passed" in done.stdout
