"""What a launch that a GPU refuses says: which architectures were built, which one is there, and the fix."""

from __future__ import annotations

import ctypes

import pytest

from tests.cuda_host.build import HERE, build_library, unavailable

reason = unavailable()
pytestmark = pytest.mark.skipif(reason is not None, reason=reason or "")
NO_KERNEL_IMAGE, UNSUPPORTED_PTX, INVALID_VALUE = 209, 222, 1
GRID_TOO_LARGE, SHARED_TOO_LARGE = -2, -3


def message(error: int, capability: int) -> str:
    native = ctypes.CDLL(str(build_library([HERE / "messages.cpp"])))
    text = ctypes.create_string_buffer(400)
    native.launch_message(error, capability, b"8.0+PTX 9.0a", text, ctypes.c_int64(len(text)))
    return text.value.decode()


@pytest.mark.parametrize("error", [NO_KERNEL_IMAGE, UNSUPPORTED_PTX])
def test_an_architecture_that_was_not_built(error: int) -> None:
    assert message(error, 89) == (
        "this build has kernels for 8.0+PTX 9.0a but the GPU is of compute capability 8.9; "
        "build arcore again with TORCH_CUDA_ARCH_LIST=8.9"
    )


def test_a_gpu_that_is_too_old() -> None:
    assert message(NO_KERNEL_IMAGE, 75) == (
        "expected a GPU of compute capability 8.0 or newer but got 7.5; move the tensors to the CPU"
    )


def test_other_errors_keep_their_name() -> None:
    assert message(INVALID_VALUE, 90) == "the kernel could not be launched: cudaErrorName (CUDA error 1)"


def test_work_that_no_grid_holds() -> None:
    assert message(GRID_TOO_LARGE, 90) == (
        "expected work of at most 2147483647 blocks, which is what one launch holds, but got more; "
        "split the call along its batch"
    )


def test_too_little_shared_memory() -> None:
    assert "more shared memory per block than this one of compute capability 8.6" in message(
        SHARED_TOO_LARGE, 86
    )
