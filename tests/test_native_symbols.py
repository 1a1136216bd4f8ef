"""What the compiled libraries expose and need: the rules of csrc/README.md, read off the binaries."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import arcore

ROOT = Path(__file__).resolve().parent.parent
OPS = Path(arcore.__file__).parent / "_ops.so"

pytestmark = pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not installed")


def _symbols(path: Path, *flags: str) -> list[str]:
    result = subprocess.run(["nm", "-C", *flags, str(path)], capture_output=True, text=True, check=True)
    return [line[19:] if line[:1] != " " else line.strip() for line in result.stdout.splitlines()]


def test_the_op_library_needs_torch_only_through_the_stable_c_interface():
    undefined = [line.removeprefix("U ") for line in _symbols(OPS, "-D", "--undefined-only")]
    foreign = [s for s in undefined if s.startswith(("at::", "c10::", "torch::", "caffe2::"))]
    assert undefined
    assert not foreign, f"C++ symbols of torch: {foreign[:5]}"


def test_the_op_library_exports_nothing_of_ours():
    exported = [s for s in _symbols(OPS, "-D", "--defined-only") if "arcore" in s]
    assert not exported


@pytest.mark.parametrize("isa", ["AVX2", "AVX512", "AVX512_BF16", "AMX"])
def test_instruction_set_objects_share_no_symbol(isa):
    """A weak symbol compiled for AVX-512 could be picked by the linker for every CPU."""
    objects = list(ROOT.glob(f"build/cmake-*/CMakeFiles/arcore_cpu_{isa}.dir/**/*.o"))
    if not objects:
        pytest.skip("no build folder (installed from a wheel)")
    for path in objects:
        for name in _symbols(path, "--defined-only", "--extern-only"):
            # The personality pointer of exception tables is data and the same everywhere.
            if name.startswith("DW.ref.") or not name:
                continue
            assert f"::{isa}::" in name, f"{path.name}: {name}"


# Compiled against torch 2.11, the oldest that is supported. Later headers have more, which only a build against the
# oldest shows to be missing: try one before you add a name.
OF_OLDEST_TORCH = {
    "STABLE_TORCH_LIBRARY_FRAGMENT",
    "STABLE_TORCH_LIBRARY_IMPL",
    "TORCH_BOX",
    "TORCH_ERROR_CODE_CHECK",
    "aoti_torch_empty_strided",
    "aoti_torch_get_current_cuda_stream",
    "aoti_torch_get_device_index",
    "aoti_torch_get_device_type",
    "aoti_torch_get_storage_size",
    "torch::headeronly::IntHeaderOnlyArrayRef",
    "torch::headeronly::ScalarType",
    "torch::headeronly::ScalarType::Byte",
    "torch::headeronly::ScalarType::Float",
    "torch::headeronly::ScalarType::Int",
    "torch::headeronly::ScalarType::Long",
    "torch::headeronly::toString",
    "torch::stable::Tensor",
    "torch::stable::accelerator::DeviceGuard",
    "torch::stable::contiguous",
    "torch::stable::copy_",
    "torch::stable::empty_like",
    "torch::stable::get_num_threads",
    "torch::stable::new_empty",
    "torch::stable::parallel_for",
    "torch::stable::select",
    "torch::stable::sum",
    "torch::stable::to",
    "torch::stable::view",
    "torch::stable::zero_",
}


def test_the_sources_use_nothing_newer_than_the_oldest_torch():
    name = re.compile(
        r"\b(?:aoti_torch_\w+|(?:STABLE|STD)_[A-Z_]+|TORCH_[A-Z_]+|torch::(?:stable|headeronly)(?:::\w+)+)"
    )
    said = re.compile(r"//.*|TORCH_(?:TARGET_VERSION|CUDA_ARCH_LIST)")
    used = {
        found: path.relative_to(ROOT)
        for path in ROOT.glob("csrc/**/*")
        if path.suffix in (".h", ".cpp", ".cu", ".cuh")
        for found in name.findall(said.sub("", path.read_text()))
    }
    assert len(used) > 20
    newer = {found: str(path) for found, path in used.items() if found not in OF_OLDEST_TORCH}
    assert not newer, f"build against torch 2.11 before these are added to the list: {newer}"
